"""Flash media: four verbs over arrays of physical pages, and the NAND rules that all media enforce.

Rules: a page is programmed once between erases, the pages of an erase block in ascending order (some may be
skipped), and no bad block is programmed or erased. What a block holds when it is marked bad can still be read,
also after its superblock was erased: that erases the good blocks only.
"""

import threading
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numba import njit

from ftl.direct_io.api import DirectFile
from ftl.errors import NandRuleViolation
from ftl.geometry import Geometry


@dataclass
class MediaCounters:
    """Since the medium was opened. Changed by `add` alone, which is thread-safe."""

    pages_read: int = 0
    pages_programmed: int = 0
    oob_pages_read: int = 0  # OOB records
    blocks_erased: int = 0
    syncs: int = 0

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class FlashMedia(Protocol):
    """One drive's flash. pages: int64 [n]; addresses: uint64 [n] of page_size buffers.

    Different superblocks may be worked on by several threads at once, a file's and a namespace's at least; who
    changes one is alone with it. What changes raises ReadOnlyMedia where read_only, MediaIoError (BackingFull)
    where the backing store fails, NandRuleViolation for what no caller may ask.
    """

    geometry: Geometry
    counters: MediaCounters
    read_only: bool
    uuid: bytes  # 16 bytes, the drive's identity
    plain_file: DirectFile | None  # where reading is nothing but reading this file; else None
    max_open_superblocks: int | None  # that may be partly programmed and not closed; None for any number

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Read pages; uint32 [n], the CRC32C of what was found. Thread-safe, without the GIL."""

    def read_oob(self, superblock: int) -> np.ndarray:
        """PAGE_OOB [pages_per_superblock]; magic 0 where never programmed."""

    def read_oob_pages(self, pages: np.ndarray) -> np.ndarray:
        """PAGE_OOB [n] of single pages, int64 [n], in one batch."""

    def programmed_superblocks(self) -> np.ndarray:
        """int64: superblocks that may hold programmed pages."""

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        """Program pages with their PAGE_OOB [n], whose checksum fields are filled in here.

        stream: any number; what is programmed with one will probably be erased together. A hint.
        Raises ProgramFailed: nothing more is to be programmed in that superblock before it is erased.
        """

    def closed(self, superblock: int) -> None:
        """Nothing more will be programmed in a superblock before its erase."""

    def erase(self, superblock: int) -> None:
        """Erase the superblock's good blocks. Raises EraseFailed for those that could not be."""

    def sync(self) -> None:
        """Everything programmed, erased and marked bad so far is on stable media."""

    def erase_counts(self) -> np.ndarray:
        """int64 [num_superblocks]: the highest erase count of each superblock's blocks."""

    def read_counts(self) -> np.ndarray:
        """int64 [num_superblocks]: the most reads of one of its blocks since its erase; 0 if not kept."""

    def bad_blocks(self) -> np.ndarray:
        """bool [num_superblocks, num_planes]: blocks not to be programmed or erased any more."""

    def bad_superblocks(self) -> np.ndarray:
        """bool [num_superblocks]: those of which every block is bad."""

    def mark_bad(self, superblock: int, planes: np.ndarray) -> None:
        """Take erase blocks out of use for ever, as of the next sync. planes: int64 [k]."""

    def close(self) -> None: ...


@njit(cache=True)
def _first_violation(next_page, bad, pages, num_planes, pages_per_superblock):
    """Position of the first page that may not be programmed, or -1. next_page: int32, bad: bool, by block."""
    for position in range(len(pages)):
        superblock, index = divmod(pages[position], pages_per_superblock)
        page_in_block, plane = divmod(index, num_planes)
        if bad[superblock, plane] or page_in_block < next_page[superblock, plane]:
            return position
        next_page[superblock, plane] = page_in_block + 1
    return -1


class NandRules:
    """What may be programmed and erased.

    next_page: int32 [num_superblocks, num_planes], the first page_in_block each block takes
    bad: bool [num_superblocks, num_planes]
    """

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self.next_page = np.zeros((geometry.num_superblocks, geometry.num_planes), np.int32)
        self.bad = np.zeros((geometry.num_superblocks, geometry.num_planes), bool)

    def check_range(self, pages: np.ndarray) -> None:
        for page in (pages.min(), pages.max()) if len(pages) else ():
            if not 0 <= page < self._geometry.num_pages:
                raise NandRuleViolation("page outside the flash", int(page))

    def check_superblock(self, superblock: int) -> None:
        if not 0 <= superblock < self._geometry.num_superblocks:
            page = superblock * self._geometry.pages_per_superblock
            raise NandRuleViolation("superblock outside the flash", page)

    def program(self, pages: np.ndarray) -> None:
        """Note a program. Raises NandRuleViolation, with the pages before the offending one noted."""
        self.check_range(pages)
        planes, size = self._geometry.num_planes, self._geometry.pages_per_superblock
        position = _first_violation(self.next_page, self.bad, pages, planes, size)
        if position >= 0:
            page = int(pages[position])
            is_bad = self.bad[page // size, page % planes]
            rule = "no bad block is programmed" if is_bad else "pages are programmed in order, once per erase"
            raise NandRuleViolation(rule, page)

    def found(self, superblock: int, programmed: np.ndarray) -> None:
        """Take over what a superblock holds: programmed, bool [pages_per_superblock]."""
        rows = programmed.reshape(-1, self._geometry.num_planes)
        last = len(rows) - np.argmax(rows[::-1], axis=0)
        self.next_page[superblock] = np.where(rows.any(axis=0), last, 0)

    def erasable(self, superblock: int) -> np.ndarray:
        """bool [num_planes]: the good blocks. Raises NandRuleViolation if none is."""
        self.check_superblock(superblock)
        good = ~self.bad[superblock]
        if not good.any():
            raise NandRuleViolation("no bad block is erased", superblock * self._geometry.pages_per_superblock)
        return good

    def erased(self, superblock: int, planes: np.ndarray) -> None:
        self.next_page[superblock, planes] = 0
