"""Writing behind whoever writes from front to back: large writes are accepted, and reach the drive meanwhile.

Who writes past the kernel's cache (O_DIRECT) sends one piece at a time, and the drive would have nothing to do
in between; and one batch of several pieces is over sooner than the pieces one by one. It is the volatile write
cache of any drive: nothing of it is durable before a sync, which waits for it, and so does everybody who wants
to know what is in the file.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kvfs.files.extent_map import MAX_BLOCK
from kvfs.files.inode import Inode
from spdk_glue.namespace import Namespace

MIN_BYTES = 256 << 10  # of a write; smaller ones are over sooner than another thread has them
MAX_BYTES = 2 << 20  # so much is a batch of its own
BATCH_BYTES = 4 << 20
LIMIT_BYTES = 8 << 20  # accepted and not written: one batch is under way, another is being gathered
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Write:
    """first, stop: blocks of the file; buffer: what the pieces are of, or a pool would take it back"""

    number: int
    inode: Inode
    first: int
    stop: int
    pieces: Sequence[tuple[int, np.ndarray]]
    buffer: np.ndarray


class WriteBehind:
    """Writes in the order in which they were accepted. Safe to call from several threads.

    is_in_background: False has all of it done by those who wait, as late as can be
    min_bytes: of a write that is taken
    """

    def __init__(self, namespace: Namespace, placement_id: int):
        self._namespace = namespace
        self._placement_id = placement_id
        self._changed = threading.Condition()
        self._accepted: deque[_Write] = deque()
        self._under_way: list[_Write] = []
        self._num_bytes = 0  # of both
        self._last_number = 0  # of what was accepted
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self.is_in_background = True
        self.min_bytes = MIN_BYTES

    def takes(self, num_bytes: int) -> bool:
        return self.min_bytes <= num_bytes <= MAX_BYTES

    def start(
        self, inode: Inode, first: int, stop: int, pieces: Sequence[tuple[int, np.ndarray]], buffer: np.ndarray
    ) -> None:
        """Accept to write blocks [first, stop) of a file.

        pieces: of the buffer, with their LBAs; nobody may change it any more.
        """
        with self._changed:
            while self._num_bytes and self._num_bytes + buffer.nbytes > LIMIT_BYTES:
                self._go_on()
            self._last_number += 1
            self._accepted.append(_Write(self._last_number, inode, first, stop, pieces, buffer))
            self._num_bytes += buffer.nbytes
            inode.num_writes_behind += 1
            if self._thread is None and self.is_in_background:
                self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, inode: Inode | None = None, first: int = 0, stop: int = MAX_BLOCK) -> None:
        """Until what was accepted for these blocks of a file, or of any, is written; not for what comes later,
        which may never end. Errors wait for raise_error."""
        if inode is not None and not inode.num_writes_behind:
            return
        with self._changed:
            last_number = self._last_number
            while self._has(inode, first, stop, last_number):
                self._go_on()

    def touches(self, inode: Inode, first: int, stop: int) -> bool:
        """Whether anything is on its way to these blocks."""
        if not inode.num_writes_behind:
            return False
        with self._changed:
            return self._has(inode, first, stop, self._last_number)

    @staticmethod
    def raise_error(inode: Inode) -> None:
        """Tell, once, of a write that was accepted and failed."""
        error, inode.write_error = inode.write_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Write what was accepted, then end."""
        self.wait()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # with self._changed held

    def _has(self, inode: Inode | None, first: int, stop: int, last_number: int) -> bool:
        return any(
            write.number <= last_number
            and (inode is None or write.inode is inode)
            and first < write.stop
            and write.first < stop
            for write in chain(self._under_way, self._accepted)
        )

    def _work(self) -> None:
        with self._changed:
            while not self._is_closed:
                if self._accepted:
                    self._go_on()
                else:
                    self._changed.wait()

    def _go_on(self) -> None:
        """Wait for the batch under way; where there is none, write one."""
        if self._under_way:
            self._changed.wait()
            return
        num_bytes = 0
        while self._accepted and num_bytes + self._accepted[0].buffer.nbytes <= BATCH_BYTES:
            self._under_way.append(self._accepted.popleft())
            num_bytes += self._under_way[-1].buffer.nbytes
        self._changed.release()
        try:
            self._write(self._under_way)
        finally:
            self._changed.acquire()
            for write in self._under_way:
                write.inode.num_writes_behind -= 1
            self._under_way = []
            self._num_bytes -= num_bytes
            self._changed.notify_all()

    # without

    def _write(self, writes: Sequence[_Write]) -> None:
        try:
            pieces = [piece for write in writes for piece in write.pieces]
            self._namespace.write_scattered(pieces, self._placement_id)
        except Exception as error:
            if len(writes) == 1:
                log.error("inode %d: what was written to it is lost: %s", writes[0].inode.id, error)
                writes[0].inode.write_error = error
                return
            for write in writes:  # one at a time, to know which
                self._write([write])
