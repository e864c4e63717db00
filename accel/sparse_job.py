"""What all sparse attention commands have in common: dense units for tokens without derived data, rounds over
those that have it, and token-major pages after all where derived data is damaged or does not do.

A command that is not small runs as a program on a thread of `commands`, which starts stages and waits for them.
While one round is chosen from, the next one's index pages and the pages that the last one chose are read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from accel.attention_job import DenseStage
from accel.attention_work import AttentionWork
from accel.merge import merge_states, merge_units, merge_units_into
from accel.page_job import Engine, PageJob, Span, Stage, Stopped
from accel.page_plan import PagePlan, plan_tokens, runs, units_of_plan
from accel.sparse_plan import SparsePlan, rounds
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.request_id import carried

SPARSE_INLINE_BYTES = 1 << 20  # index and dense pages; below this the submitting thread computes
ROUND_BYTES = 64 << 20  # of partial results
SPARSE_WINDOW_BYTES = 2 << 20  # a page has more work than a token-major one, and there are fewer


class SparseJob(PageJob):
    """A subclass reads one method's derived data, in rounds.

    page_counts: of the answer's header, by field
    """

    spans_pinned = 4  # of three rounds

    def __init__(self, engine: Engine, work: AttentionWork, ended: Callable[[], None]):
        super().__init__(engine, ended)
        self.work = work
        self.page_counts = dict.fromkeys(
            ("pages_from_flash", "pages_from_cache", "index_pages", "chosen_pages", "dense_pages"), 0
        )
        self._damaged: set[int] = set()  # places in the descriptor's table
        # by KV head, then by place: segments whose tokens are read from their own pages, in the end
        self._dense_later: dict[int, dict[int, SparsePlan]] = defaultdict(dict)
        self._is_small = False

    # the steps of a round; each takes what the one before has returned, unless that is None

    def _begin(self, plan: SparsePlan, heads: range):
        """Start the stage over its index pages."""
        raise NotImplementedError

    def _choose(self, begun):
        """Wait for that, choose, and start the stage over what is chosen."""
        raise NotImplementedError

    def _complete(self, chosen) -> None:
        """Wait for that, and add the round's result to `out` and `lse`."""
        raise NotImplementedError

    def _before_rounds(self) -> None:
        """Called once it is clear that there are rounds to be worked through."""

    def _behind_rounds(self) -> None:
        """Called once the last one has begun: nothing is left to be asked for before something is chosen."""

    def _segment_bytes(self) -> np.ndarray:
        """int64, of each segment: what a round keeps in memory for one of its heads."""
        raise NotImplementedError

    # the program

    def start(self) -> None:
        with self._stop_on_error("planning"):
            self._guard.enter_context(self._engine.ftl.read_guard())
            sparse, heads = self.work.sparse, self.work.tables.num_kv_heads
            num_pages = int(sparse.index_pages.sum()) * heads + self.work.plan.lbas.size
            self._is_small = num_pages * self._engine.ftl.page_size <= SPARSE_INLINE_BYTES
            if not self._is_small:
                self._engine.commands.submit(carried(self._go_on))
                return
            self._work_through()
        self._end_part()

    def _go_on(self) -> None:
        with self._stop_on_error("planning"):
            self._work_through()
        self._end_part()

    def _work_through(self) -> None:
        if self.work.whole is not None and self._answer_from_cache(self.work.whole):
            return
        dense: DenseStage | None = self._start(DenseStage(self._engine, self.work, self.work.plan))
        self._before_rounds()
        begun = chosen = None
        parts = list(self._rounds())
        for number, part in enumerate([*parts, None, None]):
            ahead = None if part is None else self._begin(*part)
            if number + 1 == len(parts):
                self._behind_rounds()
            if dense is not None:
                self._take_dense(dense)
                dense = None
            following = None if begun is None else self._choose(begun)
            if chosen is not None:
                self._complete(chosen)
            begun, chosen = ahead, following
        self._read_densely()

    def _rounds(self) -> Iterator[tuple[SparsePlan, range]]:
        sparse = self.work.sparse
        limits = self._engine.span_pages(self.spans_pinned), self._segment_bytes(), ROUND_BYTES
        for first, stop, heads in rounds(sparse, self.work.tables.num_kv_heads, *limits):
            yield sparse.of(np.arange(first, stop)), heads

    def _answer_from_cache(self, plan: PagePlan) -> bool:
        """All tokens by their own pages, if all of these are in the cache: exact, and faster than sketches."""
        stage = DenseStage(self._engine, self.work, plan)
        span = self._span_of_all(stage)
        if span is None:
            return False
        self._run_spans(stage, [span])
        self._take_dense(stage)
        return True

    def _start(self, stage: Stage):
        """Have a stage's units read and computed; returns it. Raises Stopped."""
        self._run_spans(stage, self._spans(stage))
        return stage

    def _run_spans(self, stage: Stage, spans: Iterable[Span]) -> None:
        """The stage's. Raises Stopped."""
        for span in spans:
            if self._is_small:
                self._run_here(span)
            else:
                self._run(span)
            if self._stopped:
                raise Stopped
        if self._is_small:
            stage.done.set()

    def _wait(self, stage: Stage) -> None:
        """Raises Stopped."""
        stage.done.wait()
        if self._stopped:
            raise Stopped

    def _count(self, stage: Stage, **pages: int) -> None:
        """A stage's pages, and what they are."""
        self.page_counts["pages_from_flash"] += stage.pages_from_flash
        self.page_counts["pages_from_cache"] += stage.pages_from_cache
        for name, count in pages.items():
            self.page_counts[name] += count

    def _mapped(self, plan: SparsePlan, heads: range) -> SparsePlan:
        """Without segments whose index pages are not all there."""
        num_heads = len(heads)
        count = np.repeat(plan.index_pages, num_heads)
        lbas = runs(plan.lbas(self.work.layer, heads, DerivedLayout.index_lba).reshape(-1), count)
        absent = self._engine.ftl.resolve(lbas) < 0
        if not absent.any():
            return plan
        gone = np.zeros(len(plan), bool)
        gone[np.repeat(np.arange(len(count)) // num_heads, count)[absent]] = True
        self._note_damage(plan.of(np.flatnonzero(gone)), heads, "pages never written")
        return plan.of(np.flatnonzero(~gone))

    # dense parts

    def _take_dense(self, stage: DenseStage) -> None:
        """The command's dense units are the first part of its result."""
        tables = self.work.tables
        self._wait(stage)
        self._count(stage, dense_pages=stage.num_pages)
        self.out, self.lse = (
            np.empty(tables.query_shape, np.float32),
            np.empty(tables.query_shape[:3], np.float32),
        )
        merge_units_into(
            stage.out, stage.lse, stage.plan.unit_item, stage.plan.unit_kv_head, self.out, self.lse
        )

    def _leave_to_dense(self, plan: SparsePlan, heads: range) -> None:
        """Have these segments' tokens read from their own pages, once whoever asks for it."""
        for segment, place in enumerate(plan.place.tolist()):
            alone = plan.of(np.array([segment]))
            for head in heads:
                self._dense_later[head][place] = alone

    def _note_damage(self, plan: SparsePlan, heads: range, why: str) -> None:
        for place, base_lba in zip(plan.place.tolist(), plan.base_lba.tolist(), strict=True):
            self._damaged.add(place)
            self._engine.damage.note(base_lba, why)
        self._leave_to_dense(plan, heads)

    def _read_densely(self) -> None:
        stages = []
        for head, segments in self._dense_later.items():
            plans = [segments[place] for place in sorted(segments)]
            item, start, stop = (
                np.concatenate([getattr(plan, name) for plan in plans])
                for name in ("item", "token_start", "token_stop")
            )
            max_pages = self._engine.scattered_span_pages()
            plan = plan_tokens(self.work.tables, item, start, stop, max_pages)
            plan = units_of_plan(plan, np.flatnonzero(plan.unit_kv_head == head))
            stages.append(self._start(DenseStage(self._engine, self.work, plan)))
        for stage in stages:
            self._wait(stage)
            self._count(stage, dense_pages=stage.num_pages)
            self._add(stage.out, stage.lse, stage.plan.unit_item, stage.plan.unit_kv_head)

    def _add(self, out: np.ndarray, lse: np.ndarray, item: np.ndarray, kv_head: np.ndarray, turn=None) -> None:
        """Merge partial results of units into the command's; see merge_units. turn: undoes a rotation."""
        if not len(item):
            return
        first_item, first_head = int(item.min()), int(kv_head.min())
        stop_item, stop_head = int(item.max()) + 1, int(kv_head.max()) + 1
        counts = stop_item - first_item, stop_head - first_head
        merged, merged_lse = merge_units(out, lse, item - first_item, kv_head - first_head, *counts)
        if turn is not None:
            merged = turn(merged)
        group = self.work.tables.group_size
        place = slice(first_item, stop_item), slice(None), slice(first_head * group, stop_head * group)
        self.out[place], self.lse[place] = merge_states(self.out[place], self.lse[place], merged, merged_lse)

    def _merge(self) -> None:
        if self._damaged:
            self.page_counts["damaged_segments"] = len(self._damaged)
            self.page_counts["first_damaged"] = min(self._damaged)
