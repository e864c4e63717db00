"""One attention command at work: its pages pinned, read where they are missing, computed, merged.

Pages are pinned in the DRAM cache in spans, short ones where pages are scattered over its lines. What of a
span is missing there is read in windows of a few megabytes: reader threads bring one window into the cache
while worker threads compute the previous ones; neither holds the GIL in its heavy part. Partial results of
all units are merged by lse at the end.

A hand-over between threads costs as much as a megabyte of attention. So what is small runs at once on the
submitting thread, and a command whose pages are all in the cache goes from there straight to the workers.

While a job runs it holds an FTL read guard, so nothing it resolved can be erased under it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from accel.attention_work import AttentionWork, attention_batch
from accel.merge import merge_units
from accel.page_cache import PageCache
from accel.worker_pool import WorkerPool
from accel.workers import BadScales, UnitRange
from ftl.errors import CorruptPage, FlashError
from spdk_glue import dma
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)

# Pinned at once, if the cache has them: what planning costs is paid before computing starts.
SPAN_BYTES = 64 << 20
SPANS_PINNED = 2  # by one command; a third of the cache is left to others, unless pages are scattered
WINDOW_BYTES = 8 << 20  # read at once: some milliseconds of flash, long against a thread hand-over
INLINE_BYTES = 4 << 20  # below this a command is computed by the submitting thread


@dataclass(frozen=True)
class Engine:
    """What all jobs share. commands: threads that plan what is not in the cache; readers: that read it."""

    ftl: object
    cache: PageCache
    worker: object
    commands: Executor
    readers: Executor
    workers: WorkerPool

    @property
    def span_pages(self) -> int:
        """Pages of K and V that one span holds at most."""
        largest = self.cache.capacity_bytes // (SPANS_PINNED + 1)
        return max(1, min(SPAN_BYTES, largest) // self.ftl.page_size)

    @property
    def resident_pages(self) -> int:
        """Pages that a command may pin at once if all are in the cache."""
        return self.cache.capacity_bytes // (SPANS_PINNED + 1) // self.ftl.page_size

    @property
    def span_lines(self) -> int:
        """Cache lines that one span pins at most. More than span_pages fill: runs of pages end within lines."""
        return max(1, self.cache.num_lines // SPANS_PINNED)

    @property
    def scattered_span_pages(self) -> int:
        """As span_pages, where every page may lie in a line of its own. It also bounds units."""
        return max(1, self.cache.num_lines // (SPANS_PINNED + 1))


@dataclass
class Span:
    """Units [first_unit, stop_unit) of a plan with the physical pages of their K, then of their V."""

    first_unit: int
    stop_unit: int
    pages: np.ndarray
    lbas: np.ndarray
    addresses: np.ndarray  # in the cache, or in the buffer
    missing: np.ndarray  # positions of those to be read
    units_left: int
    buffer: np.ndarray | None  # for a unit that the cache cannot take


class AttentionJob:
    """Runs from `start` until it calls `ended`, on whatever thread was last; `out`, `lse` or `failure` are
    set by then.

    out: float32 [num_items, num_queries, num_query_heads, head_dim]; lse: float32 [num_items, num_queries,
    num_query_heads]. kernel_ns is summed over workers.
    """

    def __init__(self, engine: Engine, work: AttentionWork, ended: Callable[[], None]):
        self.work = work
        self.cancelled = False
        self.failure: CommandFailed | None = None
        self.out: np.ndarray | None = None
        self.lse: np.ndarray | None = None
        self.pages_from_flash = 0
        self.pages_from_cache = 0
        self.kernel_ns = 0
        self._engine = engine
        self._plan = work.plan
        self._ended: Callable[[], None] | None = ended
        self._guard = ExitStack()
        self._room = threading.Semaphore(SPANS_PINNED)
        self._lock = threading.Lock()
        self._parts_under_way = 1  # spans, and whoever makes spans

    def start(self) -> None:
        """Runs the job if it is small, has its first span under way otherwise. Raises nothing."""
        with self._stop_on_error("planning"):
            self._guard.enter_context(self._engine.ftl.read_guard())
            self._prepare()
            spans = self._spans()
            if 2 * self._plan.num_pages * self._engine.ftl.page_size <= INLINE_BYTES:
                for span in spans:
                    self._run_here(span)
            elif (span := next(spans, None)) is not None:
                self._run(span)
                if span.stop_unit < self._plan.num_units:
                    self._engine.commands.submit(self._go_on, spans)
                    return
        self._end_part()

    def _prepare(self) -> None:
        """Arrays for all units."""
        tables, plan = self.work.tables, self._plan
        # filled as spans are pinned
        self._addresses = np.empty((2, plan.num_pages), np.uint64)
        self._batch = attention_batch(self.work, self._addresses)
        shape = (plan.num_units, self.work.queries.shape[1], tables.group_size)
        self._unit_out = np.empty((*shape, tables.head_dim), np.float32)
        self._unit_lse = np.empty(shape, np.float32)

    def _go_on(self, spans: Iterator[Span]) -> None:
        """The spans after the first, on a thread of `commands`."""
        with self._stop_on_error("planning"):
            for span in spans:
                self._run(span)
                if self._stopped:
                    break
        self._end_part()

    # spans and windows

    def _spans(self) -> Iterator[Span]:
        """The plan's units in runs of at most span_pages, each pinned when it is taken."""
        plan, engine = self._plan, self._engine
        layer_offset = self.work.layer * self.work.tables.layer_lbas
        max_pages = engine.span_pages
        first = 0
        while first < plan.num_units:
            stop = self._cut(first, plan.num_units, max_pages)
            part = slice(plan.unit_first_page[first], plan.unit_first_page[stop])
            lbas = (plan.lbas[:, part] + layer_offset).reshape(-1)
            pages = engine.ftl.resolve(lbas)
            if pages.min() < 0:
                lba = int(lbas[np.argmin(pages)])
                raise CommandFailed(Status.DEALLOCATED_BLOCK, lba=lba, detail="page never written")
            self._room.acquire()
            buffer = None
            try:
                addresses, missing = engine.cache.acquire(pages, engine.span_lines)
            except MemoryError:
                if max_pages > engine.scattered_span_pages:  # so the spans to come will be scattered too
                    max_pages = engine.scattered_span_pages
                    self._room.release()
                    continue
                buffer, addresses = self._private_memory(pages)
                missing = np.arange(len(pages))
            self._addresses[:, part] = addresses.reshape(2, -1)
            self.pages_from_flash += len(missing)
            self.pages_from_cache += len(pages) - len(missing)
            yield Span(first, stop, pages, lbas, addresses, missing, stop - first, buffer)
            first = stop

    def _private_memory(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a buffer, addresses in it) for one unit that needs more lines than a span may pin."""
        page_size = self._engine.ftl.page_size
        places, place = np.unique(pages, return_inverse=True)  # a page named twice is read once
        buffer = dma.allocate(len(places) * page_size)
        return buffer, dma.page_addresses(buffer, page_size)[place]

    def _cut(self, first_unit: int, last_unit: int, max_pages: int) -> int:
        """Where a run of units from first_unit on ends that has at most max_pages, K and V, or one unit."""
        first_pages = self._plan.unit_first_page
        if 2 * (first_pages[last_unit] - first_pages[first_unit]) <= max_pages:
            return last_unit
        limit = first_pages[first_unit] + max_pages // 2
        stop = int(np.searchsorted(first_pages, limit, side="right")) - 1
        return min(max(stop, first_unit + 1), last_unit)

    def _windows(self, span: Span) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first unit, stop unit, positions of missing pages) of each part of a span to be read at once."""
        first_pages = self._plan.unit_first_page
        base = first_pages[span.first_unit]
        position = span.missing % (len(span.pages) // 2)
        first = span.first_unit
        while first < span.stop_unit:
            stop = self._cut(first, span.stop_unit, WINDOW_BYTES // self._engine.ftl.page_size)
            low, high = first_pages[first] - base, first_pages[stop] - base
            yield first, stop, span.missing[(low <= position) & (position < high)]
            first = stop

    def _run_here(self, span: Span) -> None:
        try:
            if len(span.missing):
                self._load(span, span.missing)
            self._compute(span, UnitRange(span.first_unit, span.stop_unit))
        finally:
            self._unpin(span)

    def _run(self, span: Span) -> None:
        """Have a span read and computed."""
        with self._lock:
            self._parts_under_way += 1
        if not len(span.missing):
            self._submit_units(span, span.first_unit, span.stop_unit)
            return
        for first_unit, stop_unit, missing in self._windows(span):
            if len(missing):
                self._engine.readers.submit(self._load_window, span, first_unit, stop_unit, missing)
            else:
                self._submit_units(span, first_unit, stop_unit)

    def _load_window(self, span: Span, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        with self._stop_on_error("reading"):
            if not self._stopped:
                self._load(span, missing)
        self._submit_units(span, first_unit, stop_unit)

    def _load(self, span: Span, missing: np.ndarray) -> None:
        """Read missing pages, check them, publish them if they are in the cache."""
        # physical order, so that neighbours become one large request; a page named twice is read once
        pages, order = np.unique(span.pages[missing], return_index=True)
        positions = missing[order]
        try:
            self._engine.ftl.read_physical(pages, span.lbas[positions], span.addresses[positions])
        except CorruptPage as error:
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=error.lba, detail="page checksum") from error
        except FlashError as error:
            log.error("attention read failed: %s", error)
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, detail="media read") from error
        if span.buffer is None:
            self._engine.cache.mark_valid(pages)

    def _submit_units(self, span: Span, first_unit: int, stop_unit: int) -> None:
        def compute(units: UnitRange) -> None:
            with self._stop_on_error("computing"):
                if not self._stopped:
                    self._compute(span, units)
            if self._stopped:
                for _ in units:  # nobody else shall
                    pass

        def ended() -> None:
            with self._lock:
                span.units_left -= stop_unit - first_unit
                is_last = span.units_left == 0
            if is_last:
                self._unpin(span)
                self._end_part()

        self._engine.workers.submit(UnitRange(first_unit, stop_unit), compute, ended)

    def _compute(self, span: Span, units: UnitRange) -> None:
        started = perf_counter_ns()
        try:
            self._engine.worker.attend_units(self._batch, units, self._unit_out, self._unit_lse)
        except BadScales as error:
            position = error.page - self._plan.unit_first_page[span.first_unit]
            lba = int(span.lbas[position + error.of_values * len(span.lbas) // 2])
            detail = "scales of a page"
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=lba, detail=detail) from error
        with self._lock:
            self.kernel_ns += perf_counter_ns() - started

    def _unpin(self, span: Span) -> None:
        if span.buffer is None:
            self._engine.cache.release(span.pages)
        self._room.release()

    # the end

    @property
    def _stopped(self) -> bool:
        return self.cancelled or self.failure is not None

    def _stop_on_error(self, doing: str) -> "_StopOnError":
        return _StopOnError(self, doing)

    def _end_part(self) -> None:
        with self._lock:
            self._parts_under_way -= 1
            if self._parts_under_way:
                return
        self._guard.close()
        if self.cancelled and self.failure is None:
            self.failure = CommandFailed(Status.ATTENTION_CANCELLED)
        if self.failure is None:
            with self._stop_on_error("merging"):
                plan, tables = self._plan, self.work.tables
                self.out, self.lse = merge_units(
                    self._unit_out,
                    self._unit_lse,
                    plan.unit_item,
                    plan.unit_kv_head,
                    len(tables.items),
                    tables.num_kv_heads,
                )
        ended, self._ended = self._ended, None  # or job and ticket would wait for the garbage collector
        ended()


class _StopOnError:
    """A context that turns an exception into the job's failure, since no caller is there to be told."""

    def __init__(self, job: AttentionJob, doing: str):
        self._job = job
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, CommandFailed):
            self._job.failure = error
        elif isinstance(error, Exception):
            log.error("attention failed while %s", self._doing, exc_info=error)
            self._job.failure = CommandFailed(Status.INTERNAL_ERROR, detail="see the drive's log")
        return error is None or isinstance(error, Exception)
