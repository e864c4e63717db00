"""When flash would have done what a medium was asked to: modelled time, never slept.

Every die, every channel and the link to the host are queues that serve one operation after another, in the
order they were asked. A page that is read takes the die (tR), then its channel, then the link; one that is
programmed takes the link, its channel, then the die (tPROG). Dies have a cache register: a page crosses the
channel while the die still works on another. Pages of the same row on the planes of one die, asked for one
after another, are one operation of the die.

What the caller waits for moves `now_ns`: a read until its last byte has crossed the link; a program until its
data has crossed the link and the batch before it is in flash, for the drive buffers one batch; an erase for
nothing; a sync for everything.
"""

import threading
from dataclasses import dataclass

import numpy as np
from numba import njit

from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media import FlashMedia


@dataclass(frozen=True)
class NandTiming:
    """The defaults are those of TLC flash behind PCIe 3.0 x4."""

    read_ns: int = 50_000  # tR, from the cells to the page register
    program_ns: int = 600_000  # tPROG
    erase_ns: int = 3_000_000  # tBERS
    channel_bytes_per_s: float = 1.2e9
    link_bytes_per_s: float = 3.5e9

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")


def transfer_ns(num_bytes: int, bytes_per_s: float) -> int:
    return round(num_bytes * 1e9 / bytes_per_s)


@njit(cache=True)
def _is_same_operation(last_row, pages, position, num_dies, num_planes):
    """Whether this page's row is the one that its die was last asked for in this batch; notes it."""
    row, plane = divmod(pages[position], num_planes)
    die = plane % num_dies
    same = last_row[die] == row
    last_row[die] = row
    return die, same


@njit(cache=True)
def _schedule_reads(now, pages, shape, costs, free, busy):
    """End of the batch.

    shape: numbers of dies, planes and channels; costs: ns of die, channel and link
    free, busy: int64 [num_dies + num_channels + 1], by die, then channel, then the link
    """
    num_dies, num_planes, num_channels = shape
    last_row = np.full(num_dies, -1, np.int64)
    link = num_dies + num_channels
    end = now
    for position in range(len(pages)):
        die, same = _is_same_operation(last_row, pages, position, num_dies, num_planes)
        if not same:
            free[die] = max(now, free[die]) + costs[0]
            busy[die] += costs[0]
        channel = num_dies + die % num_channels
        free[channel] = max(free[die], free[channel]) + costs[1]
        busy[channel] += costs[1]
        free[link] = max(free[channel], free[link]) + costs[2]
        busy[link] += costs[2]
        end = max(end, free[link])
    return end


@njit(cache=True)
def _schedule_programs(now, pages, shape, costs, free, busy):
    """(end on the link, end of the batch). Arguments as above."""
    num_dies, num_planes, num_channels = shape
    last_row = np.full(num_dies, -1, np.int64)
    link = num_dies + num_channels
    end = now
    for position in range(len(pages)):
        die, same = _is_same_operation(last_row, pages, position, num_dies, num_planes)
        free[link] = max(now, free[link]) + costs[2]
        busy[link] += costs[2]
        channel = num_dies + die % num_channels
        free[channel] = max(free[link], free[channel]) + costs[1]
        busy[channel] += costs[1]
        start = max(free[channel], free[die])
        if same:  # the operation waits for the data of its other planes
            start = max(free[channel], free[die] - costs[0])
        else:
            busy[die] += costs[0]
        free[die] = start + costs[0]
        end = max(end, free[die])
    return free[link], end


class VirtualClock:
    """Modelled time of one drive, in ns since it was made. Thread-safe.

    now_ns: what the caller has waited so far
    """

    def __init__(self, geometry: Geometry, timing: NandTiming | None = None):
        self.geometry = geometry
        self.timing = timing or NandTiming()
        self.now_ns = 0
        self.bytes_read = self.bytes_programmed = 0
        self._shape = geometry.num_dies, geometry.num_planes, geometry.num_channels
        num_queues = geometry.num_dies + geometry.num_channels + 1  # dies, channels, link
        self._free = np.zeros(num_queues, np.int64)  # when each is done with what it was asked
        self._busy = np.zeros(num_queues, np.int64)
        self._buffered_until = 0  # when the batch in the drive's buffer is in flash
        self._lock = threading.Lock()

    def _costs(self, die_ns: int, num_bytes: int) -> tuple[int, int, int]:
        timing = self.timing
        channel_ns = transfer_ns(num_bytes, timing.channel_bytes_per_s)
        return die_ns, channel_ns, transfer_ns(num_bytes, timing.link_bytes_per_s)

    def read(self, pages: np.ndarray, num_bytes: int | None = None) -> tuple[int, int]:
        """(start, end) of reading num_bytes of each page, by default all; the caller waits for the end."""
        with self._lock:
            start, costs = self.now_ns, self._costs(self.timing.read_ns, num_bytes or self.geometry.page_size)
            self.now_ns = _schedule_reads(start, pages, self._shape, costs, self._free, self._busy)
            self.bytes_read += len(pages) * (num_bytes or self.geometry.page_size)
            return start, self.now_ns

    def program(self, pages: np.ndarray) -> tuple[int, int]:
        """(start, end) of programming pages; the caller waits until the drive has taken them over."""
        with self._lock:
            start, costs = self.now_ns, self._costs(self.timing.program_ns, self.geometry.page_size)
            taken, end = _schedule_programs(start, pages, self._shape, costs, self._free, self._busy)
            if len(pages):
                self.now_ns = max(taken, self._buffered_until)
                self._buffered_until = end
            self.bytes_programmed += len(pages) * self.geometry.page_size
            return start, end

    def erase(self, planes: np.ndarray) -> tuple[int, int]:
        """(start, end) of erasing a block on each plane, int64 [k]; the caller does not wait."""
        with self._lock:
            dies = np.unique(planes % self.geometry.num_dies)
            self._free[dies] = np.maximum(self.now_ns, self._free[dies]) + self.timing.erase_ns
            self._busy[dies] += self.timing.erase_ns
            return self.now_ns, int(self._free[dies].max(initial=self.now_ns))

    def sync(self) -> tuple[int, int]:
        """(start, end) of waiting for all that was asked."""
        with self._lock:
            start, self.now_ns = self.now_ns, max(self.now_ns, int(self._free.max()))
            return start, self.now_ns

    def advance(self, duration_ns: int) -> None:
        """The caller does something else, while the flash goes on."""
        with self._lock:
            self.now_ns += duration_ns

    @property
    def die_busy_ns(self) -> np.ndarray:
        """int64 [num_dies]."""
        return self._busy[: self.geometry.num_dies].copy()

    @property
    def channel_busy_ns(self) -> np.ndarray:
        """int64 [num_channels]."""
        return self._busy[self.geometry.num_dies : -1].copy()

    @property
    def link_busy_ns(self) -> int:
        return int(self._busy[-1])

    @property
    def end_ns(self) -> int:
        """When everything asked so far is done; not before now_ns."""
        return max(self.now_ns, int(self._free.max()))

    def report(self) -> dict[str, float]:
        """Times in ns, shares of the time until end_ns, modelled bandwidths in bytes/s."""
        end = max(self.end_ns, 1)
        return {
            "now_ns": self.now_ns,
            "end_ns": self.end_ns,
            "read_bytes_per_s": self.bytes_read * 1e9 / end,
            "program_bytes_per_s": self.bytes_programmed * 1e9 / end,
            "die_busy_share": float(self.die_busy_ns.mean()) / end,
            "channel_busy_share": float(self.channel_busy_ns.mean()) / end,
            "link_busy_share": self.link_busy_ns / end,
        }


class TimedMedia:
    """Any medium, with what its verbs would take noted on a clock; everything else is the medium's own.

    A verb that fails has taken its time.
    """

    plain_file = None

    def __init__(self, media: FlashMedia, clock: VirtualClock):
        self._media, self.clock = media, clock

    def __getattr__(self, name):
        return getattr(self._media, name)

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        self.clock.read(np.ascontiguousarray(pages, np.int64))
        return self._media.read(pages, addresses)

    def read_oob(self, superblock: int) -> np.ndarray:
        size = self._media.geometry.pages_per_superblock
        self.clock.read(np.arange(superblock * size, (superblock + 1) * size), PAGE_OOB.itemsize)
        return self._media.read_oob(superblock)

    def read_oob_pages(self, pages: np.ndarray) -> np.ndarray:
        self.clock.read(np.ascontiguousarray(pages, np.int64), PAGE_OOB.itemsize)
        return self._media.read_oob_pages(pages)

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        self.clock.program(np.ascontiguousarray(pages, np.int64))
        self._media.program(pages, addresses, oob, stream)

    def erase(self, superblock: int) -> None:
        self.clock.erase(np.flatnonzero(~self._media.bad_blocks()[superblock]))
        self._media.erase(superblock)

    def sync(self) -> None:
        self.clock.sync()
        self._media.sync()
