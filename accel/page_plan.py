"""From token ranges to pages: which pages an attention reads, on flash or in a host's tail, in which units.

A unit is one (item, KV head) over a run of token groups: the piece of work a kernel call takes. Units
are ordered by item, then run, then head, which is the order in which spilled pages lie on the flash.
"""

from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from accel.descriptor import AttentionTables
from accel.workers import AttentionBatch

UNIT_TOKENS = 2048  # long enough to amortise a kernel call, short enough to split between workers


@dataclass(frozen=True)
class PagePlan:
    """Pages of all units, concatenated: the logical addresses of K and of V (page numbers in a host's memory).

    lbas: int64 [2, num_pages], of K and of V
    page_first_token: int64 [num_pages]; page_num_tokens: int32 [num_pages]
    unit_first_page: int64 [num_units + 1]; unit_item, unit_kv_head: int32 [num_units]
    """

    lbas: np.ndarray
    page_first_token: np.ndarray
    page_num_tokens: np.ndarray
    unit_first_page: np.ndarray
    unit_item: np.ndarray
    unit_kv_head: np.ndarray

    @property
    def num_units(self) -> int:
        return len(self.unit_item)

    @property
    def num_pages(self) -> int:
        return self.lbas.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    def batch(self, addresses: np.ndarray, **command) -> AttentionBatch:
        """What a worker computes over these pages.

        addresses: uint64 [2, num_pages], where those of K and of V lie, filled before it is computed
        command: the fields that are not of pages
        """
        return AttentionBatch(
            key_pages=addresses[0],
            value_pages=addresses[1],
            page_first_token=self.page_first_token,
            page_num_tokens=self.page_num_tokens,
            unit_first_page=self.unit_first_page,
            unit_item=self.unit_item,
            unit_kv_head=self.unit_kv_head,
            **command,
        )


@njit(nogil=True, cache=True)
def _plan(
    fill,
    item_first_extent,
    item_first_group,
    token_start,
    token_stop,
    extents_base,
    extents_groups,
    group_lbas,
    layer_offset,
    num_kv_heads,
    per_head,
    per_page,
    group_tokens,
    unit_groups,
    lbas,
    page_first_token,
    page_num_tokens,
    unit_first_page,
    unit_item,
    unit_kv_head,
):
    """One pass over all units; counts when not `fill`, writes the arrays when it is."""
    num_units = 0
    num_pages = 0
    for item in range(len(token_start)):
        start, stop = token_start[item], token_stop[item]
        if start >= stop:
            continue
        first_group = start // group_tokens
        stop_group = (stop - 1) // group_tokens + 1
        # where the run begins: each head goes on from there, or many extents would cost their square
        run_extent, run_behind = item_first_extent[item], first_group - item_first_group[item]
        for run in range(first_group, stop_group, unit_groups):
            run_stop = min(run + unit_groups, stop_group)
            for head in range(num_kv_heads):
                if fill:
                    unit_first_page[num_units] = num_pages
                    unit_item[num_units] = item
                    unit_kv_head[num_units] = head
                extent, behind = run_extent, run_behind
                for group in range(run, run_stop):
                    origin = group * group_tokens
                    first = max(start - origin, 0) // per_page
                    last = (min(stop - origin, group_tokens) - 1) // per_page
                    if fill:
                        while behind >= extents_groups[extent]:
                            behind -= extents_groups[extent]
                            extent += 1
                        base = extents_base[extent] + behind * group_lbas
                        behind += 1
                        keys = base + layer_offset + head * 2 * per_head
                        for page in range(first, last + 1):
                            lbas[0, num_pages] = keys + page
                            lbas[1, num_pages] = keys + per_head + page
                            page_first_token[num_pages] = origin + page * per_page
                            page_num_tokens[num_pages] = min(
                                per_page, min(group_tokens, stop - origin) - page * per_page
                            )
                            num_pages += 1
                    else:
                        num_pages += last + 1 - first
                num_units += 1
            run_extent, run_behind = extent, behind
    if fill:
        unit_first_page[num_units] = num_pages
    return num_units, num_pages


def _plan_arrays(num_units: int, num_pages: int) -> tuple[np.ndarray, ...]:
    """PagePlan's fields, to be filled."""
    return (
        np.empty((2, num_pages), np.int64),
        np.empty(num_pages, np.int64),
        np.empty(num_pages, np.int32),
        np.empty(num_units + 1, np.int64),
        np.empty(num_units, np.int32),
        np.empty(num_units, np.int32),
    )


_NO_ARRAYS = _plan_arrays(0, 0)  # for counting


def plan_units(
    token_start: np.ndarray,
    token_stop: np.ndarray,
    first_extent: np.ndarray,
    first_group: np.ndarray,
    extents_base: np.ndarray,
    extents_groups: np.ndarray,
    *,
    group_pages: int,
    layer_offset: int,
    num_kv_heads: int,
    pages_per_head: int,
    tokens_per_page: int,
    group_tokens: int,
    max_unit_pages: int,
) -> PagePlan:
    """The pages that hold tokens [token_start, token_stop) of each item, as units.

    Item i's groups from first_group[i] on lie in extents from first_extent[i] on: extents_groups[e] groups of
    group_pages each from page extents_base[e]. All arrays int64. max_unit_pages bounds K plus V pages of a
    unit.
    """
    unit_groups = max(1, min(UNIT_TOKENS // group_tokens, max_unit_pages // (2 * pages_per_head)))
    arguments = (
        first_extent,
        first_group,
        token_start,
        token_stop,
        extents_base,
        extents_groups,
        group_pages,
        layer_offset,
        num_kv_heads,
        pages_per_head,
        tokens_per_page,
        group_tokens,
        unit_groups,
    )

    num_units, num_pages = _plan(False, *arguments, *_NO_ARRAYS)
    filled = _plan_arrays(num_units, num_pages)
    _plan(True, *arguments, *filled)
    return PagePlan(*filled)


def plan_pages(tables: AttentionTables, max_unit_pages: int) -> PagePlan:
    """The pages that a command's queries see in layer 0, by logical address."""
    start, stop = visible_tokens(tables)
    return plan_tokens(tables, np.arange(len(tables.items)), start, stop, max_unit_pages)


def visible_tokens(tables: AttentionTables) -> tuple[np.ndarray, np.ndarray]:
    """int64 [num_items], twice: from the first to behind the last token that any of an item's queries sees."""
    # what no extent names cannot be read; descriptor.check_tables holds num_tokens to the extents' end
    first_token = tables.items["first_group"].astype(np.int64) * tables.group_tokens
    return np.maximum(tables.visible_start.min(axis=1), first_token), tables.visible_stop.max(axis=1)


def plan_tokens(
    tables: AttentionTables,
    item: np.ndarray,
    token_start: np.ndarray,
    token_stop: np.ndarray,
    max_unit_pages: int,
) -> PagePlan:
    """The pages of layer 0 that hold the tokens [token_start[i], token_stop[i]) of item[i], for every i.

    All int64 [num_ranges]. Units of one item are neighbours where its ranges are.
    """
    plan = plan_units(
        token_start,
        token_stop,
        tables.items["first_extent"].astype(np.int64)[item],
        tables.items["first_group"].astype(np.int64)[item],
        tables.extents["base_lba"].astype(np.int64),
        tables.extents["num_groups"].astype(np.int64),
        group_pages=tables.group_lbas,
        layer_offset=0,
        num_kv_heads=tables.num_kv_heads,
        pages_per_head=tables.pages_per_head,
        tokens_per_page=tables.tokens_per_page,
        group_tokens=tables.group_tokens,
        max_unit_pages=max_unit_pages,
    )
    return replace(plan, unit_item=item.astype(np.int32)[plan.unit_item])


def units_of_plan(plan: PagePlan, units: np.ndarray) -> PagePlan:
    """Some units of a plan. units: int64, ascending"""
    first, stop = plan.unit_first_page[units], plan.unit_first_page[units + 1]
    pages = runs(first, stop - first)
    return PagePlan(
        lbas=plan.lbas[:, pages],
        page_first_token=plan.page_first_token[pages],
        page_num_tokens=plan.page_num_tokens[pages],
        unit_first_page=np.concatenate([[0], np.cumsum(stop - first)]),
        unit_item=plan.unit_item[units],
        unit_kv_head=plan.unit_kv_head[units],
    )


def runs(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """int64: count[0] numbers from first[0] on, then count[1] from first[1] on, and so forth."""
    stop = np.cumsum(count)
    return np.repeat(first - (stop - count), count) + np.arange(stop[-1] if len(stop) else 0)
