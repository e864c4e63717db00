"""The logical-to-physical map: batches over NumPy arrays, numba inside.

Entries are page + 1, so that zero is "unmapped" and an empty drive's map is never touched memory.
"""

import numpy as np
from numba import njit

PAGE_NONE = -1


@njit(nogil=True, cache=True)
def _resolve(entries, lbas, pages):
    for index in range(len(lbas)):
        pages[index] = np.int64(entries[lbas[index]]) - 1


@njit(nogil=True, cache=True)
def _any_outside(lbas, num_lbas):
    outside = False
    for index in range(len(lbas)):
        outside |= lbas[index] < 0 or lbas[index] >= num_lbas
    return outside


@njit(nogil=True, cache=True)
def _assign(entries, valid, pages_per_superblock, lbas, pages):
    old_superblock = new_superblock = 0  # neighbours mostly share theirs, and a division costs most here
    old_first = new_first = 0
    for index in range(len(lbas)):
        lba, page = lbas[index], pages[index]
        old = np.int64(entries[lba]) - 1
        if old >= 0:
            if not 0 <= old - old_first < pages_per_superblock:
                old_superblock = old // pages_per_superblock
                old_first = old_superblock * pages_per_superblock
            valid[old_superblock] -= 1
        entries[lba] = page + 1
        if not 0 <= page - new_first < pages_per_superblock:
            new_superblock = page // pages_per_superblock
            new_first = new_superblock * pages_per_superblock
        valid[new_superblock] += 1


@njit(nogil=True, cache=True)
def _move(entries, valid, pages_per_superblock, lbas, old_pages, new_pages):
    for index in range(len(lbas)):
        if np.int64(entries[lbas[index]]) - 1 != old_pages[index]:
            continue
        entries[lbas[index]] = new_pages[index] + 1
        valid[old_pages[index] // pages_per_superblock] -= 1
        valid[new_pages[index] // pages_per_superblock] += 1


@njit(nogil=True, cache=True)
def _unmap(entries, valid, pages_per_superblock, first, stop):
    count = 0
    for lba in range(first, stop):
        page = np.int64(entries[lba]) - 1
        if page >= 0:
            valid[page // pages_per_superblock] -= 1
            entries[lba] = 0
            count += 1
    return count


@njit(nogil=True, cache=True)
def _keep_newest(entries, versions, lbas, sequence_numbers, pages):
    for index in range(len(lbas)):
        lba = lbas[index]
        if entries[lba] == 0 or sequence_numbers[index] >= versions[lba]:
            entries[lba] = pages[index] + 1
            versions[lba] = sequence_numbers[index]


@njit(nogil=True, cache=True)
def _drop_older(entries, versions, first, stop, sequence_number):
    for lba in range(first, stop):
        if entries[lba] != 0 and versions[lba] < sequence_number:
            entries[lba] = 0


class Mapping:
    """entries [num_lbas]: see above; valid_pages int64 [num_superblocks]: mapped pages in each superblock."""

    def __init__(self, num_lbas: int, num_superblocks: int, pages_per_superblock: int):
        wide = num_superblocks * pages_per_superblock >= 1 << 32
        self.entries = np.zeros(num_lbas, np.uint64 if wide else np.uint32)
        self._pages_per_superblock = pages_per_superblock
        self.valid_pages = np.zeros(num_superblocks, np.int64)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def mapped_pages(self) -> int:
        return int(self.valid_pages.sum())

    def holds(self, lbas: np.ndarray) -> bool:
        """Whether all of int64 [n] LBAs are in range."""
        return not _any_outside(lbas, len(self.entries))

    def resolve(self, lbas: np.ndarray) -> np.ndarray:
        """int64 physical pages of int64 [n] LBAs in range; PAGE_NONE where unmapped."""
        pages = np.empty(len(lbas), np.int64)
        _resolve(self.entries, lbas, pages)
        return pages

    def assign(self, lbas: np.ndarray, pages: np.ndarray) -> None:
        """Map LBAs to newly programmed pages; what they held before is no longer valid."""
        _assign(self.entries, self.valid_pages, self._pages_per_superblock, lbas, pages)

    def move(self, lbas: np.ndarray, old_pages: np.ndarray, new_pages: np.ndarray) -> None:
        """Point LBAs at copies of their pages, those that still point at the original."""
        _move(self.entries, self.valid_pages, self._pages_per_superblock, lbas, old_pages, new_pages)

    def unmap(self, first_lba: int, num_lbas: int) -> int:
        """Forget a range; how many of its LBAs were mapped."""
        return _unmap(
            self.entries, self.valid_pages, self._pages_per_superblock, first_lba, first_lba + num_lbas
        )

    def unmapped_ranges(self) -> np.ndarray:
        """int64 [n, 2]: (first LBA, number of LBAs) of every run without a page."""
        empty = np.concatenate([[False], self.entries == 0, [False]])
        edges = np.flatnonzero(np.diff(empty))
        return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)

    # recovery: the newest version of each LBA wins, then deallocations drop what is older than they are

    def start_recovery(self) -> np.ndarray:
        """The versions found so far, uint64 [num_lbas]."""
        return np.zeros(len(self.entries), np.uint64)

    def recover_pages(self, versions, lbas, sequence_numbers, pages) -> None:
        _keep_newest(self.entries, versions, lbas, sequence_numbers, pages)

    def recover_deallocation(self, versions, first_lba: int, num_lbas: int, sequence_number: int) -> None:
        stop = min(first_lba + num_lbas, len(self.entries))
        _drop_older(self.entries, versions, first_lba, stop, np.uint64(sequence_number))

    def take_over(self, entries: np.ndarray, alive: np.ndarray) -> None:
        """Begin with a checkpoint's entries, those in superblocks that are as they were: bool
        [num_superblocks].
        """
        mapped = np.flatnonzero(entries)
        mapped = mapped[alive[(entries[mapped].astype(np.int64) - 1) // self._pages_per_superblock]]
        self.entries[mapped] = entries[mapped]

    def copy_entries(self) -> np.ndarray:
        """The map as a checkpoint keeps it: page + 1 by LBA, zero where unmapped."""
        return self.entries.copy()

    @property
    def entry_dtype(self) -> np.dtype:
        return self.entries.dtype

    def finish_recovery(self) -> None:
        mapped = self.entries[self.entries != 0].astype(np.int64) - 1
        counts = np.bincount(mapped // self._pages_per_superblock, minlength=len(self.valid_pages))
        self.valid_pages[:] = counts
