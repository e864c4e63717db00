"""Reading ahead of who reads from front to back: the next pieces are read while one is on its way.

The kernel does so for whoever reads through its cache. Past it (O_DIRECT) a reader asks for one piece at a
time, and the drive would have nothing to do in between.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

NUM_THREADS = 3
NUM_PIECES = 4  # ahead; each as large as the one that was asked for
MIN_BYTES = 256 << 10  # of a piece

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-ahead")


class ReadAhead:
    """For one reader. Safe to call from several threads.

    read: gives up to so many bytes (offset, size); size: where there are none any more
    version: what was read early holds if this is the same before that and when it is wanted; None: nothing is
        to be read early
    """

    def __init__(
        self,
        read: Callable[[int, int], memoryview | bytes],
        size: Callable[[], int],
        version: Callable[[], object | None],
    ):
        self._read, self._size, self._version = read, size, version
        self._lock = threading.Lock()
        self._end = 0  # of the last piece
        self._ahead: dict[tuple[int, int], tuple[object, Future]] = {}  # by offset and size

    def read(self, offset: int, size: int) -> memoryview | bytes:
        with self._lock:
            early = self._ahead.pop((offset, size), None)
            is_next, self._end = early is not None or offset == self._end, offset + size
            if not is_next:
                self._ahead.clear()
            elif size >= MIN_BYTES:
                self._read_ahead(offset, size)
        if early is not None:
            version, future = early
            if version == self._version():  # nor is the error of an early read told once it may be mended
                return future.result()
        return self._read(offset, size)

    def _read_ahead(self, offset: int, size: int) -> None:
        version = self._version()
        if version is None:
            return
        for start in range(offset + size, min(offset + (NUM_PIECES + 1) * size, self._size()), size):
            if (start, size) not in self._ahead:
                self._ahead[start, size] = version, _threads.submit(self._read, start, size)

    def clear(self) -> None:
        """Nobody wants what was read early."""
        with self._lock:
            self._ahead.clear()
