"""One dense attention command at work: all pages that its queries see, computed and merged by lse.

A hand-over between threads costs as much as a megabyte of attention. So what is small runs at once on the
submitting thread, and a command whose pages are all in the cache goes from there straight to the workers.
"""

from collections.abc import Callable, Iterator

import numpy as np

from accel.attention_work import AttentionWork, attention_batch
from accel.merge import merge_units
from accel.page_job import Engine, PageJob, Span, Stage
from accel.page_plan import PagePlan
from accel.workers import BadScales, UnitRange
from spdk_glue.request_id import carried
from spdk_glue.status import CommandFailed, Status

INLINE_BYTES = 4 << 20  # below this a command is computed by the submitting thread


class DenseStage(Stage):
    """Attention over the pages of a plan.

    out: float32 [num_units, num_queries, group_size, head_dim]; lse: float32 [num_units, num_queries,
    group_size]
    """

    def __init__(self, engine: Engine, work: AttentionWork, plan: PagePlan):
        tables = work.tables
        super().__init__(plan.lbas, plan.unit_first_page, work.layer * tables.layer_lbas)
        self.plan = plan
        self._worker = engine.worker
        self._batch = attention_batch(work, plan, self.addresses, engine.counts)
        shape = (plan.num_units, work.queries.shape[1], tables.group_size)
        self.out = np.empty((*shape, tables.head_dim), np.float32)
        self.lse = np.empty(shape, np.float32)

    def compute(self, units: UnitRange) -> None:
        try:
            self._worker.attend_units(self._batch, units, self.out, self.lse)
        except BadScales as error:
            lba = int(self.lbas[int(error.of_values), self._page_of(error.page)]) + self.lba_offset
            detail = "scales of a page"
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=lba, detail=detail) from error

    def _page_of(self, place: int) -> int:
        """The column of a place in the batch."""
        return place


class AttentionJob(PageJob):
    """All that its queries see is read."""

    def __init__(self, engine: Engine, work: AttentionWork, ended: Callable[[], None]):
        super().__init__(engine, ended)
        self.work = work
        self._stage: DenseStage | None = None

    def start(self) -> None:
        with self._stop_on_error("planning"):
            self._guard.enter_context(self._engine.ftl.read_guard())
            stage = self._stage = DenseStage(self._engine, self.work, self.work.plan)
            spans = self._spans(stage)
            if stage.lbas.size * self._engine.ftl.page_size <= INLINE_BYTES:
                for span in spans:
                    self._run_here(span)
            elif (span := next(spans, None)) is not None:
                self._run(span)
                if span.stop_unit < stage.num_units:
                    self._engine.commands.submit(carried(self._go_on), spans)
                    return
        self._end_part()

    def _go_on(self, spans: Iterator[Span]) -> None:
        """The spans after the first, on a thread of `commands`."""
        with self._stop_on_error("planning"):
            for span in spans:
                self._run(span)
                if self._stopped:
                    break
        self._end_part()

    @property
    def page_counts(self) -> dict[str, int]:
        """Of the answer's header, by field."""
        if self._stage is None:
            return {}
        stage = self._stage
        return {"pages_from_flash": stage.pages_from_flash, "pages_from_cache": stage.pages_from_cache}

    def _merge(self) -> None:
        plan, tables = self.work.plan, self.work.tables
        self.out, self.lse = merge_units(
            self._stage.out,
            self._stage.lse,
            plan.unit_item,
            plan.unit_kv_head,
            len(tables.items),
            tables.num_kv_heads,
        )
