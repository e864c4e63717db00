"""Where time is measured: a probe counts durations in a histogram, and adds a span while a trace is on.

Attention over a few hundred tokens takes 0.2 ms and passes five probes, after its data have driven their code
out of the CPU's caches. So a probe only appends a number to a deque, which needs no lock, and looks at one
branch; whoever reads the histogram, or finds the deque long, counts its numbers into buckets, all at once.

Buckets are powers of two. Bucket i holds durations below BOUNDS_NS[i] and not below the bound before; the last
holds what is longer than all bounds.
"""

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from time import perf_counter_ns

import numpy as np

from spdk_glue.trace import TRACE

SMALLEST_BITS = 10  # 1.024 us: less is noise of the clock and of the call
MAX_UNCOUNTED = 1024  # 40 KiB at most, counted in 0.1 ms
NUM_BUCKETS = 27  # to 34 s, and what is longer
BOUNDS_NS = tuple(1 << SMALLEST_BITS + i for i in range(NUM_BUCKETS - 1))

# A log page of durations: one record for each probe of the drive. Also how histograms travel between processes.
LATENCY_RECORD = np.dtype(
    [
        ("layer", "S8"),
        ("name", "S24"),
        ("sum_ns", "<u8"),
        ("counts", "<u8", NUM_BUCKETS),
    ]
)
assert LATENCY_RECORD.itemsize == 256
MAX_PROBES = 16  # of a drive: its log page has this many records, unused ones with an empty name


class Probe:
    """One kind of work of one layer. Safe to use from several threads."""

    __slots__ = ("_append", "_counts", "_durations", "_lock", "_sum_ns", "is_wait", "layer", "name")

    def __init__(self, layer: str, name: str, is_wait: bool = False):
        self.layer, self.name, self.is_wait = layer, name, is_wait
        self._lock = threading.Lock()
        self._counts = np.zeros(NUM_BUCKETS, np.int64)
        self._sum_ns = 0
        self._durations: deque[int] = deque()  # not counted yet
        self._append = self._durations.append

    def since(self, start_ns: int, count: int = 1, note: dict | None = None) -> None:
        """`count` pieces of work, done at once, have ended that began at start_ns of perf_counter_ns."""
        stop_ns = perf_counter_ns()
        if count == 1 and not TRACE.is_on and len(self._durations) < MAX_UNCOUNTED:
            self._append(stop_ns - start_ns)  # as `between` would: a call less on the data path
        else:
            self.between(start_ns, stop_ns, count, note)

    def between(self, start_ns: int, stop_ns: int, count: int = 1, note: dict | None = None) -> None:
        if count == 1:
            self._append(stop_ns - start_ns)
            if len(self._durations) >= MAX_UNCOUNTED:
                self._count()
        else:
            self._add(np.array([stop_ns - start_ns]), count)
        if TRACE.is_on:
            TRACE.add(self.layer, self.name, start_ns, stop_ns, note, self.is_wait)

    def _count(self) -> None:
        """What is in the deque goes into buckets."""
        taken = []
        with suppress(IndexError):  # another thread may take, too
            while len(taken) < MAX_UNCOUNTED:
                taken.append(self._durations.popleft())
        if taken:
            self._add(np.array(taken), 1)

    def _add(self, durations: np.ndarray, count: int) -> None:
        buckets = np.frexp((durations >> SMALLEST_BITS).astype(np.float64))[1]  # numbers' lengths in bits
        counts = np.bincount(np.minimum(buckets, NUM_BUCKETS - 1), minlength=NUM_BUCKETS)
        with self._lock:
            self._counts += counts * count
            self._sum_ns += int(durations.sum()) * count

    def as_dict(self) -> dict:
        self._count()
        with self._lock:
            return {
                "layer": self.layer,
                "name": self.name,
                "sum_ns": self._sum_ns,
                "counts": self._counts.tolist(),
            }


class Probes:
    """Of one component, by layer and name; more than MAX_PROBES have no room in a log page."""

    def __init__(self, *probes: Probe):
        self._probes = probes

    def as_dicts(self) -> list[dict]:
        return [probe.as_dict() for probe in self._probes]

    def log_page(self) -> np.ndarray:
        """LATENCY_RECORD [MAX_PROBES]"""
        page = np.zeros(MAX_PROBES, LATENCY_RECORD)
        for record, found in zip(page, self.as_dicts(), strict=False):
            record["layer"], record["name"] = found["layer"].encode(), found["name"].encode()
            record["sum_ns"], record["counts"] = found["sum_ns"], found["counts"]
        return page


def from_log_page(records: Iterable[np.void]) -> list[dict]:
    """As Probes.as_dicts."""
    return [
        {
            "layer": record["layer"].decode(),
            "name": record["name"].decode(),
            "sum_ns": int(record["sum_ns"]),
            "counts": record["counts"].tolist(),
        }
        for record in records
        if record["name"]
    ]
