"""LMCache's memory in huge pages, as far as the kernel has some.

A transfer of 1 MiB from ordinary pages is 256 pieces for kernel and drive, from huge ones a single piece. What
LMCache has touched already is gathered into huge pages in the background, what it touches later begins as such.
A kernel that cannot, or memory that is pinned for a GPU or of huge pages by itself, stays as it is.
"""

import ctypes
import mmap
import threading

from spdk_glue.dma import HUGE_PAGE

MADV_COLLAPSE = 25  # Linux 6.1; not in Python's mmap
STEP_BYTES = 16 * HUGE_PAGE  # of one system call: closing waits for no more

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class HugePages:
    """address, size_bytes: of memory that stays mapped until `close`."""

    def __init__(self, address: int, size_bytes: int):
        self._start = -(-address // HUGE_PAGE) * HUGE_PAGE
        self._stop = (address + size_bytes) // HUGE_PAGE * HUGE_PAGE
        self._is_ending = threading.Event()
        self._thread: threading.Thread | None = None
        if self._start < self._stop and self._advise(self._start, self._stop, mmap.MADV_HUGEPAGE):
            self._thread = threading.Thread(target=self._gather, name="kvfs-huge-pages", daemon=True)
            self._thread.start()

    @staticmethod
    def _advise(start: int, stop: int, advice: int) -> bool:
        return _libc.madvise(start, stop - start, advice) == 0

    def _gather(self) -> None:
        for start in range(self._start, self._stop, STEP_BYTES):
            if self._is_ending.is_set():
                return
            self._advise(
                start, min(start + STEP_BYTES, self._stop), MADV_COLLAPSE
            )  # fails where all is untouched

    @property
    def is_gathering(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        self._is_ending.set()
        if self._thread is not None:
            self._thread.join()
