"""The attention unit: tickets in, partial attention of flash pages out.

A command's pages are pinned in the DRAM cache in spans. What of a span is missing there is read in windows of
a few megabytes: reader threads bring one window into the cache while worker threads compute the previous
ones; neither holds the GIL in its heavy part. Partial results of all units are merged by lse at the end.
What is small runs at once on the submitting thread: a hand-over would cost more than the work.

Locking: a ticket is touched by its own threads only until it is done; the table of tickets has a lock.
While a command runs it holds an FTL read guard, so nothing it resolved can be erased under it.
"""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from accel import descriptor
from accel.merge import merge_units
from accel.page_cache import PageCache
from accel.page_plan import PagePlan, plan_pages
from accel.worker_pool import WorkerPool
from accel.workers import AttentionBatch
from ftl.errors import CorruptPage, FlashError
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import ANSWER_HEADER

log = logging.getLogger(__name__)

# Pinned at once, if the cache has them: what planning costs is paid before computing starts.
SPAN_BYTES = 64 << 20
SPANS_PINNED = 3
WINDOW_BYTES = 8 << 20  # read at once: some milliseconds of flash, long against a thread hand-over
NUM_READERS = 2  # so that requests are queued while the other checks checksums
INLINE_BYTES = 4 << 20  # below this a command is computed by the submitting thread
MAX_TICKETS = 256


@dataclass
class AttentionCounters:
    commands: int = 0
    cancelled: int = 0
    failed: int = 0
    items: int = 0
    pages_from_flash: int = 0
    pages_from_cache: int = 0
    kernel_ns: int = 0
    command_ns: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Ticket:
    """One command from submit to fetch."""

    work: descriptor.AttentionWork
    started_ns: int
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    failure: CommandFailed | None = None
    out: np.ndarray | None = None
    lse: np.ndarray | None = None
    pages_from_flash: int = 0
    pages_from_cache: int = 0
    kernel_ns: int = 0
    command_ns: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Span:
    """Units [first_unit, stop_unit) of a plan with the physical pages of their K, then of their V."""

    first_unit: int
    stop_unit: int
    pages: np.ndarray
    lbas: np.ndarray
    addresses: np.ndarray | None = None  # in the cache, while pinned


class AttentionUnit:
    """Attention over the drive's pages. `ftl` resolves and reads; `worker` computes."""

    def __init__(self, ftl, cache: PageCache, worker, num_workers: int):
        self._ftl = ftl
        self._cache = cache
        self._worker = worker
        self.num_workers = num_workers
        largest = cache.capacity_bytes // (SPANS_PINNED + 1)  # other commands need room as well
        self._span_pages = max(1, min(SPAN_BYTES, largest) // ftl.page_size)
        self._window_pages = min(self._span_pages, WINDOW_BYTES // ftl.page_size)
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._commands = ThreadPoolExecutor(2, thread_name_prefix="kvfs-attention")
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="kvfs-reader")
        self._workers = WorkerPool(num_workers)
        self.counters = AttentionCounters()
        ftl.on_erase(cache.drop)

    # the three commands

    def submit(self, ticket_id: int, data: np.ndarray) -> None:
        """Start a descriptor's work. Raises CommandFailed for a bad one or too many tickets."""
        work = descriptor.parse(data, self._ftl.page_size, self._ftl.num_lbas)
        ticket = Ticket(work, time.perf_counter_ns())
        with self._lock:
            if ticket_id in self._tickets:
                raise CommandFailed(Status.TICKET_IN_USE, detail=f"ticket {ticket_id}")
            if len(self._tickets) >= MAX_TICKETS:
                raise CommandFailed(Status.TOO_MANY_TICKETS, detail=f"limit {MAX_TICKETS}", do_not_retry=False)
            self._tickets[ticket_id] = ticket
        plan = plan_pages(work, self._window_pages)
        if 2 * plan.num_pages * self._ftl.page_size <= INLINE_BYTES:
            self._run(ticket, plan, inline=True)
        else:
            self._commands.submit(self._run, ticket, plan)

    def fetch(self, ticket_id: int, answer: np.ndarray) -> int:
        """Wait for a ticket, write its answer, drop it. Returns the answer's true length in bytes."""
        with self._lock:
            ticket = self._tickets.get(ticket_id)
        if ticket is None:
            raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {ticket_id}")
        size = ticket.work.answer_bytes
        if answer.nbytes < size:
            raise CommandFailed(Status.SGL_LENGTH_INVALID, detail=f"answer has {size} bytes")
        ticket.done.wait()
        with self._lock:
            self._tickets.pop(ticket_id, None)
        if ticket.failure is not None:
            raise ticket.failure
        header = np.zeros(1, ANSWER_HEADER)
        header["version"] = 1
        header["pages_from_flash"] = ticket.pages_from_flash
        header["pages_from_cache"] = ticket.pages_from_cache
        header["kernel_ns"] = ticket.kernel_ns
        header["command_ns"] = ticket.command_ns
        lse_start = size - ticket.lse.nbytes
        answer[: header.nbytes] = header.view(np.uint8)
        answer[header.nbytes : lse_start] = ticket.out.reshape(-1).view(np.uint8)
        answer[lse_start:size] = ticket.lse.reshape(-1).view(np.uint8)
        answer[size:] = 0  # never leak what the buffer held before
        return size

    def cancel(self, ticket_id: int) -> None:
        """Stop a ticket's work as soon as it can and forget it."""
        with self._lock:
            ticket = self._tickets.pop(ticket_id, None)
        if ticket is None:
            raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {ticket_id}")
        ticket.cancelled = True

    # the work

    def _run(self, ticket: Ticket, plan: PagePlan, inline: bool = False) -> None:
        try:
            with self._ftl.read_guard():
                self._attend(ticket, plan, inline)
        except CommandFailed as failure:
            ticket.failure = failure
        except Exception:
            log.exception("attention command failed")
            ticket.failure = CommandFailed(Status.INTERNAL_ERROR, detail="see the drive's log")
        finally:
            ticket.command_ns = time.perf_counter_ns() - ticket.started_ns
            self._count(ticket)
            ticket.done.set()

    def _count(self, ticket: Ticket) -> None:
        with self._lock:
            counters = self.counters
            counters.commands += 1
            counters.cancelled += ticket.cancelled
            counters.failed += ticket.failure is not None
            counters.items += len(ticket.work.items)
            counters.pages_from_flash += ticket.pages_from_flash
            counters.pages_from_cache += ticket.pages_from_cache
            counters.kernel_ns += ticket.kernel_ns
            counters.command_ns += ticket.command_ns

    def _attend(self, ticket: Ticket, plan: PagePlan, inline: bool) -> None:
        work = ticket.work
        batch = AttentionBatch(
            dtype=work.dtype_name,
            head_dim=work.head_dim,
            group_size=work.group_size,
            key_pages=np.empty(plan.num_pages, np.uint64),
            value_pages=np.empty(plan.num_pages, np.uint64),
            page_first_token=plan.page_first_token,
            page_num_tokens=plan.page_num_tokens,
            unit_first_page=plan.unit_first_page,
            unit_item=plan.unit_item,
            unit_kv_head=plan.unit_kv_head,
            queries=work.queries,
            visible_start=work.visible_start,
            visible_stop=work.visible_stop,
            scale=work.scale,
        )
        out = np.empty((plan.num_units, work.num_queries, work.group_size, work.head_dim), np.float32)
        lse = np.empty((plan.num_units, work.num_queries, work.group_size), np.float32)
        if inline:
            self._attend_inline(ticket, plan, batch, out, lse)
        else:
            self._attend_streaming(ticket, plan, batch, out, lse)
        if ticket.cancelled:
            raise CommandFailed(Status.ATTENTION_CANCELLED)
        ticket.out, ticket.lse = merge_units(
            out, lse, plan.unit_item, plan.unit_kv_head, len(work.items), work.num_kv_heads
        )

    def _attend_inline(self, ticket, plan, batch, out, lse) -> None:
        for span in self._spans(plan):
            missing = self._pin(span, plan, batch)
            try:
                if len(missing):
                    self._load(ticket, span, missing)
                self._compute(ticket, batch, span.first_unit, span.stop_unit, out, lse)
            finally:
                self._cache.release(span.pages)
            self._note_pages(ticket, span, missing)

    def _attend_streaming(self, ticket, plan, batch, out, lse) -> None:
        room = threading.Semaphore(SPANS_PINNED)
        finished: list[Future] = []
        try:
            for span in self._spans(plan):
                if ticket.cancelled or ticket.failure is not None:
                    break
                room.acquire()
                missing = self._pin(span, plan, batch)
                self._note_pages(ticket, span, missing)
                step = _SpanStep(self, ticket, batch, out, lse, span, room)
                finished.append(step.done)
                if len(missing):
                    step.load(self._windows(plan, span, missing))
                else:
                    step.compute(span.first_unit, span.stop_unit)
        finally:
            for done in finished:
                done.result()  # never leave while a thread still touches our arrays
        if ticket.failure is not None:
            raise ticket.failure

    def _spans(self, plan: PagePlan):
        """Cut a plan's units into runs of at most SPAN_BYTES of pages, resolved to physical pages."""
        first = 0
        while first < plan.num_units:
            stop = self._cut(plan, first, plan.num_units, self._span_pages)
            pages = slice(plan.unit_first_page[first], plan.unit_first_page[stop])
            lbas = np.concatenate([plan.key_lbas[pages], plan.value_lbas[pages]])
            resolved = self._ftl.resolve(lbas)
            if len(resolved) and resolved.min() < 0:
                lba = int(lbas[np.argmin(resolved)])
                raise CommandFailed(Status.DEALLOCATED_BLOCK, lba=lba, detail="page never written")
            yield Span(first, stop, resolved, lbas)
            first = stop

    @staticmethod
    def _cut(plan: PagePlan, first_unit: int, last_unit: int, max_pages: int) -> int:
        """Where a run of units from first_unit on ends that has at most max_pages, K and V, or one unit."""
        limit = plan.unit_first_page[first_unit] + max_pages // 2
        stop = int(np.searchsorted(plan.unit_first_page, limit, side="right")) - 1
        return min(max(stop, first_unit + 1), last_unit)

    def _windows(self, plan: PagePlan, span: Span, missing: np.ndarray):
        """(first unit, stop unit, positions of missing pages) of each part of a span to be read at once."""
        base, half = plan.unit_first_page[span.first_unit], len(span.pages) // 2
        position = missing % half
        first = span.first_unit
        while first < span.stop_unit:
            stop = self._cut(plan, first, span.stop_unit, self._window_pages)
            low, high = plan.unit_first_page[first] - base, plan.unit_first_page[stop] - base
            yield first, stop, missing[(low <= position) & (position < high)]
            first = stop

    def _pin(self, span: Span, plan: PagePlan, batch: AttentionBatch) -> np.ndarray:
        """Pin a span's pages, tell the batch their addresses: positions of those to be read."""
        span.addresses, missing = self._cache.acquire(span.pages)
        pages = slice(plan.unit_first_page[span.first_unit], plan.unit_first_page[span.stop_unit])
        half = len(span.pages) // 2
        batch.key_pages[pages] = span.addresses[:half]
        batch.value_pages[pages] = span.addresses[half:]
        return missing

    @staticmethod
    def _note_pages(ticket: Ticket, span: Span, missing: np.ndarray) -> None:
        ticket.pages_from_flash += len(missing)
        ticket.pages_from_cache += len(span.pages) - len(missing)

    def _load(self, ticket: Ticket, span: Span, missing: np.ndarray) -> None:
        """Read missing pages, check them, publish them in the cache."""
        # physical order, so that neighbours become one large request; a page named twice is read once
        pages, order = np.unique(span.pages[missing], return_index=True)
        positions = missing[order]
        try:
            self._ftl.read_physical(pages, span.lbas[positions], span.addresses[positions])
        except CorruptPage as error:
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=error.lba, detail="page checksum") from error
        except FlashError as error:
            log.error("attention read failed: %s", error)
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR, detail="media read") from error
        self._cache.mark_valid(pages)

    def _compute(self, ticket: Ticket, batch, first_unit: int, stop_unit: int, out, lse) -> None:
        started = time.perf_counter_ns()
        self._worker.attend_units(batch, first_unit, stop_unit, out, lse)
        with ticket.lock:
            ticket.kernel_ns += time.perf_counter_ns() - started

    def close(self) -> None:
        self._commands.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._workers.close()


class _SpanStep:
    """One span on its way through readers and workers; unpins its pages when its last part is done."""

    def __init__(self, unit: AttentionUnit, ticket, batch, out, lse, span: Span, room: threading.Semaphore):
        self.done: Future = Future()
        self._unit = unit
        self._ticket = ticket
        self._batch = batch
        self._out = out
        self._lse = lse
        self._span = span
        self._room = room
        self._units_left = span.stop_unit - span.first_unit

    def load(self, windows) -> None:
        """Have the windows read, each computed once it is there."""
        for first_unit, stop_unit, missing in windows:
            if len(missing):
                self._unit._readers.submit(self._load_window, first_unit, stop_unit, missing)
            else:
                self.compute(first_unit, stop_unit)

    def _load_window(self, first_unit: int, stop_unit: int, missing: np.ndarray) -> None:
        try:
            if not self._given_up:
                self._unit._load(self._ticket, self._span, missing)
        except CommandFailed as failure:
            self._ticket.failure = failure
        except Exception as error:
            self._give_up("reader", error)
        self.compute(first_unit, stop_unit)

    def compute(self, first_unit: int, stop_unit: int) -> None:
        self._unit._workers.submit(self._compute_units, first_unit, stop_unit)

    def _compute_units(self, first_unit: int, stop_unit: int) -> None:
        try:
            if not self._given_up:
                self._unit._compute(self._ticket, self._batch, first_unit, stop_unit, self._out, self._lse)
        except Exception as error:
            self._give_up("worker", error)
        with self._ticket.lock:
            self._units_left -= stop_unit - first_unit
            last = self._units_left == 0
        if last:
            self._unit._cache.release(self._span.pages)
            self._room.release()
            self.done.set_result(None)

    @property
    def _given_up(self) -> bool:
        return self._ticket.cancelled or self._ticket.failure is not None

    def _give_up(self, who: str, error: Exception) -> None:
        self._ticket.failure = CommandFailed(Status.INTERNAL_ERROR, detail=f"{who} failed")
        log.error("attention %s failed", who, exc_info=error)
