"""The attention unit: tickets in, partial attention of flash pages out.

A command's pages are read in windows of a few megabytes. Reader threads bring the missing pages of one
window into the DRAM cache while worker threads compute the previous ones; neither holds the GIL in its
heavy part. Partial results of all units are merged by lse at the end. What is small and waits for no
flash runs at once on the submitting thread: a hand-over between threads would cost more than the work.

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
from accel.workers import AttentionBatch
from ftl.errors import CorruptPage, FlashError
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import ANSWER_HEADER

log = logging.getLogger(__name__)

WINDOW_BYTES = 8 << 20  # some milliseconds of flash: long against a thread hand-over
WINDOWS_IN_FLIGHT = 6
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


@dataclass(frozen=True)
class Window:
    """Units [first, stop) of a plan with the physical pages of their K, then of their V."""

    first_unit: int
    stop_unit: int
    pages: np.ndarray
    lbas: np.ndarray


class AttentionUnit:
    """Attention over the drive's pages. `ftl` resolves and reads; `worker` computes."""

    def __init__(self, ftl, cache: PageCache, worker, num_workers: int):
        self._ftl = ftl
        self._cache = cache
        self._worker = worker
        self.num_workers = num_workers
        self._window_pages = max(1, min(WINDOW_BYTES, cache.capacity_bytes // 4) // ftl.page_size)
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._commands = ThreadPoolExecutor(2, thread_name_prefix="kvfs-attention")
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="kvfs-reader")
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="kvfs-worker")
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
        for window in self._windows(plan):
            pages, missing = self._pin(window, plan, batch)
            try:
                self._load(ticket, window, pages, missing)
                self._compute(ticket, batch, window.first_unit, window.stop_unit, out, lse)
            finally:
                self._cache.release(pages)

    def _attend_streaming(self, ticket, plan, batch, out, lse) -> None:
        room = threading.Semaphore(WINDOWS_IN_FLIGHT)
        finished: list[Future] = []
        try:
            for window in self._windows(plan):
                if ticket.cancelled or ticket.failure is not None:
                    break
                room.acquire()
                pages, missing = self._pin(window, plan, batch)
                done: Future = Future()
                finished.append(done)
                step = _WindowStep(self, ticket, batch, out, lse, window, pages, room, done)
                if len(missing):
                    self._readers.submit(step.load_and_compute, missing)
                else:
                    step.compute()
        finally:
            for done in finished:
                done.result()  # never leave while a thread still touches our arrays
        if ticket.failure is not None:
            raise ticket.failure

    def _windows(self, plan: PagePlan):
        """Cut a plan's units into runs of about a window of pages, resolved to physical pages."""
        first = 0
        while first < plan.num_units:
            limit = plan.unit_first_page[first] + self._window_pages // 2  # K and V each
            stop = int(np.searchsorted(plan.unit_first_page, limit, side="right")) - 1
            stop = min(max(stop, first + 1), plan.num_units)
            span = slice(plan.unit_first_page[first], plan.unit_first_page[stop])
            lbas = np.concatenate([plan.key_lbas[span], plan.value_lbas[span]])
            pages = self._ftl.resolve(lbas)
            if len(pages) and pages.min() < 0:
                lba = int(lbas[np.argmin(pages)])
                raise CommandFailed(Status.DEALLOCATED_BLOCK, lba=lba, detail="page never written")
            yield Window(first, stop, pages, lbas)
            first = stop

    def _pin(self, window: Window, plan: PagePlan, batch: AttentionBatch):
        addresses, missing = self._cache.acquire(window.pages)
        span = slice(plan.unit_first_page[window.first_unit], plan.unit_first_page[window.stop_unit])
        half = len(addresses) // 2
        batch.key_pages[span] = addresses[:half]
        batch.value_pages[span] = addresses[half:]
        if len(missing):
            # physical order, so that neighbours become one large request; a page pinned twice is read once
            order = np.unique(window.pages[missing], return_index=True)[1]
            missing = missing[order]
            return window.pages, (missing, addresses[missing])
        return window.pages, ()

    def _load(self, ticket: Ticket, window: Window, pages: np.ndarray, missing) -> None:
        """Read a window's missing pages, check them, publish them in the cache."""
        num_missing = 0
        if len(missing):
            positions, addresses = missing
            wanted = pages[positions]
            try:
                self._ftl.read_physical(wanted, window.lbas[positions], addresses)
            except CorruptPage as error:
                raise CommandFailed(
                    Status.UNRECOVERED_READ_ERROR, lba=error.lba, detail="page checksum"
                ) from error
            except FlashError as error:
                log.error("attention read failed: %s", error)
                raise CommandFailed(Status.UNRECOVERED_READ_ERROR, detail="media read") from error
            self._cache.mark_valid(wanted)
            num_missing = len(wanted)
        with ticket.lock:
            ticket.pages_from_flash += num_missing
            ticket.pages_from_cache += len(pages) - num_missing

    def _compute(self, ticket: Ticket, batch, first_unit: int, stop_unit: int, out, lse) -> None:
        started = time.perf_counter_ns()
        self._worker.attend_units(batch, first_unit, stop_unit, out, lse)
        with ticket.lock:
            ticket.kernel_ns += time.perf_counter_ns() - started

    def close(self) -> None:
        self._commands.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._workers.shutdown(wait=True)


class _WindowStep:
    """One window on its way through readers and workers; releases its pages when all parts are done."""

    def __init__(self, unit: AttentionUnit, ticket, batch, out, lse, window, pages, room, done):
        self._unit = unit
        self._ticket = ticket
        self._batch = batch
        self._out = out
        self._lse = lse
        self._window = window
        self._pages = pages
        self._room = room
        self._done = done
        num_units = window.stop_unit - window.first_unit
        self._parts = min(unit.num_workers, num_units)
        self._parts_left = self._parts

    def load_and_compute(self, missing) -> None:
        try:
            self._unit._load(self._ticket, self._window, self._pages, missing)
        except CommandFailed as failure:
            self._ticket.failure = failure
            self._finish()
        except Exception as error:
            self._finish(error)
        else:
            self.compute(counted=True)

    def compute(self, counted: bool = False) -> None:
        if not counted:
            self._unit._load(self._ticket, self._window, self._pages, ())
        bounds = np.linspace(self._window.first_unit, self._window.stop_unit, self._parts + 1).astype(int)
        for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            self._unit._workers.submit(self._part, first, stop)

    def _part(self, first: int, stop: int) -> None:
        error = None
        try:
            if not self._ticket.cancelled:
                self._unit._compute(self._ticket, self._batch, first, stop, self._out, self._lse)
        except Exception as caught:
            error = caught
        with self._ticket.lock:
            self._parts_left -= 1
            last = self._parts_left == 0
        if error is not None:
            self._ticket.failure = CommandFailed(Status.INTERNAL_ERROR, detail="worker failed")
            log.error("attention worker failed", exc_info=error)
        if last:
            self._finish()

    def _finish(self, error: Exception | None = None) -> None:
        self._unit._cache.release(self._pages)
        self._room.release()
        if error is not None:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
