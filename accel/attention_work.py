"""What a command has to do: its descriptor checked, its pages planned.

Decoding asks for the same tokens in one layer after the other, and often for one token after the other. So the
newest descriptors are kept with their plans, and known again by their bytes but for layer and queries.
"""

import threading
from dataclasses import dataclass

import numpy as np

from accel.descriptor import AttentionTables, check_tables, read_queries, split
from accel.page_plan import PagePlan, plan_pages
from accel.workers import AttentionBatch
from spdk_glue.status import CommandFailed, Status

MAX_KEPT = 4  # models, sliding windows, sequences decoded in turn
MAX_KEPT_BYTES = 4 << 20  # each; for longer ones planning is nothing beside computing


@dataclass(frozen=True)
class AttentionWork:
    """A checked descriptor. The plan is of layer 0.

    queries: float32 [num_items, num_queries, num_query_heads, head_dim]
    idle: what commands over this plan have used, for the next: it goes when the plan goes
    """

    tables: AttentionTables
    plan: PagePlan
    layer: int
    queries: np.ndarray
    idle: list


def attention_batch(work: AttentionWork, addresses: np.ndarray) -> AttentionBatch:
    """addresses: uint64 [2, num_pages] of the plan's pages of K and of V, filled before it is computed."""
    tables, plan = work.tables, work.plan
    return AttentionBatch(
        dtype=tables.dtype_name,
        head_dim=tables.head_dim,
        group_size=tables.group_size,
        key_pages=addresses[0],
        value_pages=addresses[1],
        page_first_token=plan.page_first_token,
        page_num_tokens=plan.page_num_tokens,
        unit_first_page=plan.unit_first_page,
        unit_item=plan.unit_item,
        unit_kv_head=plan.unit_kv_head,
        queries=work.queries,
        visible_start=tables.visible_start,
        visible_stop=tables.visible_stop,
        scale=tables.scale,
        softcap=tables.softcap,
        alibi_slopes=tables.alibi_slopes,
        query_position=tables.query_position,
        scales_offset=tables.scales_offset,
    )


class DescriptorReader:
    """Of one drive; see plan_pages for max_unit_pages. Safe to use from several threads."""

    def __init__(self, page_size: int, num_lbas: int, max_unit_pages: int):
        self._page_size = page_size
        self._num_lbas = num_lbas
        self._max_unit_pages = max_unit_pages
        self._lock = threading.Lock()
        self._kept: dict[bytes, tuple[AttentionTables, PagePlan, list]] = {}  # the newest last

    def read(self, data: np.ndarray) -> AttentionWork:
        """Raises CommandFailed(INVALID_DESCRIPTOR) naming the field at fault."""
        key, layer, raw_queries = split(data)
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is not None:
                self._kept[key] = kept
        tables, plan, idle = kept or self._plan(key)
        if layer >= tables.num_layers:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="layer")
        return AttentionWork(tables, plan, layer, read_queries(tables, raw_queries), idle)

    def _plan(self, key: bytes) -> tuple[AttentionTables, PagePlan, list]:
        tables = check_tables(key, self._page_size, self._num_lbas)
        plan = plan_pages(tables, self._max_unit_pages)
        planned = tables, plan, []
        if len(key) + plan.nbytes <= MAX_KEPT_BYTES:
            with self._lock:
                self._kept[key] = planned
                while len(self._kept) > MAX_KEPT:
                    del self._kept[next(iter(self._kept))]
        return planned
