"""The attention unit: tickets in, partial attention of flash pages out.

A ticket is one command from submit to fetch; the work between is an AttentionJob on the unit's threads.
Readers are two, so that requests are queued while the other checks checksums.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from accel.attention_job import INLINE_BYTES, AttentionJob
from accel.attention_work import DescriptorReader
from accel.damage_notes import DamageNotes
from accel.drive_probes import DriveProbes
from accel.page_cache import PageCache
from accel.page_job import Engine, PageJob
from accel.read_ahead import ReadAhead
from accel.resident_attention import ResidentAttention
from accel.sketch_job import sketch_job
from accel.sparf_job import SparfJob
from accel.worker_pool import WorkerPool
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import ANSWER_HEADER, ATTENTION_VERSION, SparseMethod

NUM_READERS = 2
NUM_COMMAND_THREADS = 4  # a sparse command that is not small keeps one
MAX_TICKETS = 256
JOBS = {SparseMethod.DENSE: AttentionJob, SparseMethod.SPARF: SparfJob, SparseMethod.SKETCH: sketch_job}


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
    sparse_commands: int = 0
    # of sparse commands, as in their answers
    index_pages: int = 0
    chosen_pages: int = 0
    dense_pages: int = 0
    damaged_segments: int = 0
    pages_read_ahead: int = 0  # for no command, so of none of the numbers above

    def count_pages(self, counts: dict[str, int]) -> None:
        """counts: of an answer's header"""
        for name in counts.keys() & vars(self).keys():
            setattr(self, name, getattr(self, name) + counts[name])

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Ticket:
    """job: the work under way; or `answer`: what the short way has found at once"""

    started_ns: int
    job: PageJob | None = None
    answer: np.ndarray | None = None
    done: threading.Event = field(default_factory=threading.Event)
    command_ns: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)  # called once it is done


class AttentionUnit:
    """Attention over the drive's pages. `ftl` resolves and reads; `worker` computes."""

    def __init__(
        self, ftl, cache: PageCache, worker, num_workers: int, probes: DriveProbes, reads_ahead: bool = True
    ):
        self.num_workers = num_workers
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="kvfs-reader")
        self._read_ahead = None
        if reads_ahead:
            self._read_ahead = ReadAhead(ftl, cache, readers, NUM_READERS, self._count_read_ahead)
        self._engine = Engine(
            ftl,
            cache,
            worker,
            ThreadPoolExecutor(NUM_COMMAND_THREADS, thread_name_prefix="kvfs-attention"),
            readers,
            WorkerPool(num_workers, probes.worker_wait),
            DamageNotes(),
            probes,
            self._read_ahead,
        )
        self._descriptors = DescriptorReader(ftl.page_size, ftl.num_lbas, self._engine.scattered_span_pages())
        self._resident = ResidentAttention(self._engine, self._descriptors)
        self.counters = AttentionCounters()
        self.worker_counts = self._engine.counts
        self._probes = probes
        ftl.on_erase(cache.drop)

    def attend_now(self, data: np.ndarray, answer: np.ndarray) -> bool:
        """Submit and fetch in one, if all pages are in the cache and nothing is wrong; False: nothing done."""
        return self._counted(self._resident.attend(data, answer))

    def attend_small_now(self, data: np.ndarray, answer: np.ndarray) -> bool:
        """As attend_now, of what is computed on the caller's thread alone; False for all else."""
        return self._counted(self._resident.attend(data, answer, INLINE_BYTES))

    def _counted(self, done: tuple[int, int, int, int] | None) -> bool:
        if done is None:
            return False
        with self._lock:
            self._count_resident(*done)
        return True

    def _count_resident(self, num_items: int, num_pages: int, kernel_ns: int, command_ns: int) -> None:
        """With the lock held."""
        counters = self.counters
        counters.commands += 1
        counters.items += num_items
        counters.pages_from_cache += num_pages
        counters.kernel_ns += kernel_ns
        counters.command_ns += command_ns

    def _count_read_ahead(self, num_pages: int) -> None:
        with self._lock:
            self.counters.pages_read_ahead += num_pages

    def submit(self, ticket_id: int, data: np.ndarray) -> None:
        """Start a descriptor's work. Raises CommandFailed for a bad one or too many tickets."""
        ticket = Ticket(time.perf_counter_ns())
        work = self._descriptors.read(data)
        done = self._resident.attend_small(work)
        if done is None:
            method = SparseMethod.DENSE if work.sparse is None else work.tables.sparse.method
            ticket.job = JOBS[method](self._engine, work, lambda: self._end(ticket))
        else:
            ticket.answer, counts = done
        with self._lock:
            if ticket_id in self._tickets:
                raise CommandFailed(Status.TICKET_IN_USE, detail=f"ticket {ticket_id}")
            if len(self._tickets) >= MAX_TICKETS:
                raise CommandFailed(Status.TOO_MANY_TICKETS, detail=f"limit {MAX_TICKETS}", do_not_retry=False)
            self._tickets[ticket_id] = ticket
            if done is not None:
                self._count_resident(*counts)
                return
        ticket.job.start()

    def _end(self, ticket: Ticket) -> None:
        job = ticket.job
        ended_ns = time.perf_counter_ns()
        ticket.command_ns = ended_ns - ticket.started_ns
        self._probes.command.between(ticket.started_ns, ended_ns, note=job.page_counts)
        with self._lock:
            counters = self.counters
            counters.commands += 1
            counters.cancelled += job.cancelled
            counters.failed += job.failure is not None
            counters.items += len(job.work.tables.items)
            counters.sparse_commands += job.work.sparse is not None
            counters.count_pages(job.page_counts)
            counters.kernel_ns += job.kernel_ns
            counters.command_ns += ticket.command_ns
            ticket.done.set()
            waiting, ticket.waiting = ticket.waiting, []
        for call in waiting:
            call()

    def when_done(self, ticket_id: int, call: Callable[[], None]) -> None:
        """Call once, from any thread, as soon as a fetch of this ticket has nothing to wait for."""
        with self._lock:
            ticket = self._tickets.get(ticket_id)
            if ticket is not None and ticket.answer is None and not ticket.done.is_set():
                ticket.waiting.append(call)
                return
        call()

    def fetch(self, ticket_id: int, answer: np.ndarray) -> int:
        """Wait for a ticket, write its answer, drop it. Returns the answer's true length in bytes."""
        with self._lock:
            ticket = self._tickets.get(ticket_id)
        if ticket is None:
            raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {ticket_id}")
        if ticket.answer is not None:
            return self._fetch_ready(ticket_id, ticket.answer, answer)
        job = ticket.job
        size = job.work.tables.answer_bytes
        if answer.nbytes < size:
            raise CommandFailed(Status.SGL_LENGTH_INVALID, detail=f"answer has {size} bytes")
        ticket.done.wait()
        with self._lock:
            self._tickets.pop(ticket_id, None)
        if job.failure is not None:
            raise job.failure
        header = np.zeros(1, ANSWER_HEADER)
        header["version"] = ATTENTION_VERSION
        for name, count in job.page_counts.items():
            header[name] = count
        header["kernel_ns"] = job.kernel_ns
        header["command_ns"] = ticket.command_ns
        lse_start = size - job.lse.nbytes
        answer[: header.nbytes] = header.view(np.uint8)
        answer[header.nbytes : lse_start] = job.out.reshape(-1).view(np.uint8)
        answer[lse_start:size] = job.lse.reshape(-1).view(np.uint8)
        answer[size:] = 0  # never leak what the buffer held before
        return size

    def _fetch_ready(self, ticket_id: int, found: np.ndarray, answer: np.ndarray) -> int:
        """`fetch` of what the short way has answered already."""
        if answer.nbytes < found.nbytes:
            raise CommandFailed(Status.SGL_LENGTH_INVALID, detail=f"answer has {found.nbytes} bytes")
        with self._lock:
            if self._tickets.pop(ticket_id, None) is None:
                raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {ticket_id}")
        answer[: found.nbytes] = found
        answer[found.nbytes :] = 0
        return found.nbytes

    def cancel(self, ticket_id: int) -> None:
        """Stop a ticket's work as soon as it can and forget it."""
        with self._lock:
            ticket = self._tickets.pop(ticket_id, None)
        if ticket is None:
            raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {ticket_id}")
        if ticket.job is not None:
            ticket.job.cancelled = True

    def close(self) -> None:
        """Wait for all that was submitted, then end the threads."""
        self._engine.commands.shutdown(wait=True)
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._engine.readers.shutdown(wait=True)
        self._engine.workers.close()
