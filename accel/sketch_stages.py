"""What attention by sketches reads and computes at once: index pages alone, or chosen units with theirs.

Refinement pages are read in physical order. Whoever needs index pages a second time pins them once more: a
command that holds pins while it waits for others' could wait in a circle.
"""

from dataclasses import replace
from itertools import islice

import numpy as np

from accel.attention_work import AttentionWork
from accel.page_job import WINDOW_BYTES, Stage
from accel.page_plan import runs
from accel.sketch import DamagedSketch, SketchBatch, kernels, scan
from accel.sparse_job import SPARSE_WINDOW_BYTES
from accel.sparse_plan import SparsePlan
from accel.workers import UnitRange
from spdk_glue.derived_layout import DerivedLayout

UNITS_AT_ONCE = 8  # of a refined stage: a call costs as much as some of them


def index_units(plan: SparsePlan, heads: range, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(LBAs of the index pages of all [segment][head]; where each of these begins, and the end): int64."""
    count = np.repeat(plan.index_pages, len(heads))
    lbas = runs(plan.lbas(layer, heads, DerivedLayout.index_lba).reshape(-1), count)
    return lbas, np.concatenate([[0], np.cumsum(count)])


class IndexStage(Stage):
    """What reads index pages alone. A stage unit is a segment of one KV head: [segment][head] of a round."""

    has_priority = True

    def __init__(self, plan: SparsePlan, heads: range, work: AttentionWork, queries: np.ndarray):
        tables = work.tables
        num_heads = len(heads)
        self.plan, self.heads = plan, heads
        lbas, first_page = index_units(plan, heads, work.layer)
        damaged = np.zeros(len(first_page) - 1, bool)
        super().__init__(lbas[None], first_page, damaged=damaged, window_bytes=SPARSE_WINDOW_BYTES)
        self.reasons: dict[int, str] = {}
        self.discarded = np.zeros(len(plan), bool)  # segments of the round that are read densely instead
        self.batch = SketchBatch(
            page_size=plan.layouts[0].page_size,
            head_dim=tables.head_dim,
            group_size=tables.group_size,
            index_pages=self.addresses[0],
            segment_first_page=first_page,
            segment_first_unit=np.concatenate([[0], np.cumsum(np.repeat(plan.num_units, num_heads))]),
            segment_num_tokens=np.repeat(plan.num_tokens, num_heads),
            segment_first_token=np.repeat(plan.first_token, num_heads),
            segment_item=np.repeat(plan.item, num_heads).astype(np.int32),
            segment_kv_head=np.tile(np.arange(heads.start, heads.stop, dtype=np.int32), len(plan)),
            queries=queries,
            visible_start=tables.visible_start,
            visible_stop=tables.visible_stop,
            scale=tables.scale,
            softcap=tables.softcap,
            alibi_slopes=tables.alibi_slopes,
            query_position=tables.query_position,
        )

    def attend(self, units: UnitRange) -> None:
        """Raises DamagedSketch."""
        raise NotImplementedError

    def compute(self, units: UnitRange) -> None:
        while True:
            try:
                return self.attend(units)
            except DamagedSketch as damage:  # the others are still to be done
                self.reasons[damage.segment] = damage.reason
                self.damaged[damage.segment] = True

    def units_of(self, segments: np.ndarray) -> np.ndarray:
        """int64: of stage units, ascending, their sketch units."""
        first = self.batch.segment_first_unit[segments]
        return runs(first, self.batch.segment_first_unit[segments + 1] - first)


class SketchStage(IndexStage):
    """Units by their sketches: `results` of all, see accel.sketch.kernels.

    out: float32 [num_units, num_queries, group_size, head_dim], rotated; lse: [num_units, num_queries,
    group_size]; noise: [num_units, num_queries, group_size, 2]
    """

    def __init__(self, plan: SparsePlan, heads: range, work: AttentionWork, queries: np.ndarray):
        super().__init__(plan, heads, work, queries)
        shape = (self.batch.num_units, queries.shape[1], self.batch.group_size)
        self.out = np.empty((*shape, self.batch.head_dim), np.float32)
        self.lse = np.empty(shape, np.float32)
        self.noise = np.empty((*shape, 2), np.float32)

    def attend(self, units: UnitRange) -> None:
        kernels.sketch_units(self.batch, units, self.out, self.lse, self.noise)


class ScanStage(IndexStage):
    """The first pass over sketches: what units weigh. See accel.sketch.scan."""

    def __init__(self, plan: SparsePlan, heads: range, work: AttentionWork, queries: np.ndarray):
        super().__init__(plan, heads, work, queries)
        self.scan = scan.Scan.of(self.batch)
        self._rounded = scan.RoundedQueries.of(self.batch)

    @property
    def lse(self) -> np.ndarray:
        return self.scan.lse

    def attend(self, units: UnitRange) -> None:
        scan.score_units(self.batch, self._rounded, units, self.scan)


class SumStage(Stage):
    """The second pass: what units that are not refined add up to, a result for each segment and head.

    out: float32 [num_segments, num_queries, group_size, head_dim], rotated; lse: [num_segments, num_queries,
    group_size]
    """

    has_priority = True

    def __init__(self, scanned: ScanStage, chosen: np.ndarray):
        """chosen: int64, units that are refined."""
        super().__init__(
            scanned.lbas,
            scanned.unit_first_page,
            damaged=np.zeros(scanned.num_units, bool),
            counted=np.ones(scanned.lbas.shape[1], bool),
            window_bytes=SPARSE_WINDOW_BYTES,
        )
        self._scan = scanned.scan
        self.batch = replace(scanned.batch, index_pages=self.addresses[0])
        self._refined = np.zeros(self.batch.num_units, bool)
        self._refined[chosen] = True
        shape = (self.num_units, self.batch.queries.shape[1], self.batch.group_size)
        self.out = np.empty((*shape, self.batch.head_dim), np.float32)
        self.lse = np.empty(shape, np.float32)

    def compute(self, units: UnitRange) -> None:
        scan.sum_units(self.batch, units, self._scan, self._refined, self.out, self.lse)


class RefinedStage(Stage):
    """Chosen units, with their refinement pages. A stage unit is a segment of all heads of the round.

    sketched: the stage that they were chosen from; chosen: int64 [num_chosen], its units, ascending
    out, lse: as of SketchStage, of all units or of the chosen ones alone
    """

    def __init__(self, sketched: IndexStage, chosen: np.ndarray, refinement_lbas: np.ndarray):
        batch, num_heads = sketched.batch, len(sketched.heads)
        of_chosen = batch.unit_segment(chosen)
        segments = np.unique(of_chosen)  # of the batch, so of one head
        index_first = batch.segment_first_page[segments]
        index_count = batch.segment_first_page[segments + 1] - index_first
        index = runs(index_first, index_count)
        # columns: index pages with their place in the batch, refinement pages with their place among the chosen
        owner = np.concatenate([np.repeat(segments, index_count), of_chosen]) // num_heads
        order = np.argsort(owner, kind="stable")
        self.owners, first_column = np.unique(owner[order], return_index=True)
        is_index = (np.arange(len(owner)) < len(index))[order]
        self._place = np.concatenate([index, np.arange(len(chosen))])[order]
        self._is_index = is_index
        super().__init__(
            np.concatenate([sketched.lbas[0][index], refinement_lbas])[order][None],
            np.append(first_column, len(owner)),
            damaged=np.zeros(len(self.owners), bool),
            counted=is_index,
            window_bytes=WINDOW_BYTES,
        )
        self.sketched = sketched
        self.reasons: dict[int, str] = {}
        self.chosen = chosen
        self._first_place = np.append(
            np.searchsorted(of_chosen // num_heads, self.owners), len(chosen)
        ).tolist()
        self._batch = replace(batch, index_pages=np.zeros_like(batch.index_pages))
        self._pages = np.zeros(len(chosen), np.uint64)
        if isinstance(sketched, SketchStage):
            self.out, self.lse, self._results = sketched.out, sketched.lse, chosen
        else:
            shape = (len(chosen), batch.queries.shape[1], batch.group_size)
            self.out = np.empty((*shape, batch.head_dim), np.float32)
            self.lse = np.empty(shape, np.float32)
            self._results = np.arange(len(chosen))

    @property
    def num_chosen(self) -> int:
        return len(self.chosen)

    def addressed(self, first_column: int, stop_column: int) -> None:
        columns = slice(first_column, stop_column)
        addresses, place, is_index = self.addresses[0, columns], self._place[columns], self._is_index[columns]
        self._batch.index_pages[place[is_index]] = addresses[is_index]
        self._pages[place[~is_index]] = addresses[~is_index]

    def compute(self, units: UnitRange) -> None:
        while taken := list(islice(units, UNITS_AT_ONCE)):
            self._refine(np.concatenate([np.arange(*self._first_place[unit : unit + 2]) for unit in taken]))

    def _refine(self, places: np.ndarray) -> None:
        chosen, pages = self.chosen[places], self._pages[places]
        left = UnitRange(0, len(places))
        while True:
            try:
                return kernels.refined_units(
                    self._batch, left, chosen, pages, self.out, self.lse, results=self._results[places]
                )
            except DamagedSketch as damage:  # the others are still to be done
                unit = int(np.searchsorted(self.owners, damage.segment // len(self.sketched.heads)))
                self.reasons[unit] = damage.reason
                self.damaged[unit] = True
