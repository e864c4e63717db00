"""Of a sparse command: which segments of derived data stand for which tokens, and in which rounds are read.

What has no derived data is planned as for a dense command. A segment of which queries see so little that its
index pages outnumber the token-major ones is left out as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from accel.descriptor import AttentionTables
from accel.page_plan import PagePlan, plan_tokens, visible_tokens
from accel.sparf.channel_major import pages_per_channel
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.vendor_command import SparseMethod


@dataclass(frozen=True)
class SparsePlan:
    """Segments that are used, by item, then by token; the arrays are int64 [num_segments], of one KV head.

    place: in the descriptor's table
    token_start, token_stop: what of its tokens any query sees
    dense_pages: token-major pages, of K and of V, that hold those
    """

    place: np.ndarray
    item: np.ndarray
    first_token: np.ndarray
    token_start: np.ndarray
    token_stop: np.ndarray
    base_lba: np.ndarray
    dense_pages: np.ndarray
    layouts: list[DerivedLayout]

    def __len__(self) -> int:
        return len(self.place)

    @cached_property
    def index_pages(self) -> np.ndarray:
        return np.array([layout.index_pages for layout in self.layouts], np.int64)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        return np.array([layout.num_tokens for layout in self.layouts], np.int64)

    @cached_property
    def num_units(self) -> np.ndarray:
        """Refinement pages."""
        return np.array([layout.refinement_pages for layout in self.layouts], np.int64)

    def lbas(self, layer: int, heads: range, of) -> np.ndarray:
        """int64 [num_segments, len(heads)]: base LBA plus `of(layout, layer, head)`."""
        offsets: dict[DerivedLayout, list[int]] = {}
        for layout in self.layouts:
            if layout not in offsets:
                offsets[layout] = [of(layout, layer, head) for head in heads]
        return self.base_lba[:, None] + np.array([offsets[layout] for layout in self.layouts], np.int64)

    def of(self, segments: np.ndarray) -> "SparsePlan":
        """Some of its segments: int64, ascending."""
        return SparsePlan(
            self.place[segments],
            self.item[segments],
            self.first_token[segments],
            self.token_start[segments],
            self.token_stop[segments],
            self.base_lba[segments],
            self.dense_pages[segments],
            [self.layouts[segment] for segment in segments.tolist()],
        )


def plan_sparse(tables: AttentionTables, max_unit_pages: int) -> tuple[PagePlan, SparsePlan]:
    """(the plan of tokens to be read densely, that of the others) of a command with tables.sparse."""
    segments = tables.sparse.segments
    item = segments["item"].astype(np.int64)
    first_token = segments["first_group"].astype(np.int64) * tables.group_tokens
    stop_token = first_token + segments["num_groups"].astype(np.int64) * tables.group_tokens
    item_start, item_stop = visible_tokens(tables)
    start, stop = np.maximum(first_token, item_start[item]), np.minimum(stop_token, item_stop[item])
    dense_pages = np.where(start < stop, 2 * (_page_of(tables, stop - 1) - _page_of(tables, start) + 1), 0)
    index_pages = np.array([_index_pages_read(tables, layout) for layout in tables.sparse.layout_of], np.int64)
    used = np.flatnonzero(dense_pages > index_pages)
    plan = SparsePlan(
        place=used,
        item=item[used],
        first_token=first_token[used],
        token_start=start[used],
        token_stop=stop[used],
        base_lba=segments["base_lba"].astype(np.int64)[used],
        dense_pages=dense_pages[used],
        layouts=[tables.sparse.layout_of[place] for place in used.tolist()],
    )
    ranges = np.array(_gaps(plan, item_start.tolist(), item_stop.tolist()), np.int64).reshape(-1, 3)
    return plan_tokens(tables, *np.ascontiguousarray(ranges.T), max_unit_pages), plan


def _index_pages_read(tables: AttentionTables, layout: DerivedLayout) -> int:
    """Of one head: all of a sketch, a few channels of channel-major keys."""
    if tables.sparse.method == SparseMethod.SKETCH:
        return layout.index_pages
    num_rows = tables.query_shape[1] * tables.group_size
    return min(tables.head_dim, tables.sparse.channels * num_rows) * pages_per_channel(layout) + 1


def _page_of(tables: AttentionTables, token: np.ndarray) -> np.ndarray:
    """A number for the page of one head's K that holds a token, such that neighbours are one apart."""
    group, place = token // tables.group_tokens, token % tables.group_tokens
    return group * tables.pages_per_head + place // tables.tokens_per_page


def _gaps(plan: SparsePlan, item_start: list[int], item_stop: list[int]) -> list[tuple[int, int, int]]:
    """(item, first token, stop token) of all that queries see and no segment of the plan has."""
    gaps = []
    begin = list(item_start)
    for item, start, stop in zip(
        plan.item.tolist(), plan.token_start.tolist(), plan.token_stop.tolist(), strict=True
    ):
        if begin[item] < start:
            gaps.append((item, begin[item], start))
        begin[item] = stop
    gaps.extend((item, begin[item], stop) for item, stop in enumerate(item_stop) if begin[item] < stop)
    return sorted(gaps)


def rounds(
    plan: SparsePlan, num_heads: int, max_pages: int, segment_bytes: np.ndarray, max_bytes: int
) -> Iterator[tuple[int, int, range]]:
    """(first segment, stop segment, heads) of what is chosen from together and then read, one after another.

    segment_bytes: int64 [num_segments], of memory that one head of a segment takes

    As many whole items as have max_pages index pages and take max_bytes. An item that has more comes in several
    rounds, of some of its heads each; one head that has more, in runs of its segments.
    """
    pages_before, bytes_before = (
        np.concatenate([[0], np.cumsum(count)]).tolist() for count in (plan.index_pages, segment_bytes)
    )

    def heads_that_fit(first: int, stop: int) -> int:
        pages, size = pages_before[stop] - pages_before[first], bytes_before[stop] - bytes_before[first]
        return min(max_pages // pages, max_bytes // size)

    every_head = range(num_heads)
    bounds = [*np.flatnonzero(np.diff(plan.item, prepend=-1)).tolist(), len(plan)]
    first = 0
    for start, stop in pairwise(bounds):
        if heads_that_fit(first, stop) >= num_heads:
            continue
        if first < start:
            yield first, start, every_head
        first = start
        fitting = heads_that_fit(start, stop)
        if fitting >= num_heads:
            continue
        first = stop
        if fitting:
            for head in range(0, num_heads, fitting):
                yield start, stop, every_head[head : head + fitting]
            continue
        for head in every_head:
            begin = start
            while begin < stop:
                end = begin + 1
                while end < stop and heads_that_fit(begin, end + 1):
                    end += 1
                yield begin, end, every_head[head : head + 1]
                begin = end
    if first < len(plan):
        yield first, len(plan), every_head
