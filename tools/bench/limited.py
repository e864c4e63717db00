"""Parts that are no faster than told, by sleeping without the GIL: what is measured is the part's limit."""

import threading
import time
from collections.abc import Sequence

import numpy as np

from accel.drive import Geometry
from ftl.media_memory import MemoryMedia
from spdk_glue.queue_pair import Buffer
from spdk_glue.transports.inproc import InprocTransport


class _Rate:
    """So many bytes a second, for whoever asks, one after another."""

    def __init__(self, bytes_per_second: float):
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_through(self, num_bytes: int) -> None:
        with self._lock:
            self._free_at = done = max(self._free_at, time.monotonic()) + num_bytes / self._bytes_per_second
        time.sleep(max(0.0, done - time.monotonic()))


class LimitedMedia(MemoryMedia):
    """Flash that delivers bytes_per_second, once `is_limited` is set."""

    def __init__(self, geometry: Geometry, bytes_per_second: float):
        super().__init__(geometry)
        self._rate = _Rate(bytes_per_second)
        self.is_limited = False

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        found = super().read(pages, addresses)
        if self.is_limited:
            self._rate.pass_through(len(pages) * self.geometry.page_size)
        return found


class LimitedLink:
    """What a drive's transport carries to the host, limited to bytes_per_second once `is_limited` is set."""

    def __init__(self, transport: InprocTransport, bytes_per_second: float):
        self._rate = _Rate(bytes_per_second)
        self._transport = transport
        self._count = transport._count
        self.is_limited = False
        transport._count = self._limited_count  # where every command's bytes are counted, behind its execution

    def _limited_count(self, entries: np.ndarray, buffers: Sequence[Buffer], completions: np.ndarray) -> None:
        before = self._transport.counters.bytes_from_drive
        self._count(entries, buffers, completions)
        if self.is_limited:
            self._rate.pass_through(self._transport.counters.bytes_from_drive - before)
