"""What a command has to do: its descriptor checked, its pages planned.

Decoding asks for the same tokens in one layer after the other, and often for one token after the other. So the
newest descriptors are kept with their plans, and known again by their bytes but for layer and queries.
"""

import threading
from typing import NamedTuple

import numpy as np

from accel.descriptor import AttentionTables, check_tables, read_queries, split
from accel.page_plan import PagePlan, plan_pages
from accel.sparse_plan import SparsePlan, plan_sparse
from accel.workers import AttentionBatch, WorkerCounts
from spdk_glue.status import CommandFailed, Status

MAX_KEPT = 4  # models, sliding windows, sequences decoded in turn
MAX_KEPT_BYTES = 4 << 20  # each; for longer ones planning is nothing beside computing


class AttentionWork(NamedTuple):
    """A checked descriptor. The plan is of layer 0.

    plan: of all tokens that queries see; of a sparse command, of those without derived data
    sparse: of a sparse command, those with derived data
    whole: of all tokens, of a sparse command that is dense where their pages are in the cache
    queries: float32 [num_items, num_queries, num_query_heads, head_dim]
    idle: what commands over this plan have used, for the next: it goes when the plan goes
    """

    tables: AttentionTables
    plan: PagePlan
    sparse: SparsePlan | None
    whole: PagePlan | None
    layer: int
    queries: np.ndarray
    idle: list


# what is kept of a descriptor: AttentionWork's first four, and its last
Planned = tuple[AttentionTables, PagePlan, SparsePlan | None, PagePlan | None, list]


def attention_batch(
    work: AttentionWork, plan: PagePlan, addresses: np.ndarray, counts: WorkerCounts
) -> AttentionBatch:
    """Of a dense command, or a part of a sparse one. addresses: see PagePlan.batch"""
    tables = work.tables
    return plan.batch(
        addresses,
        dtype=tables.dtype_name,
        head_dim=tables.head_dim,
        group_size=tables.group_size,
        queries=work.queries,
        visible_start=tables.visible_start,
        visible_stop=tables.visible_stop,
        scale=tables.scale,
        softcap=tables.softcap,
        alibi_slopes=tables.alibi_slopes,
        query_position=tables.query_position,
        scales_offset=tables.scales_offset,
        counts=counts,
    )


class DescriptorReader:
    """Of one drive; see plan_pages for max_unit_pages. Safe to use from several threads."""

    def __init__(self, page_size: int, num_lbas: int, max_unit_pages: int):
        self._page_size = page_size
        self._num_lbas = num_lbas
        self._max_unit_pages = max_unit_pages
        self._lock = threading.Lock()
        self._kept: dict[bytes, Planned] = {}  # the newest last

    def read(self, data: np.ndarray) -> AttentionWork:
        """Raises CommandFailed(INVALID_DESCRIPTOR) naming the field at fault."""
        key, layer, raw_queries = split(data)
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is not None:
                self._kept[key] = kept
        tables, plan, sparse, whole, idle = kept or self._plan(key)
        if layer >= tables.num_layers:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="layer")
        return AttentionWork(tables, plan, sparse, whole, layer, read_queries(tables, raw_queries), idle)

    def _plan(self, key: bytes) -> Planned:
        tables = check_tables(key, self._page_size, self._num_lbas)
        sparse = whole = None
        if tables.sparse is None:
            plan = plan_pages(tables, self._max_unit_pages)
        else:
            plan, sparse = plan_sparse(tables, self._max_unit_pages)
            if tables.sparse.exact_if_cached:
                whole = plan_pages(tables, self._max_unit_pages)
        planned = tables, plan, sparse, whole, []
        if len(key) + plan.nbytes + (whole.nbytes if whole else 0) <= MAX_KEPT_BYTES:
            with self._lock:
                self._kept[key] = planned
                while len(self._kept) > MAX_KEPT:
                    del self._kept[next(iter(self._kept))]
        return planned
