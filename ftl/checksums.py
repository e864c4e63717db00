"""The checksum that each page must have: kept on flash in its OOB, in memory for the superblocks in use.

Each checksum is kept mixed with the LBA of its page, so that a whole page of another LBA, as a write to the
wrong place leaves it, does not pass either.

A table for the whole drive would take as much memory as the map. One superblock's column is loaded in one read
of its OOB when a page of it is first read, and the column used longest ago makes room.
"""

import threading
from collections import OrderedDict

import numpy as np

from ftl import oob
from ftl.layout import PageKind
from ftl.media import FlashMedia

COLUMNS_MIN_BYTES = 4 << 20  # so that random reads of a small drive do not load them again and again
SPREAD, HALF = np.uint64(0x9E37_79B9_7F4A_7C15), np.uint64(32)  # Fibonacci hashing
SHARE_OF_SUPERBLOCKS = 8  # one in so many has its column in memory


def _mixed(crc32c: np.ndarray, lbas: np.ndarray) -> np.ndarray:
    """uint32 [n]; mixing again gives the checksum back."""
    return crc32c ^ (lbas.astype(np.uint64) * SPREAD >> HALF).astype(np.uint32)


class ChecksumTable:
    """CRC32C by physical page. Thread-safe, and needs no other lock."""

    def __init__(self, media: FlashMedia):
        self._media = media
        self._per_superblock = media.geometry.pages_per_superblock
        num_superblocks = media.geometry.num_superblocks
        columns_min = max(1, COLUMNS_MIN_BYTES // (4 * self._per_superblock))
        self._capacity = min(num_superblocks, max(columns_min, num_superblocks // SHARE_OF_SUPERBLOCKS))
        self._columns: OrderedDict[int, np.ndarray] = OrderedDict()
        self._unreadable: dict[int, np.ndarray] = {}  # superblock to pages whose OOB does not hold
        self._lock = threading.Lock()

    def expected(self, pages: np.ndarray, lbas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 [n], bool [n]) of int64 [n] programmed pages: the checksums they have if they are of these
        LBAs; which are known.
        """
        superblocks = pages // self._per_superblock
        found = np.empty(len(pages), np.uint32)
        known = np.ones(len(pages), bool)
        first = int(superblocks[0])
        is_one = len(pages) == 1 or bool((superblocks == first).all())
        with self._lock:
            for superblock in [first] if is_one else np.unique(superblocks).tolist():
                here = slice(None) if is_one else superblocks == superblock
                indices = pages[here] - superblock * self._per_superblock
                found[here] = self._column(superblock)[indices]
                if superblock in self._unreadable:
                    known[here] = ~np.isin(indices, self._unreadable[superblock])
        return _mixed(found, lbas), known

    def set(self, pages: np.ndarray, oob: np.ndarray) -> None:
        """Pages of one superblock, ascending, were programmed with PAGE_OOB [n]."""
        mixed = _mixed(oob["payload_crc32c"], oob["lba"])
        superblock, first = divmod(int(pages[0]), self._per_superblock)
        indices = slice(first, first + len(pages))
        if pages[-1] - pages[0] != len(pages) - 1:  # not one run: bad blocks or parity between
            indices = pages - superblock * self._per_superblock
        with self._lock:
            self._column(superblock)[indices] = mixed
            if superblock in self._unreadable:  # read while it was being written
                self._unreadable[superblock] = np.setdiff1d(
                    self._unreadable[superblock], pages - superblock * self._per_superblock
                )

    def begin(self, superblock: int) -> None:
        """An erased superblock begins to be written."""
        with self._lock:
            self._forget(superblock)
            self._keep(superblock, np.zeros(self._per_superblock, np.uint32))

    def _forget(self, superblock: int) -> None:
        self._columns.pop(superblock, None)
        self._unreadable.pop(superblock, None)

    def forget(self, superblock: int) -> None:
        """It was erased, or its OOB is to be read again."""
        with self._lock:
            self._forget(superblock)

    def _column(self, superblock: int) -> np.ndarray:
        if superblock not in self._columns:
            # what parity says of a page counts: there a power cut may have left a page of an earlier life
            records = self._media.read_oob(superblock)
            records, pages, _ = oob.known_records(self._media, superblock, records, None)
            data = records["kind"] == PageKind.DATA  # only data are ever asked for
            indices = pages[data] - superblock * self._per_superblock
            column = np.zeros(self._per_superblock, np.uint32)
            column[indices] = _mixed(records["payload_crc32c"][data], records["lba"][data])
            if len(indices) < len(column):
                self._unreadable[superblock] = np.setdiff1d(np.arange(len(column)), indices)
            self._keep(superblock, column)
        self._columns.move_to_end(superblock)
        return self._columns[superblock]

    def _keep(self, superblock: int, column: np.ndarray) -> None:
        self._columns[superblock] = column
        while len(self._columns) > self._capacity:
            self._forget(next(iter(self._columns)))
