"""Flash media: four verbs over arrays of physical pages, and the NAND rules that all media enforce.

Rules: a page is programmed once between erases, the pages of an erase block in ascending order (some may be
skipped), and no bad block is programmed or erased.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numba import njit

from ftl.errors import NandRuleViolation
from ftl.geometry import Geometry


@dataclass
class MediaCounters:
    pages_read: int = 0
    pages_programmed: int = 0
    oob_pages_read: int = 0  # OOB records
    blocks_erased: int = 0
    syncs: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class FlashMedia(Protocol):
    """One drive's flash. pages: int64 [n]; addresses: uint64 [n] of page_size buffers."""

    geometry: Geometry
    counters: MediaCounters
    read_only: bool
    uuid: bytes  # 16 bytes, the drive's identity

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Read pages; uint32 [n], the CRC32C of what was found. Thread-safe, without the GIL."""

    def read_oob(self, superblock: int) -> np.ndarray:
        """PAGE_OOB [pages_per_superblock]; magic 0 where never programmed."""

    def programmed_superblocks(self) -> np.ndarray:
        """int64: superblocks that may hold programmed pages."""

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        """Program pages with their PAGE_OOB [n], whose checksum fields are filled in here."""

    def erase(self, superblock: int) -> None: ...

    def sync(self) -> None:
        """Everything programmed and erased so far is on stable media."""

    def erase_counts(self) -> np.ndarray:
        """int64 [num_superblocks]: the highest erase count of each superblock's blocks."""

    def bad_superblocks(self) -> np.ndarray:
        """bool [num_superblocks]: whether one of its blocks is bad."""

    def close(self) -> None: ...


@njit(cache=True)
def _check_order(next_page, pages, num_planes, pages_per_superblock):
    """First offending position, or -1. next_page: int32 [num_erase_blocks]."""
    for position in range(len(pages)):
        superblock, index = divmod(pages[position], pages_per_superblock)
        page_in_block, plane = divmod(index, num_planes)
        block = superblock * num_planes + plane
        if page_in_block < next_page[block]:
            return position
        next_page[block] = page_in_block + 1
    return -1


class NandRules:
    """Which page each erase block expects next."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._next_page = np.zeros(geometry.num_erase_blocks, np.int32)

    def check_range(self, pages: np.ndarray) -> None:
        if len(pages) and (pages.min() < 0 or pages.max() >= self._geometry.num_pages):
            raise NandRuleViolation("page outside the flash", int(pages.max()))

    def program(self, pages: np.ndarray) -> None:
        """Note a program. Raises NandRuleViolation, with the pages before the offending one noted."""
        self.check_range(pages)
        geometry = self._geometry
        bad = _check_order(self._next_page, pages, geometry.num_planes, geometry.pages_per_superblock)
        if bad >= 0:
            raise NandRuleViolation("pages are programmed in order, once per erase", int(pages[bad]))

    def found(self, superblock: int, programmed: np.ndarray) -> None:
        """Take over what a superblock holds: programmed, bool [pages_per_superblock]."""
        planes = self._geometry.num_planes
        rows = programmed.reshape(-1, planes)
        last = len(rows) - np.argmax(rows[::-1], axis=0)
        self._next_page[superblock * planes : (superblock + 1) * planes] = np.where(rows.any(axis=0), last, 0)

    def erase(self, superblock: int) -> None:
        planes = self._geometry.num_planes
        self._next_page[superblock * planes : (superblock + 1) * planes] = 0
