"""The drive's DRAM read cache, which is also the buffer pool that flash reads land in.

Attention kernels read straight from its slots, so a page crosses memory once. A slot holds a line: a run
of physical neighbours, filled page by page (`slot_valid` has a bit per page). Pages in use are pinned.

Replacement is SIEVE (Zhang et al., NSDI 2024): new lines enter at the head of a queue, a hand walks from
the tail and takes the first line that was not hit since it last passed. A scan larger than the cache, as
every decode step over a long context is, evicts its own newcomers and leaves part of the cache useful.

Keys are physical pages: what they hold cannot change until the erase that `drop` announces.
"""

import threading

import numpy as np
from numba import njit

from spdk_glue import dma

LINE_BYTES = 64 << 10  # one head's K of a 256-token group at head_dim 128, fp16
NONE = -1

# Columns of the per-slot state table.
_LINE, _PINS, _VISITED, _NEWER, _OLDER, _VALID = range(6)
# Entries of the queue's state.
_HEAD, _TAIL, _HAND, _USED = range(4)


@njit(nogil=True, cache=True)
def _unlink(slots, queue, slot):
    newer, older = slots[slot, _NEWER], slots[slot, _OLDER]
    if newer != NONE:
        slots[newer, _OLDER] = older
    else:
        queue[_HEAD] = older
    if older != NONE:
        slots[older, _NEWER] = newer
    else:
        queue[_TAIL] = newer
    if queue[_HAND] == slot:
        queue[_HAND] = newer


@njit(nogil=True, cache=True)
def _push_head(slots, queue, slot):
    slots[slot, _NEWER] = NONE
    slots[slot, _OLDER] = queue[_HEAD]
    if queue[_HEAD] != NONE:
        slots[queue[_HEAD], _NEWER] = slot
    queue[_HEAD] = slot
    if queue[_TAIL] == NONE:
        queue[_TAIL] = slot


@njit(nogil=True, cache=True)
def _take_slot(slots, queue, line_slot):
    """A slot for a new line, or NONE when every slot is pinned."""
    if queue[_USED] < len(slots):
        queue[_USED] += 1
        return queue[_USED] - 1
    for _ in range(2 * len(slots) + 1):
        hand = queue[_HAND]
        if hand == NONE:
            hand = queue[_TAIL]
            if hand == NONE:
                return NONE
        if slots[hand, _PINS] == 0:
            if slots[hand, _VISITED] == 0:
                queue[_HAND] = slots[hand, _NEWER]
                _unlink(slots, queue, hand)
                if slots[hand, _LINE] != NONE:
                    line_slot[slots[hand, _LINE]] = 0
                return hand
            slots[hand, _VISITED] = 0
        queue[_HAND] = slots[hand, _NEWER]
    return NONE


@njit(nogil=True, cache=True)
def _run_in_line(pages, first, line_shift):
    """Where the run of consecutive pages of one line ends that starts at position `first`."""
    page = pages[first]
    stop = min(len(pages), first + (((page >> line_shift) + 1) << line_shift) - page)
    position = first + 1
    while position < stop and pages[position] == page + (position - first):
        position += 1
    return position


@njit(nogil=True, cache=True)
def _release(slots, line_slot, line_shift, pages):
    first = 0
    while first < len(pages):
        stop = _run_in_line(pages, first, line_shift)
        slots[line_slot[pages[first] >> line_shift] - 1, _PINS] -= stop - first
        first = stop


@njit(nogil=True, cache=True)
def _acquire(slots, queue, line_slot, line_shift, page_size, arena, pages, addresses, missing):
    """Pin every page; number of missing ones (their positions in `missing`), or NONE if slots ran out."""
    num_missing = 0
    first = 0
    while first < len(pages):  # neighbours mostly share a line
        stop = _run_in_line(pages, first, line_shift)
        line = pages[first] >> line_shift
        bit = pages[first] - (line << line_shift)
        slot = np.int64(line_slot[line]) - 1
        if slot == NONE:
            slot = np.int64(_take_slot(slots, queue, line_slot))
            if slot == NONE:
                _release(slots, line_slot, line_shift, pages[:first])
                return NONE
            slots[slot, _LINE] = line
            slots[slot, _VISITED] = 0
            slots[slot, _VALID] = 0
            slots[slot, _PINS] = 0
            _push_head(slots, queue, slot)
            line_slot[line] = slot + 1
        slots[slot, _PINS] += stop - first
        address = arena + np.uint64(((slot << line_shift) + bit) * page_size)
        for position in range(first, stop):
            addresses[position] = address
            address += np.uint64(page_size)
        valid = slots[slot, _VALID] >> bit
        wanted = (np.int64(1) << (stop - first)) - 1
        if valid & wanted:
            slots[slot, _VISITED] = 1
        if valid & wanted != wanted:
            for position in range(first, stop):
                if not valid >> (position - first) & 1:
                    missing[num_missing] = position
                    num_missing += 1
        first = stop
    return num_missing


@njit(nogil=True, cache=True)
def _mark_valid(slots, line_slot, line_shift, pages):
    for page in pages:
        line = page >> line_shift
        slots[line_slot[line] - 1, _VALID] |= np.int64(1) << (page - (line << line_shift))


@njit(nogil=True, cache=True)
def _drop(slots, queue, line_slot, first_line, stop_line):
    for line in range(first_line, stop_line):
        slot = line_slot[line] - 1
        if slot != NONE:
            slots[slot, _LINE] = NONE  # the slot stays queued, unvisited: the hand will take it
            slots[slot, _VISITED] = 0
            slots[slot, _VALID] = 0
            line_slot[line] = 0


class PageCache:
    """Pinned, verified pages in one arena. All methods are thread-safe."""

    def __init__(self, capacity_bytes: int, page_size: int, num_pages: int):
        """num_pages: physical pages of the drive (the index takes 4 bytes per line of them)."""
        self._line_shift = max(0, (LINE_BYTES // page_size).bit_length() - 1)
        self.line_pages = 1 << self._line_shift
        line_bytes = self.line_pages * page_size
        num_slots = max(1, capacity_bytes // line_bytes)
        self.capacity_bytes = num_slots * line_bytes
        self.page_size = page_size
        self._arena = dma.allocate(self.capacity_bytes)
        self._arena_address = np.uint64(dma.address_of(self._arena))
        self._line_slot = np.zeros(-(-num_pages // self.line_pages), np.int32)
        self._slots = np.zeros((num_slots, 6), np.int64)
        self._queue = np.array([NONE, NONE, NONE, 0], np.int64)
        self._changed = threading.Condition()

    @property
    def bytes_used(self) -> int:
        return int(self._queue[_USED]) * self.line_pages * self.page_size

    def acquire(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pin physical pages, int64 [n]: (addresses uint64 [n], positions int64 of those to be read).

        Blocks while other holders pin too much. The caller reads the missing ones to their addresses,
        calls `mark_valid` on them, and later `release` on all.
        """
        addresses = np.empty(len(pages), np.uint64)
        missing = np.empty(len(pages), np.int64)
        with self._changed:
            while True:
                count = _acquire(
                    self._slots,
                    self._queue,
                    self._line_slot,
                    self._line_shift,
                    self.page_size,
                    self._arena_address,
                    pages,
                    addresses,
                    missing,
                )
                if count != NONE:
                    return addresses, missing[:count]
                if not self._slots[:, _PINS].any():
                    raise MemoryError(
                        f"{len(pages)} pages at once do not fit a cache of {self.capacity_bytes} bytes"
                    )
                self._changed.wait()

    def mark_valid(self, pages: np.ndarray) -> None:
        """These pinned pages have been read and their checksums hold."""
        with self._changed:
            _mark_valid(self._slots, self._line_slot, self._line_shift, pages)

    def release(self, pages: np.ndarray) -> None:
        with self._changed:
            _release(self._slots, self._line_slot, self._line_shift, pages)
            self._changed.notify_all()

    def drop(self, first_page: int, num_pages: int) -> None:
        """Forget pages that were erased. None of them is pinned: erases wait for readers."""
        with self._changed:
            _drop(
                self._slots,
                self._queue,
                self._line_slot,
                first_page // self.line_pages,
                -(-(first_page + num_pages) // self.line_pages),
            )

    def clear(self) -> None:
        """Forget everything that is not pinned (benchmarks start cold with it)."""
        with self._changed:
            for slot in np.flatnonzero((self._slots[:, _PINS] == 0) & (self._slots[:, _VALID] != 0)):
                self._line_slot[self._slots[slot, _LINE]] = 0
                self._slots[slot, _LINE] = NONE
                self._slots[slot, _VISITED] = 0
                self._slots[slot, _VALID] = 0
