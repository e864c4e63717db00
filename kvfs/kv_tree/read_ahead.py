"""Reading ahead of who reads a snapshot from front to back: the next piece is read while one is on its way.

The kernel does so for whoever reads through its cache. Past it (O_DIRECT) a reader asks for one piece at a
time, and the drive would have nothing to do in between. A snapshot never changes: what was read early is right.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from kvfs.kv_tree.nodes import OpenContent

NUM_THREADS = 2
NUM_PIECES = 2  # ahead; each as large as the one that was asked for
MIN_BYTES = 256 << 10  # of a piece

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="kv-read-ahead")


class ReadAhead(OpenContent):
    """One handle's view of a content. check: raises once the content is not to be had any more."""

    def __init__(self, content: OpenContent, check: Callable[[], None]):
        self.content = content
        self.size = content.size
        self._check = check
        self._lock = threading.Lock()
        self._end = 0  # of the last piece
        self._ahead: dict[tuple[int, int], Future] = {}  # by offset and size

    def read(self, offset: int, size: int) -> memoryview | bytes:
        with self._lock:
            early = self._ahead.pop((offset, size), None)
            is_next, self._end = early is not None or offset == self._end, offset + size
            if not is_next:
                self._ahead.clear()
            elif size >= MIN_BYTES:
                self._read_ahead(offset, size)
        if early is None:
            return self.content.read(offset, size)
        found = early.result()
        self._check()
        return found

    def _read_ahead(self, offset: int, size: int) -> None:
        for start in range(offset + size, min(offset + (NUM_PIECES + 1) * size, self.size), size):
            if (start, size) not in self._ahead:
                self._ahead[start, size] = _threads.submit(self.content.read, start, size)

    def release(self) -> None:
        self._ahead.clear()
