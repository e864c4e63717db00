"""The checksum that each page must have: kept on flash in its OOB, in memory for the superblocks in use.

Each checksum is kept mixed with the LBA of its page, so that a whole page of another LBA, as a write to the
wrong place leaves it, does not pass either.

A table for the whole drive would take as much memory as the map. One superblock's column is loaded in one read
of its OOB when a page of it is first read, and one that was not used for long makes room. Columns lie in one
array, where native code finds them (direct_io/mapped_read.c).
"""

import threading

import numpy as np
from numba import njit

from ftl import oob
from ftl.layout import PageKind
from ftl.media import FlashMedia

COLUMNS_MIN_BYTES = 4 << 20  # so that random reads of a small drive do not load them again and again
SPREAD, HALF = np.uint64(0x9E37_79B9_7F4A_7C15), np.uint64(32)  # Fibonacci hashing
SHARE_OF_SUPERBLOCKS = 8  # one in so many has its column in memory
NO_SLOT = -1


@njit(nogil=True, cache=True)
def _mixed(crc32c, lba):
    """Mixing again gives the checksum back."""
    return np.uint32(np.uint64(lba) * SPREAD >> HALF ^ np.uint64(crc32c))


@njit(nogil=True, cache=True)
def _note(column, known, first_page, pages, records):
    for index in range(len(pages)):
        place = pages[index] - first_page
        column[place] = _mixed(records[index].payload_crc32c, records[index].lba)
        known[place] = True


@njit(nogil=True, cache=True)
def _look_up(columns, known, slots, used, fresh, start, pages, lbas, found, is_known):
    """How far it comes from `start`: to the first page whose column is not in memory.

    fresh: the slot of one that has just been loaded, and so is not used again.
    """
    per_superblock = columns.shape[1]
    first, slot = -per_superblock, NO_SLOT  # of the page before: neighbours mostly share theirs
    for index in range(start, len(pages)):
        if not 0 <= pages[index] - first < per_superblock:
            superblock = pages[index] // per_superblock
            first, slot = superblock * per_superblock, slots[superblock]
            if slot == NO_SLOT:
                return index
            used[slot] |= slot != fresh
        place = pages[index] - first
        found[index], is_known[index] = _mixed(columns[slot, place], lbas[index]), known[slot, place]
    return len(pages)


class ChecksumTable:
    """CRC32C by physical page. Thread-safe, and needs no other lock.

    columns: uint32 [num_slots, pages_per_superblock], mixed checksums; known: bool of the same shape, which of
    them are; slots: int32 [num_superblocks], where the column is, or NO_SLOT; used: bool [num_slots], since the
    hand of the clock came by.
    """

    def __init__(self, media: FlashMedia):
        self._media = media
        self._per_superblock = media.geometry.pages_per_superblock
        num_superblocks = media.geometry.num_superblocks
        columns_min = max(1, COLUMNS_MIN_BYTES // (4 * self._per_superblock))
        num_slots = min(num_superblocks, max(columns_min, num_superblocks // SHARE_OF_SUPERBLOCKS))
        # never touched memory takes none
        self.columns = np.zeros((num_slots, self._per_superblock), np.uint32)
        self.known = np.zeros((num_slots, self._per_superblock), bool)
        self.slots = np.full(num_superblocks, NO_SLOT, np.int32)
        self.used = np.zeros(num_slots, bool)
        self._owners = np.zeros(num_slots, np.int64)
        self._free = list(range(num_slots))[::-1]
        self._hand = 0
        self._ahead: set[int] = set()  # slots loaded for a look-up that has not come yet
        self._lock = threading.Lock()

    def expected(self, pages: np.ndarray, lbas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 [n], bool [n]) of int64 [n] programmed pages: the checksums they have if they are of these
        LBAs; which are known.
        """
        found, known = np.empty(len(pages), np.uint32), np.empty(len(pages), bool)
        done, fresh = 0, NO_SLOT
        with self._lock:
            while True:
                done = _look_up(
                    self.columns, self.known, self.slots, self.used, fresh, done, pages, lbas, found, known
                )
                if done == len(pages):
                    self.used[list(self._ahead)] = False  # that was their first use
                    self._ahead.clear()
                    return found, known
                fresh = self._slot(int(pages[done]) // self._per_superblock)

    def lacks(self, pages: np.ndarray) -> bool:
        """Whether `expected` would read OOB for some of these pages."""
        return bool((self.slots[pages // self._per_superblock] == NO_SLOT).any())

    def load(self, pages: np.ndarray) -> None:
        """Read the OOB that `expected` will need, beside something else."""
        for superblock in np.unique(pages // self._per_superblock).tolist():
            with self._lock:
                if self.slots[superblock] == NO_SLOT:
                    self._ahead.add(self._slot(superblock))

    def set(self, pages: np.ndarray, oob: np.ndarray) -> None:
        """Pages of one superblock were programmed with PAGE_OOB [n]."""
        superblock = int(pages[0]) // self._per_superblock
        with self._lock:
            slot = self._slot(superblock)
            first = superblock * self._per_superblock
            _note(self.columns[slot], self.known[slot], first, pages, oob)

    def begin(self, superblock: int) -> None:
        """An erased superblock begins to be written."""
        with self._lock:
            self._forget(superblock)
            self._keep(superblock, 0, False)

    def forget(self, superblock: int) -> None:
        """It was erased, or its OOB is to be read again."""
        with self._lock:
            self._forget(superblock)

    def _forget(self, superblock: int) -> None:
        slot = int(self.slots[superblock])
        if slot != NO_SLOT:
            self.slots[superblock] = NO_SLOT
            self._free.append(slot)

    def _slot(self, superblock: int) -> int:
        slot = int(self.slots[superblock])
        if slot != NO_SLOT:
            self.used[slot] = True
            return slot
        records = self._media.read_oob(superblock)
        records, pages, by_parity = oob.known_records(self._media, superblock, records, None)
        # Only data are ever asked for. Where parity says something else than the page, or instead of it, it is
        # to give the payload as well: a power cut may have left a page of an earlier life there.
        is_data = (records["kind"] == PageKind.DATA) & ~by_parity
        column, known = np.zeros(self._per_superblock, np.uint32), np.zeros(self._per_superblock, bool)
        _note(column, known, superblock * self._per_superblock, pages[is_data], records[is_data])
        return self._keep(superblock, column, known)

    def _keep(self, superblock: int, column, known) -> int:
        """Its slot. What is used but once makes room before what is used again and again."""
        while not self._free:
            if not self.used[self._hand]:
                self._forget(int(self._owners[self._hand]))
            self.used[self._hand] = False
            self._hand = (self._hand + 1) % len(self.used)
        slot = self._free.pop()
        self.columns[slot], self.known[slot], self.used[slot] = column, known, False
        self._owners[slot] = superblock
        self.slots[superblock] = slot
        return slot
