"""Attention by sketches: 2-bit codes of all tokens, 4 more bits of units that matter, dense pages of the rest.

A round's first stage reads index pages alone. Then, for each (item, KV head), units are chosen by their share
of the softmax, and computed with their refinement pages. For a compression, the first stage only scores; what
was not chosen is summed up while refinement pages are read. For a target error, it computes all units with the
error that each is expected to have; units are chosen, with stages of their own, until the error that is
expected by what refining has changed so far is small enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from accel.page_job import Span, cut
from accel.read_ahead import Window
from accel.sketch import kernels
from accel.sketch.expected_error import ErrorTarget
from accel.sketch.selection import choose_units, run_of, units_within
from accel.sketch_stages import IndexStage, RefinedStage, ScanStage, SketchStage, SumStage, index_units
from accel.sparse_job import SPARSE_WINDOW_BYTES, SparseJob
from accel.sparse_plan import SparsePlan
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.request_id import carried


def _windows(lbas: np.ndarray, first_page: np.ndarray, max_pages: int) -> Iterator[np.ndarray]:
    """Runs of whole units, as PageJob reads them."""
    first, num_units = 0, len(first_page) - 1
    while first < num_units:
        stop = cut(first_page, first, num_units, max_pages)
        yield lbas[first_page[first] : first_page[stop]]
        first = stop


class SketchJob(SparseJob):
    """What both have in common. A subclass chooses."""

    def _stage(self, plan: SparsePlan, heads: range) -> IndexStage:
        """The first of a round."""
        raise NotImplementedError

    def _begin(self, plan: SparsePlan, heads: range) -> IndexStage | None:
        plan = self._mapped(plan, heads)
        return self._start(self._stage(plan, heads)) if len(plan) else None

    _next_layer: int | None = None  # that is likely to be asked for
    _being_read: Sequence[Window] = ()  # ahead, when this one began

    def _before_rounds(self) -> None:
        ahead = self._engine.read_ahead
        if ahead is not None and not self._is_small:
            self._next_layer, self._being_read = ahead.begin_command(self.work.sparse, self.work.layer)

    def _have_read(self, span: Span, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        """What is being read ahead is waited for, not read twice."""
        if span.buffer is None and isinstance(span.stage, IndexStage):
            lbas = span.lbas[missing]
            for window in self._being_read:
                num_pages = int(np.isin(lbas, window.lbas).sum())
                if num_pages:
                    load = partial(self._load_rest, span, first_unit, stop_unit, missing)
                    self._engine.read_ahead.when_done(window, num_pages, carried(load))
                    return
        super()._have_read(span, first_unit, stop_unit, missing)

    def _load_rest(self, span: Span, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        rest = missing[~self._engine.cache.has(span.pages[missing])]
        self._load_window(span, first_unit, stop_unit, rest)

    def _behind_rounds(self) -> None:
        layer = self._next_layer
        if layer is None or layer >= self.work.tables.num_layers:
            return
        page_size = self._engine.ftl.page_size
        pages_left = self._engine.read_ahead.max_pages
        windows: list[np.ndarray] = []
        for plan, heads in self._rounds():
            lbas, first_page = index_units(plan, heads, layer)
            pages_left -= len(lbas)
            if pages_left < 0:
                break
            windows += _windows(lbas, first_page, SPARSE_WINDOW_BYTES // page_size)
        if windows:
            self._engine.read_ahead.read(self.work.sparse, layer, windows)

    @cached_property
    def _queries(self) -> np.ndarray:
        return kernels.rotate(self.work.queries)

    def _take_index(self, stage: IndexStage) -> None:
        self._wait(stage)
        self._count(stage, index_pages=stage.num_pages)
        self._discard(stage, stage.damaged.reshape(len(stage.plan), -1).any(axis=1), stage.reasons)

    def _take_refined(self, stage: IndexStage, refined: RefinedStage) -> None:
        self._wait(refined)
        # of index pages only those that had to be read again: they were evicted meanwhile
        num_chosen = refined.num_chosen
        self._count(refined, chosen_pages=num_chosen, index_pages=refined.num_pages - num_chosen)
        damaged = np.isin(np.arange(len(stage.plan)), refined.owners[refined.damaged])
        self._discard(stage, damaged, refined.reasons)

    def _discard(self, stage: IndexStage, damaged: np.ndarray, reasons: dict[int, str]) -> None:
        """Leave segments of a round to their token-major pages. damaged: bool [num_segments]"""
        if not damaged.any():
            return
        why = next(iter(reasons.values()), "page checksum")
        self._note_damage(stage.plan.of(np.flatnonzero(damaged)), stage.heads, why)
        stage.discarded |= damaged

    @staticmethod
    def _items(stage: IndexStage) -> list[tuple[int, np.ndarray]]:
        """(item, its segments of the round that are not discarded, int64), of each that has some."""
        plan, found = stage.plan, []
        for first, stop in pairwise([*np.flatnonzero(np.diff(plan.item, prepend=-1)).tolist(), len(plan)]):
            positions = first + np.flatnonzero(~stage.discarded[first:stop])
            if len(positions):
                found.append((int(plan.item[first]), positions))
        return found

    def _refine(self, stage: IndexStage, chosen: np.ndarray) -> RefinedStage | None:
        """chosen: int64, of the stage's units, ascending"""
        batch, heads, plan = stage.batch, stage.heads, stage.plan
        segment = batch.unit_segment(chosen)
        first = plan.lbas(self.work.layer, heads, DerivedLayout.refinement_lba).reshape(-1)
        lbas = first[segment] + chosen - batch.segment_first_unit[segment]
        absent = self._engine.ftl.resolve(lbas) < 0
        if absent.any():
            gone = np.isin(np.arange(len(plan)), segment[absent] // len(heads))
            self._discard(stage, gone, {0: "refinement pages never written"})
            kept = ~gone[segment // len(heads)]
            chosen, lbas = chosen[kept], lbas[kept]
        return self._start(RefinedStage(stage, chosen, lbas)) if len(chosen) else None

    def _add_units(self, stage: IndexStage, units: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
        """units: int64, of the stage, whose results these are; discarded ones are left out"""
        segment = stage.batch.unit_segment(units)
        self._add_segments(stage, segment, out, lse)

    def _add_segments(self, stage: IndexStage, segment: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
        """The same by the segments, of one head each, that they are of."""
        lse[stage.discarded[segment // len(stage.heads)]] = -np.inf
        batch = stage.batch
        self._add(out, lse, batch.segment_item[segment], batch.segment_kv_head[segment], kernels.unrotate)


class BudgetJob(SketchJob):
    """Of a compression."""

    def _segment_bytes(self) -> np.ndarray:
        tables, sparse = self.work.tables, self.work.sparse
        rows = tables.query_shape[1] * tables.group_size
        return rows * (sparse.num_tokens + 16 * sparse.num_units + 4 * (tables.head_dim + 3))

    def _stage(self, plan: SparsePlan, heads: range) -> ScanStage:
        return ScanStage(plan, heads, self.work, self._queries)

    def _choose(self, stage: ScanStage) -> tuple[ScanStage, SumStage, RefinedStage | None]:
        self._take_index(stage)
        parts = [self._choose_within(stage, positions, item) for item, positions in self._items(stage)]
        chosen = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        # flash first: it would wait for a thread that workers leave little
        refined = self._refine(stage, chosen) if len(chosen) else None
        return stage, self._start(SumStage(stage, chosen)), refined

    def _choose_within(self, stage: ScanStage, positions: np.ndarray, item: int) -> np.ndarray:
        """int64: of one item's segments, the units of the largest shares, so many for each head."""
        plan, num_heads, group = stage.plan, len(stage.heads), self.work.tables.group_size
        totals = (int(of[positions].sum()) for of in (plan.dense_pages, plan.index_pages, plan.num_units))
        num_chosen = units_within(self.work.tables.sparse.compression, *totals)
        segments = positions * num_heads + np.arange(num_heads)[:, None]
        units = stage.units_of(segments.reshape(-1)).reshape(num_heads, -1)
        lse = stage.lse[units].reshape(*units.shape, -1)
        heads = slice(stage.heads.start * group, stage.heads.stop * group)
        other_lse = self.lse[item, :, heads].reshape(-1, num_heads, group).swapaxes(0, 1).reshape(num_heads, -1)
        best = choose_units(lse, num_chosen, other_lse, run_of(plan.layouts[0].unit_tokens))
        is_seen = ~np.isneginf(np.take_along_axis(lse, best[..., None], axis=1)).all(axis=2)
        return np.take_along_axis(units, best, axis=1)[is_seen]

    def _complete(self, chosen: tuple[ScanStage, SumStage, RefinedStage | None]) -> None:
        stage, summed, refined = chosen
        self._wait(summed)
        self._count(summed, index_pages=summed.num_pages)
        self._discard(stage, summed.damaged.reshape(len(stage.plan), -1).any(axis=1), {})
        if refined is not None:
            self._take_refined(stage, refined)
            self._add_units(stage, refined.chosen, refined.out, refined.lse)
        self._add_segments(stage, np.arange(stage.batch.num_segments), summed.out, summed.lse)


@dataclass
class OpenTarget:
    """An (item, KV head) of a round that is to meet a target error.

    segments: int64, of the round's plan; units: int64, ascending, of the stage; chosen: int64, places among
    units of those that are being refined
    """

    head: int
    segments: np.ndarray
    units: np.ndarray
    target: ErrorTarget
    chosen: np.ndarray


class ErrorJob(SketchJob):
    """Of a target error."""

    def _segment_bytes(self) -> np.ndarray:
        tables = self.work.tables
        rows = tables.query_shape[1] * tables.group_size
        # as sketched, as refined, and the results
        return self.work.sparse.num_units * (rows * (tables.head_dim + 3) * 4 * 3)

    def _stage(self, plan: SparsePlan, heads: range) -> SketchStage:
        return SketchStage(plan, heads, self.work, self._queries)

    def _choose(self, stage: SketchStage) -> tuple[SketchStage, list[OpenTarget], RefinedStage | None]:
        self._take_index(stage)
        targets = self._targets(stage)
        return stage, targets, self._refine_for(stage, targets)

    def _complete(self, chosen: tuple[SketchStage, list[OpenTarget], RefinedStage | None]) -> None:
        stage, targets, refined = chosen
        while targets:
            if refined is not None:
                self._take_refined(stage, refined)
            targets = self._still_open(stage, targets)
            refined = self._refine_for(stage, targets)
        self._add_units(stage, np.arange(stage.batch.num_units), stage.out, stage.lse)

    def _targets(self, stage: SketchStage) -> list[OpenTarget]:
        """Those that are not left to dense pages at once."""
        group, target_error = self.work.tables.group_size, self.work.tables.sparse.target_error
        found = []
        for item, positions in self._items(stage):
            for number, head in enumerate(stage.heads):
                units = stage.units_of(positions * len(stage.heads) + number)
                others = slice(head * group, (head + 1) * group)
                lse = stage.lse[units].reshape(len(units), -1)
                target = ErrorTarget(
                    stage.out[units].reshape(*lse.shape, -1),
                    lse,
                    stage.noise[units].reshape(*lse.shape, 2),
                    target_error,
                    kernels.rotate(self.out[item, :, others].reshape(-1, self.out.shape[-1])),
                    self.lse[item, :, others].reshape(-1),
                )
                found.append(OpenTarget(head, positions, units, target, np.empty(0, np.int64)))
        return self._chosen_for(stage, found)

    def _chosen_for(self, stage: SketchStage, targets: list[OpenTarget]) -> list[OpenTarget]:
        """Those that need more units refined, chosen; what cannot meet its target is left to dense pages."""
        found = []
        for each in targets:
            chosen = each.target.choose()
            if chosen is None:
                self._make_dense(stage, each)
            elif len(chosen):
                each.chosen = chosen
                found.append(each)
        return found

    def _still_open(self, stage: SketchStage, targets: list[OpenTarget]) -> list[OpenTarget]:
        """The same once the chosen units are refined."""
        whole = []
        for each in targets:
            if stage.discarded[each.segments].any():  # what was learnt is of other tokens
                self._make_dense(stage, each)
                continue
            units = each.units[each.chosen]
            lse = stage.lse[units].reshape(len(units), -1)
            each.target.take(each.chosen, stage.out[units].reshape(*lse.shape, -1), lse)
            whole.append(each)
        return self._chosen_for(stage, whole)

    def _make_dense(self, stage: SketchStage, target: OpenTarget) -> None:
        self._leave_to_dense(stage.plan.of(target.segments), range(target.head, target.head + 1))
        stage.lse[target.units] = -np.inf

    def _refine_for(self, stage: SketchStage, targets: list[OpenTarget]) -> RefinedStage | None:
        chosen = [each.units[each.chosen] for each in targets]
        return self._refine(stage, np.sort(np.concatenate(chosen))) if chosen else None


def sketch_job(engine, work, ended) -> SketchJob:
    """SparseMethod.SKETCH."""
    kind = BudgetJob if work.tables.sparse.compression else ErrorJob
    return kind(engine, work, ended)
