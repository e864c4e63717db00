"""The in-process transport: host and drive share an address space, buffers pass by reference.

Commands of `execute` run on the caller's thread, as a polling driver's completions do; commands of
`submit` run on the drive's command threads, so that the host goes on meanwhile; without such threads they
too run on the caller's, which makes every run of a simulation the same. Bytes are counted as a wire would
carry them: entries and data, in each direction.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY, NSID, SUBMISSION_ENTRY, Direction, direction
from spdk_glue.controller import ADMIN_QUEUE, Controller
from spdk_glue.queue_pair import Buffer, QueuePair, execute_in_batches
from spdk_glue.request_id import carried

MAX_QUEUE_DEPTH = 1024
_DRIVE_TO_HOST = int(Direction.DRIVE_TO_HOST)  # an IntEnum compares at a tenth of an int's speed


@dataclass
class LinkCounters:
    """What crossed the seam, in bytes: 64 per submission, 16 per completion, and the data."""

    commands: int = 0
    bytes_to_drive: int = 0
    bytes_from_drive: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class InprocTransport:
    """Queue pairs into a controller of this process.

    read_now, attend_now: the drive's short ways, see Transport
    """

    is_connected = True
    nsid = NSID
    max_transfer_bytes = None

    def __init__(
        self,
        controller: Controller,
        num_command_threads: int = 2,
        read_now: Callable[[int, np.ndarray], bool] = lambda first_lba, data: False,
        attend_now: Callable[[np.ndarray, np.ndarray], bool] = lambda descriptor, answer: False,
    ):
        self._controller = controller
        self._read_now = read_now
        self._attend_now = attend_now
        self._threads: ThreadPoolExecutor | None = None
        if num_command_threads:
            self._threads = ThreadPoolExecutor(num_command_threads, thread_name_prefix="kvfs-command")
        self._lock = threading.Lock()
        self._next_queue_id = ADMIN_QUEUE + 1
        self.counters = LinkCounters()
        self.admin = QueuePair(InprocConnection(self, ADMIN_QUEUE), depth=32)

    def create_queue_pair(self, depth: int = 256) -> QueuePair:
        if depth > MAX_QUEUE_DEPTH:
            raise ValueError(f"this transport's queues are at most {MAX_QUEUE_DEPTH} deep, not {depth}")
        with self._lock:
            queue_id = self._next_queue_id
            self._next_queue_id += 1
        return QueuePair(InprocConnection(self, queue_id), depth)

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        if not self._read_now(first_lba, data):
            return False
        with self._lock:
            self.counters.commands += 1
            self.counters.bytes_to_drive += SUBMISSION_ENTRY.itemsize
            self.counters.bytes_from_drive += data.nbytes + COMPLETION_ENTRY.itemsize
        return True

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        if not self._attend_now(descriptor, answer):
            return False
        with self._lock:  # as SUBMIT and FETCH
            self.counters.commands += 2
            self.counters.bytes_to_drive += descriptor.nbytes + 2 * SUBMISSION_ENTRY.itemsize
            self.counters.bytes_from_drive += answer.nbytes + 2 * COMPLETION_ENTRY.itemsize
        return True

    def _count(self, entries: np.ndarray, buffers: Sequence[Buffer], completions: np.ndarray) -> None:
        moved = [0] * 4  # bytes in each direction
        opcodes, statuses = entries["opcode"].tolist(), completions["status"].tolist()
        for opcode, status, buffer in zip(opcodes, statuses, buffers, strict=True):
            way = direction(opcode)
            if buffer is not None and (status <= 1 or way != _DRIVE_TO_HOST):  # bit 0 is the phase
                moved[way] += buffer.nbytes
        with self._lock:
            self.counters.commands += len(entries)
            self.counters.bytes_to_drive += (
                moved[Direction.HOST_TO_DRIVE] + len(entries) * SUBMISSION_ENTRY.itemsize
            )
            self.counters.bytes_from_drive += moved[_DRIVE_TO_HOST] + len(entries) * COMPLETION_ENTRY.itemsize

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True)


class InprocConnection:
    """One queue pair's end inside the drive."""

    def __init__(self, transport: InprocTransport, queue_id: int):
        self._transport = transport
        self._queue_id = queue_id
        self._arrived: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        completions = self._transport._controller.execute(self._queue_id, entries, buffers)
        self._transport._count(entries, buffers, completions)
        return completions

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        if self._transport._threads is None:
            self._run(entries, buffers)
        else:
            self._transport._threads.submit(carried(self._run), entries.copy(), list(buffers))

    def _run(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._arrived.put(self.execute(entries, buffers))

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        return execute_in_batches(self, entries, addresses, lengths, depth)

    def poll(self, wait: bool) -> np.ndarray:
        arrived = []
        if wait:
            arrived.append(self._arrived.get())
        while not self._arrived.empty():
            arrived.append(self._arrived.get())
        return np.concatenate(arrived) if arrived else np.empty(0, COMPLETION_ENTRY)

    def close(self) -> None:
        """Nothing to release: the controller keeps no state per queue."""
