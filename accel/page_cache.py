"""The drive's DRAM read cache, which is also the buffer pool that flash reads land in.

Attention kernels read straight from its slots, so a page crosses memory once. A slot holds a line: a run
of physical neighbours, filled page by page (`_VALID` has a bit per page). Pages in use are pinned.

Decoding scans its context again and again, and a context larger than the cache leaves nothing to LRU, FIFO
or SIEVE: each line goes just before its turn. So replacement compares reuse distances, as LIRS does (Jiang
and Zhang, SIGMETRICS 2002), with a hand to find its victims, as CLOCK-Pro has it (Jiang, Chen and Zhang,
USENIX ATC 2005):

- Most slots are protected, the others on probation, in the order in which their lines came. A new line
  takes the oldest unpinned slot on probation.
- The index remembers when a line was missed. If it is missed again, and was away for less long than some
  protected line has been idle, it takes that one's slot and is protected itself.

In a loop no line qualifies, since every protected line is used once a round: what is protected stays and is
hit. When decoding moves on, what was protected falls idle and the new lines have its slots in their second
round. A scan that is not repeated changes nothing but probation.

What sparse attention reads of every token has priority: a line of it stands for several of tokens' own pages,
so it takes a place, and keeps its own, as if it was used so many times as often.

Keys are physical pages: what they hold cannot change until the erase that `drop` announces.
"""

import threading

import numpy as np
from numba import njit

from spdk_glue import dma

LINE_BYTES = 64 << 10  # one head's K of a 256-token group at head_dim 128, fp16
NONE = -1
TOO_MANY_LINES = -2

PROBATION_SHARE = 16  # one slot in so many: it serves reuse at short distance, which a loop has little of
HAND_STEPS = 8  # slots looked at for an idle line per line that comes back
# While probation is large, one newcomer in so many is protected unearned, which makes it small again (bimodal
# insertion: Qureshi et al., ISCA 2007).
BIMODAL = 32

PRIORITY = 7  # lines of tokens that a line of sketches stands for: 64 / 9

# Columns of the slot table. _USED: when the line was acquired last. _MISSED: when it was missed, and at which
# of its pages: (time, strangers, page) in bits. A line may have pages of several layers or sequences, and that
# another one wants its own part soon afterwards is no reuse. Such strangers are counted: after so many of them
# without the page it is out of use, and theirs is remembered.
_LINE, _PINS, _USED, _PROTECTED, _VALID, _MISSED, _PRIORITY = range(7)
NUM_COLUMNS = 7
PAGE_BITS, STRANGER_BITS = 6, 3
MAX_STRANGERS = (1 << STRANGER_BITS) - 1
# Entries of the state: acquires so far, lines missed so far, slots with pins, the hand, front and length of
# probation's ring.
_NOW, _MISSES, _PINNED, _HAND, _FRONT, _LENGTH = range(6)
# An entry of the index is a line's slot + 1. If it has none: its last slot's _MISSED, negative (0: it never had
# one), less WANTED while an acquire counts it.
WANTED = 1 << 62


@njit(nogil=True, cache=True)
def _push_probation(probation, state, slot):
    end = state[_FRONT] + state[_LENGTH]
    probation[end if end < len(probation) else end - len(probation)] = slot
    state[_LENGTH] += 1


@njit(nogil=True, cache=True)
def _pop_probation(slots, probation, state):
    """The oldest unpinned slot on probation, or NONE. Pinned ones go to the end, to be passed only once."""
    for _ in range(state[_LENGTH]):
        slot = probation[state[_FRONT]]
        state[_FRONT] = state[_FRONT] + 1 if state[_FRONT] + 1 < len(probation) else 0
        state[_LENGTH] -= 1
        if slots[slot, _PINS] == 0:
            return slot
        _push_probation(probation, state, slot)
    return NONE


@njit(nogil=True, cache=True)
def _find_protected(slots, state, away, has_priority, num_steps):
    """A protected, unpinned slot that is idle for longer than a line was away, if the hand meets one in
    num_steps; or NONE. A priority multiplies one of the times."""
    for _ in range(num_steps):
        slot = state[_HAND]
        state[_HAND] = slot + 1 if slot + 1 < len(slots) else 0
        if not slots[slot, _PROTECTED] or slots[slot, _PINS]:
            continue
        idle, longer = state[_NOW] - slots[slot, _USED], away
        if slots[slot, _PRIORITY] < has_priority:
            idle *= PRIORITY
        elif slots[slot, _PRIORITY] > has_priority:
            longer *= PRIORITY
        if idle > longer:
            return slot
    return NONE


@njit(nogil=True, cache=True)
def _take_slot(slots, probation, state, index, away_since, has_priority):
    """A slot for a line that is away since then (0: for ever). Not all slots are pinned."""
    idle = NONE
    if away_since:
        idle = _find_protected(slots, state, state[_NOW] - away_since, has_priority, HAND_STEPS)
    # probation has more than its share when slots are empty, or were pinned in large numbers
    is_large = state[_LENGTH] > max(1, len(slots) // PROBATION_SHARE)
    slot = _pop_probation(slots, probation, state) if is_large or idle == NONE else NONE
    protect = idle != NONE
    if slot != NONE:
        protect |= is_large and (slots[slot, _LINE] == NONE or state[_MISSES] % BIMODAL == 0)
    elif idle != NONE:
        slot = idle
    else:
        slot = _find_protected(slots, state, -1, 0, len(slots))
    if slots[slot, _LINE] != NONE:
        index[slots[slot, _LINE]] = -slots[slot, _MISSED]
    slots[slot, _PROTECTED] = protect
    slots[slot, _PRIORITY] = has_priority
    if not protect:
        _push_probation(probation, state, slot)
    return slot


@njit(nogil=True, cache=True)
def _bring_in(slots, probation, state, index, line, page, has_priority):
    """Give a line a slot with no page valid. page: the first one wanted, counted in the line."""
    missed = -index[line]
    is_same_page = missed & ((1 << PAGE_BITS) - 1) == page
    missed_at = missed >> (PAGE_BITS + STRANGER_BITS)
    slot = _take_slot(slots, probation, state, index, missed_at if is_same_page else 0, has_priority)
    state[_MISSES] += 1
    if missed == 0 or is_same_page or missed >> PAGE_BITS & MAX_STRANGERS == MAX_STRANGERS:
        missed = state[_NOW] << (PAGE_BITS + STRANGER_BITS) | page
    else:
        missed += 1 << PAGE_BITS
    slots[slot, _LINE] = line
    slots[slot, _USED] = state[_NOW]
    slots[slot, _VALID] = 0
    slots[slot, _MISSED] = missed
    index[line] = slot + 1


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
def _release(slots, state, index, line_shift, pages):
    """Unpin; what has no slot has no pins either."""
    first = 0
    while first < len(pages):
        stop = _run_in_line(pages, first, line_shift)
        slot = index[pages[first] >> line_shift] - 1
        if slot >= 0:
            slots[slot, _PINS] -= stop - first
            state[_PINNED] -= slots[slot, _PINS] == 0
        first = stop


@njit(nogil=True, cache=True)
def _acquire(
    slots,
    probation,
    state,
    index,
    line_shift,
    page_size,
    arena,
    pages,
    max_lines,
    has_priority,
    addresses,
    missing,
):
    """Pin every page; number of missing ones (their positions in `missing`), or why none is pinned: NONE if
    slots ran out, TOO_MANY_LINES."""
    state[_NOW] += 1
    now = state[_NOW]
    num_lines = 0
    num_absent = 0
    num_missing = 0
    first = 0
    # what is there is pinned and what is not is counted, so that nothing is evicted in vain
    while first < len(pages):  # neighbours mostly share a line
        stop = _run_in_line(pages, first, line_shift)
        line = pages[first] >> line_shift
        slot = index[line] - 1
        if slot >= 0:
            bit = pages[first] - (line << line_shift)
            if slots[slot, _USED] != now:
                slots[slot, _USED] = now
                num_lines += 1
            state[_PINNED] += slots[slot, _PINS] == 0
            slots[slot, _PINS] += stop - first
            address = arena + np.uint64(((slot << line_shift) + bit) * page_size)
            for position in range(first, stop):
                addresses[position] = address
                address += np.uint64(page_size)
            valid = slots[slot, _VALID] >> bit
            wanted = (np.int64(1) << (stop - first)) - 1
            if valid & wanted != wanted:
                for position in range(first, stop):
                    if not valid >> (position - first) & 1:
                        missing[num_missing] = position
                        num_missing += 1
        else:
            if index[line] > -WANTED:
                index[line] -= WANTED
                num_absent += 1
            for position in range(first, stop):
                addresses[position] = 0
                missing[num_missing] = position
                num_missing += 1
        first = stop

    failure = 0
    if num_lines + num_absent > max_lines:
        failure = TOO_MANY_LINES
    elif num_absent > len(slots) - state[_PINNED]:
        failure = NONE
    for position in missing[:num_missing]:
        if addresses[position] != 0:
            continue
        line = pages[position] >> line_shift
        bit = pages[position] - (line << line_shift)
        if index[line] <= -WANTED:
            index[line] += WANTED
            if not failure:
                _bring_in(slots, probation, state, index, line, bit, has_priority)
        if not failure:
            slot = index[line] - 1
            state[_PINNED] += slots[slot, _PINS] == 0
            slots[slot, _PINS] += 1
            addresses[position] = arena + np.uint64(((slot << line_shift) + bit) * page_size)
    if failure:
        _release(slots, state, index, line_shift, pages)
        return failure
    return num_missing


@njit(nogil=True, cache=True)
def _acquire_resident(
    slots, state, index, line_shift, page_size, arena, entries, lbas, lba_offset, max_lines, pages, addresses
):
    """Resolve and pin every page if all are valid here, in at most max_lines lines; else pin none."""
    state[_NOW] += 1
    now = state[_NOW]
    num_lines = 0
    first = 0
    while first < len(lbas):
        page = np.int64(entries[lbas[first] + lba_offset]) - 1
        line = page >> line_shift
        slot = index[line] - 1 if page >= 0 else np.int64(NONE)
        if slot < 0:
            break
        bit = page - (line << line_shift)
        stop = min(len(lbas), first + (1 << line_shift) - bit)
        position = first + 1
        while position < stop and np.int64(entries[lbas[position] + lba_offset]) - 1 == page + position - first:
            position += 1
        wanted = ((np.int64(1) << (position - first)) - 1) << bit
        if slots[slot, _USED] != now:
            slots[slot, _USED] = now
            num_lines += 1
        if slots[slot, _VALID] & wanted != wanted or num_lines > max_lines:
            break
        state[_PINNED] += slots[slot, _PINS] == 0
        slots[slot, _PINS] += position - first
        address = arena + np.uint64(((slot << line_shift) + bit) * page_size)
        for place in range(first, position):
            pages[place] = page + (place - first)
            addresses[place] = address
            address += np.uint64(page_size)
        first = position
    if first < len(lbas):
        _release(slots, state, index, line_shift, pages[:first])
        return False
    return True


@njit(nogil=True, cache=True)
def _are_here(slots, index, line_shift, pages):
    """Whether all are valid; of no consequence to what is evicted."""
    first = 0
    while first < len(pages):
        stop = _run_in_line(pages, first, line_shift)
        line = pages[first] >> line_shift
        slot = index[line] - 1
        if slot < 0:
            return False
        wanted = ((np.int64(1) << (stop - first)) - 1) << (pages[first] - (line << line_shift))
        if slots[slot, _VALID] & wanted != wanted:
            return False
        first = stop
    return True


@njit(nogil=True, cache=True)
def _look_for(slots, index, line_shift, pages, found):
    for position in range(len(pages)):
        line = pages[position] >> line_shift
        slot = index[line] - 1
        found[position] = slot >= 0 and slots[slot, _VALID] >> (pages[position] - (line << line_shift)) & 1


@njit(nogil=True, cache=True)
def _mark_valid(slots, index, line_shift, pages):
    for page in pages:
        line = page >> line_shift
        slots[index[line] - 1, _VALID] |= np.int64(1) << (page - (line << line_shift))


@njit(nogil=True, cache=True)
def _forget(slots, probation, state, index, slot):
    """Empty an unpinned slot; it is the next to be taken."""
    index[slots[slot, _LINE]] = 0
    slots[slot, _LINE] = NONE
    slots[slot, _VALID] = 0
    if slots[slot, _PROTECTED]:
        slots[slot, _PROTECTED] = 0
        state[_FRONT] = (state[_FRONT] - 1) % len(probation)
        state[_LENGTH] += 1
        probation[state[_FRONT]] = slot


@njit(nogil=True, cache=True)
def _drop(slots, probation, state, index, line_shift, first_page, stop_page):
    for line in range(first_page >> line_shift, ((stop_page - 1) >> line_shift) + 1):
        slot = index[line] - 1
        if slot < 0:
            index[line] = 0
            continue
        # a line may reach into a neighbour that was not erased
        first_bit = max(first_page - (line << line_shift), 0)
        num_bits = min(stop_page - (line << line_shift), 1 << line_shift) - first_bit
        slots[slot, _VALID] &= ~(((np.int64(1) << num_bits) - 1) << first_bit)
        if slots[slot, _VALID] == 0 and slots[slot, _PINS] == 0:
            _forget(slots, probation, state, index, slot)


@njit(nogil=True, cache=True)
def _clear(slots, probation, state, index):
    """How many lines were forgotten."""
    count = 0
    for slot in range(len(slots)):
        if slots[slot, _LINE] != NONE and slots[slot, _PINS] == 0:
            _forget(slots, probation, state, index, slot)
            count += 1
    return count
    for line in range(len(index)):
        index[line] = max(index[line], 0)


class PageCache:
    """Pinned, verified pages in one arena. All methods are thread-safe."""

    def __init__(self, capacity_bytes: int, page_size: int, num_pages: int):
        """num_pages: physical pages of the drive (the index takes 8 bytes per line of them)."""
        self._line_shift = max(0, (LINE_BYTES // page_size).bit_length() - 1)
        self.line_pages = 1 << self._line_shift
        line_bytes = self.line_pages * page_size
        self.num_lines = max(1, capacity_bytes // line_bytes)
        self.capacity_bytes = self.num_lines * line_bytes
        self.page_size = page_size
        self._arena = dma.allocate(self.capacity_bytes)
        self._arena_address = np.uint64(dma.address_of(self._arena))
        self._index = np.zeros(-(-num_pages // self.line_pages), np.int64)
        self._slots = np.zeros((self.num_lines, NUM_COLUMNS), np.int64)
        self._slots[:, _LINE] = NONE
        self._probation = np.arange(self.num_lines)  # a ring
        self._state = np.array([0, 0, 0, 0, 0, self.num_lines], np.int64)
        self._changed = threading.Condition()

    @property
    def bytes_used(self) -> int:
        return int((self._slots[:, _LINE] != NONE).sum()) * self.line_pages * self.page_size

    def acquire(
        self, pages: np.ndarray, max_lines: int | None = None, has_priority: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pin physical pages, int64 [n]: (addresses uint64 [n], positions int64 of those to be read).

        Blocks while other holders pin too much. The caller reads the missing ones to their addresses,
        calls `mark_valid` on them, and later `release` on all.

        has_priority: of lines that are not here yet. Raises MemoryError, with nothing pinned, if the pages lie
        in more than max_lines (None: the cache's) lines.
        """
        with self._changed:
            while True:
                found = self.acquire_now(pages, max_lines, has_priority)
                if found is not None:
                    return found
                self._changed.wait()

    def acquire_now(
        self, pages: np.ndarray, max_lines: int | None = None, has_priority: bool = False
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """As `acquire`; None, with nothing pinned, where that would block."""
        max_lines = self.num_lines if max_lines is None else max_lines
        addresses = np.empty(len(pages), np.uint64)
        missing = np.empty(len(pages), np.int64)
        with self._changed:
            count = _acquire(
                self._slots,
                self._probation,
                self._state,
                self._index,
                self._line_shift,
                self.page_size,
                self._arena_address,
                pages,
                max_lines,
                int(has_priority),
                addresses,
                missing,
            )
        if count == TOO_MANY_LINES:
            raise MemoryError(f"{len(pages)} pages are scattered over more than {max_lines} lines")
        return None if count < 0 else (addresses, missing[:count])

    def acquire_resident(
        self,
        entries: np.ndarray,
        lbas: np.ndarray,
        lba_offset: int,
        max_lines: int,
        pages: np.ndarray,
        addresses: np.ndarray,
    ) -> bool:
        """Pin the pages that LBAs are mapped to, if all are here, in max_lines lines at most. Never blocks.

        entries: the map's, page + 1 by LBA; lbas: int64 [n], to which lba_offset is added. Fills pages, int64
        [n], for `release`, and addresses, uint64 [n]. False: nothing is pinned.
        """
        with self._changed:
            return _acquire_resident(
                self._slots,
                self._state,
                self._index,
                self._line_shift,
                self.page_size,
                self._arena_address,
                entries,
                lbas,
                lba_offset,
                max_lines,
                pages,
                addresses,
            )

    def acquire_if_here(self, pages: np.ndarray, max_lines: int) -> np.ndarray | None:
        """Pin physical pages, int64 [n], and give their addresses, if all are here, in max_lines lines at most.

        Never blocks. None: nothing is pinned, and no page counts as used.
        """
        with self._changed:
            if not _are_here(self._slots, self._index, self._line_shift, pages):
                return None
            try:
                return self.acquire(pages, max_lines)[0]
            except MemoryError:
                return None

    def has(self, pages: np.ndarray) -> np.ndarray:
        """bool [n]: which of them are valid; none counts as used."""
        found = np.empty(len(pages), bool)
        with self._changed:
            _look_for(self._slots, self._index, self._line_shift, pages, found)
        return found

    def mark_valid(self, pages: np.ndarray) -> None:
        """These pinned pages have been read and their checksums hold."""
        with self._changed:
            _mark_valid(self._slots, self._index, self._line_shift, pages)

    def release(self, pages: np.ndarray) -> None:
        with self._changed:
            _release(self._slots, self._state, self._index, self._line_shift, pages)
            self._changed.notify_all()

    def drop(self, first_page: int, num_pages: int) -> None:
        """Forget pages that were erased. None of them is pinned: erases wait for readers."""
        with self._changed:
            _drop(
                self._slots,
                self._probation,
                self._state,
                self._index,
                self._line_shift,
                first_page,
                first_page + num_pages,
            )

    def clear(self) -> int:
        """Forget everything that is not pinned (benchmarks start cold with it); how many lines that were."""
        with self._changed:
            return _clear(self._slots, self._probation, self._state, self._index)
