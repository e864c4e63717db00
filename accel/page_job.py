"""A command at work over pages: pinned, read where they are missing, handed to the workers.

Work comes in stages, each of them units that read a run of pages. Pages are pinned in the DRAM cache in spans,
short ones where pages are scattered over its lines. What of a span is missing there is read in windows of a
few megabytes: reader threads bring one window into the cache while worker threads compute the previous ones;
neither holds the GIL in its heavy part.

While a job runs it holds an FTL read guard, so nothing it resolved can be erased under it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np

from accel.damage_notes import DamageNotes
from accel.drive_probes import DriveProbes
from accel.page_cache import PageCache
from accel.read_ahead import ReadAhead
from accel.worker_pool import WorkerPool
from accel.workers import CannotCompute, UnitRange, WorkerCounts, WorkerFailed
from ftl.errors import CorruptPage, FlashError
from spdk_glue import dma
from spdk_glue.request_id import carried
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)

# Pinned at once, if the cache has them: what planning costs is paid before computing starts.
SPAN_BYTES = 64 << 20
SPANS_PINNED = 2  # by one command; a third of the cache is left to others, unless pages are scattered
WINDOW_BYTES = 8 << 20  # read at once: some milliseconds of flash, long against a thread hand-over


@dataclass(frozen=True)
class Engine:
    """What all jobs share.

    commands: threads that plan what is not in the cache; readers: that read it; damage: what the log was told;
    read_ahead: None for a drive in which nothing happens but what is asked; counts: what the worker tells
    """

    ftl: object
    cache: PageCache
    worker: object
    commands: Executor
    readers: Executor
    workers: WorkerPool
    damage: DamageNotes
    probes: DriveProbes
    read_ahead: ReadAhead | None = None
    counts: WorkerCounts = field(default_factory=WorkerCounts)

    def span_pages(self, spans_pinned: int = SPANS_PINNED) -> int:
        """Pages that one span holds at most, of a command that pins so many."""
        largest = self.cache.capacity_bytes // (spans_pinned + 1)
        return max(1, min(SPAN_BYTES, largest) // self.ftl.page_size)

    @property
    def resident_pages(self) -> int:
        """Pages that a command may pin at once if all are in the cache."""
        return self.cache.capacity_bytes // (SPANS_PINNED + 1) // self.ftl.page_size

    def span_lines(self, spans_pinned: int = SPANS_PINNED) -> int:
        """Cache lines that one span pins at most. More than span_pages fill: runs of pages end within lines."""
        return max(1, self.cache.num_lines // spans_pinned)

    def scattered_span_pages(self, spans_pinned: int = SPANS_PINNED) -> int:
        """As span_pages, where every page may lie in a line of its own. It also bounds units."""
        return max(1, self.cache.num_lines // (spans_pinned + 1))


def cut(first_pages: np.ndarray, first_unit: int, last_unit: int, max_columns: int) -> int:
    """Where a run of units from first_unit on ends that has at most max_columns, or one unit."""
    if first_pages[last_unit] - first_pages[first_unit] <= max_columns:
        return last_unit
    stop = int(np.searchsorted(first_pages, first_pages[first_unit] + max_columns, side="right")) - 1
    return min(max(stop, first_unit + 1), last_unit)


class Stage:
    """Units of work, each over a run of columns of `lbas`.

    lbas: int64 [num_rows, num_columns], to which lba_offset is added; unit_first_page: int64 [num_units + 1],
        columns
    damaged: bool [num_units], where to note units whose pages cannot be read; None: then the command fails
    counted: bool [num_columns], pages that an earlier stage has counted; None: none
    window_bytes: read at once

    addresses: uint64 like lbas, filled before a unit is computed
    pages_from_flash, pages_from_cache: counted as they are pinned
    has_priority: of its pages in the cache
    """

    has_priority = False

    def __init__(
        self,
        lbas: np.ndarray,
        unit_first_page: np.ndarray,
        lba_offset: int = 0,
        *,
        damaged: np.ndarray | None = None,
        counted: np.ndarray | None = None,
        window_bytes: int = WINDOW_BYTES,
    ):
        self.lbas = lbas
        self.unit_first_page = unit_first_page
        self.lba_offset = lba_offset
        self.damaged = damaged
        self.counted = counted
        self.window_bytes = window_bytes
        self.addresses = np.empty(lbas.shape, np.uint64)
        self.pages_from_flash = 0
        self.pages_from_cache = 0
        self.units_left = self.num_units
        self.done = threading.Event()
        if not self.num_units:
            self.done.set()

    def addressed(self, first_column: int, stop_column: int) -> None:
        """These columns' addresses are there; called before their units are computed."""

    def compute(self, units: UnitRange) -> None:
        """Compute the units that it takes; several threads call this at once. Raises CommandFailed."""
        raise NotImplementedError

    @property
    def num_units(self) -> int:
        return len(self.unit_first_page) - 1

    @property
    def num_rows(self) -> int:
        return len(self.lbas)

    @property
    def num_pages(self) -> int:
        """Read by all its units, whether from flash or from the cache."""
        return self.pages_from_flash + self.pages_from_cache

    def count(self, first_column: int, stop_column: int, missing: np.ndarray) -> None:
        """missing: positions in the columns [first_column, stop_column) of all rows, one row after another."""
        num_columns = stop_column - first_column
        known = 0
        if self.counted is not None:
            counted = np.tile(self.counted[first_column:stop_column], self.num_rows)
            known = int(counted.sum() - counted[missing].sum())
        self.pages_from_flash += len(missing)
        self.pages_from_cache += num_columns * self.num_rows - len(missing) - known


@dataclass
class Span:
    """Units [first_unit, stop_unit) of a stage with the physical pages of their columns, row after row."""

    stage: Stage
    first_unit: int
    stop_unit: int
    pages: np.ndarray
    lbas: np.ndarray
    addresses: np.ndarray  # in the cache, or in the buffer
    missing: np.ndarray  # positions of those to be read
    units_left: int
    buffer: np.ndarray | None  # for a unit that the cache cannot take

    def units_of(self, positions: np.ndarray) -> np.ndarray:
        """The unit of each position in `pages`."""
        first_pages = self.stage.unit_first_page
        columns = first_pages[self.first_unit] + positions % (len(self.pages) // self.stage.num_rows)
        return np.searchsorted(first_pages, columns, side="right") - 1


class Stopped(Exception):
    """The job has failed or was cancelled: its stages do not end."""


class PageJob:
    """Runs from `start` until it calls `ended`, on whatever thread was last; `out`, `lse` or `failure` are
    set by then.

    out: float32 [num_items, num_queries, num_query_heads, head_dim]; lse: float32 [num_items, num_queries,
    num_query_heads]. kernel_ns is summed over workers.
    """

    spans_pinned = SPANS_PINNED

    def __init__(self, engine: Engine, ended: Callable[[], None]):
        self.cancelled = False
        self.failure: CommandFailed | None = None
        self.out: np.ndarray | None = None
        self.lse: np.ndarray | None = None
        self.kernel_ns = 0
        self._engine = engine
        self._ended: Callable[[], None] | None = ended
        self._guard = ExitStack()
        self._room = threading.Semaphore(self.spans_pinned)
        self._lock = threading.Lock()
        self._parts_under_way = 1  # spans, and whoever makes spans

    def start(self) -> None:
        """Runs the job if it is small, has it under way otherwise. Raises nothing."""
        raise NotImplementedError

    def _merge(self) -> None:
        """Set out and lse, when all parts have ended well."""
        raise NotImplementedError

    # spans and windows

    def _spans(self, stage: Stage) -> Iterator[Span]:
        """The stage's units in runs of at most span_pages, each pinned when it is taken."""
        engine = self._engine
        max_pages, max_lines = engine.span_pages(self.spans_pinned), engine.span_lines(self.spans_pinned)
        scattered_pages = engine.scattered_span_pages(self.spans_pinned)
        first = 0
        while first < stage.num_units:
            stop = cut(stage.unit_first_page, first, stage.num_units, max_pages // stage.num_rows)
            columns = int(stage.unit_first_page[first]), int(stage.unit_first_page[stop])
            lbas = (stage.lbas[:, slice(*columns)] + stage.lba_offset).reshape(-1)
            started = perf_counter_ns()
            pages = engine.ftl.resolve(lbas)
            engine.probes.resolve.since(started)
            if len(pages) and pages.min() < 0:
                lba = int(lbas[np.argmin(pages)])
                raise CommandFailed(Status.DEALLOCATED_BLOCK, lba=lba, detail="page never written")
            self._room.acquire()
            buffer = None
            try:
                addresses, missing = engine.cache.acquire(pages, max_lines, stage.has_priority)
            except MemoryError:
                if max_pages > scattered_pages:  # so the spans to come will be scattered too
                    max_pages = scattered_pages
                    self._room.release()
                    continue
                buffer, addresses = self._private_memory(pages)
                missing = np.arange(len(pages))
            stage.addresses[:, slice(*columns)] = addresses.reshape(stage.num_rows, -1)
            stage.addressed(*columns)
            stage.count(*columns, missing)
            yield Span(stage, first, stop, pages, lbas, addresses, missing, stop - first, buffer)
            first = stop

    def _span_of_all(self, stage: Stage) -> Span | None:
        """All units of a stage, pinned at once, if every page is in the cache; else None, with nothing done."""
        engine = self._engine
        if not 0 < stage.lbas.size <= engine.resident_pages:
            return None
        lbas = (stage.lbas + stage.lba_offset).reshape(-1)
        pages = engine.ftl.resolve(lbas)
        if pages.min() < 0:
            return None
        addresses = engine.cache.acquire_if_here(pages, engine.span_lines())
        if addresses is None:
            return None
        self._room.acquire()
        stage.addresses[:] = addresses.reshape(stage.addresses.shape)
        none = np.empty(0, np.int64)
        stage.addressed(0, stage.lbas.shape[1])
        stage.count(0, stage.lbas.shape[1], none)
        return Span(stage, 0, stage.num_units, pages, lbas, addresses, none, stage.num_units, None)

    def _private_memory(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a buffer, addresses in it) for one unit that needs more lines than a span may pin."""
        page_size = self._engine.ftl.page_size
        places, place = np.unique(pages, return_inverse=True)  # a page named twice is read once
        buffer = dma.allocate(len(places) * page_size)
        return buffer, dma.page_addresses(buffer, page_size)[place]

    def _windows(self, span: Span) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first unit, stop unit, positions of missing pages) of each part of a span to be read at once."""
        stage = span.stage
        base = stage.unit_first_page[span.first_unit]
        columns_at_once = stage.window_bytes // self._engine.ftl.page_size // stage.num_rows
        position = span.missing % (len(span.pages) // stage.num_rows)
        first = span.first_unit
        while first < span.stop_unit:
            stop = cut(stage.unit_first_page, first, span.stop_unit, columns_at_once)
            low, high = stage.unit_first_page[first] - base, stage.unit_first_page[stop] - base
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
        here: list[list[int]] = []  # runs of units
        for first_unit, stop_unit, missing in self._windows(span):
            if len(missing):
                self._have_read(span, first_unit, stop_unit, missing)
            elif here and here[-1][1] == first_unit:
                here[-1][1] = stop_unit
            else:
                here.append([first_unit, stop_unit])
        # once flash is at work: workers that compute leave this thread little
        for first_unit, stop_unit in here:
            self._submit_units(span, first_unit, stop_unit)

    def _have_read(self, span: Span, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        """A window, and then computed."""
        self._engine.readers.submit(carried(self._load_window), span, first_unit, stop_unit, missing)

    def _load_window(self, span: Span, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        with self._stop_on_error("reading"):
            if not self._stopped:
                self._load(span, missing)
        self._submit_units(span, first_unit, stop_unit)

    def _load(self, span: Span, missing: np.ndarray) -> None:
        """Read missing pages, check them, publish them if they are in the cache."""
        try:
            self._read(span, missing)
        except CommandFailed:
            if span.stage.damaged is None:
                raise
            self._read_what_can_be(span, missing)

    def _read_what_can_be(self, span: Span, missing: np.ndarray) -> None:
        """Unit by unit; damaged ones are noted."""
        units = span.units_of(missing)
        for unit in np.unique(units).tolist():
            try:
                self._read(span, missing[units == unit])
            except CommandFailed:
                span.stage.damaged[unit] = True

    def _read(self, span: Span, missing: np.ndarray) -> None:
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
                self._end_span(span)

        self._engine.workers.submit(UnitRange(first_unit, stop_unit), compute, ended)

    def _end_span(self, span: Span) -> None:
        self._unpin(span)
        stage = span.stage
        with self._lock:
            stage.units_left -= span.stop_unit - span.first_unit
            is_last = stage.units_left == 0
        if is_last:
            stage.done.set()
        self._end_part()

    def _compute(self, span: Span, units: UnitRange) -> None:
        started = perf_counter_ns()
        span.stage.compute(units)
        stopped = perf_counter_ns()
        self._engine.probes.kernel.between(started, stopped)
        with self._lock:
            self.kernel_ns += stopped - started

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
                self._merge()
        ended, self._ended = self._ended, None  # or job and ticket would wait for the garbage collector
        ended()


class _StopOnError:
    """A context that turns an exception into the job's failure, since no caller is there to be told."""

    def __init__(self, job: PageJob, doing: str):
        self._job = job
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, CommandFailed):
            self._job.failure = error
        elif isinstance(error, CannotCompute):
            self._job.failure = CommandFailed(Status.NOT_COMPUTABLE, detail=str(error))
        elif isinstance(error, WorkerFailed):
            self._job.failure = CommandFailed(Status.WORKER_FAILED, detail=str(error))
        elif isinstance(error, Exception) and not isinstance(error, Stopped):
            log.error("attention failed while %s", self._doing, exc_info=error)
            self._job.failure = CommandFailed(Status.INTERNAL_ERROR, detail="see the drive's log")
        return error is None or isinstance(error, Exception)
