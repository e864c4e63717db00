"""Flash in memory, for tests and simulation: the same rules, nothing survives the process."""

import os

import numpy as np

from ftl.direct_io.api import complete_oob, copy_pages, crc32c_pages
from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media import MediaCounters, NandRules
from spdk_glue import dma


class MemoryMedia:
    """See FlashMedia. `pages` (uint8 [num_pages, page_size]) and `oob` are open to fault injection."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.counters = MediaCounters()
        self.read_only = False
        self.uuid = os.urandom(16)
        self.pages = dma.allocate(geometry.capacity_bytes).reshape(geometry.num_pages, geometry.page_size)
        self.oob = np.zeros(geometry.num_pages, PAGE_OOB)
        self._erase_counts = np.zeros(geometry.num_superblocks, np.int64)
        self._rules = NandRules(geometry)

    def _addresses(self, pages: np.ndarray) -> np.ndarray:
        page_size = self.geometry.page_size
        return np.uint64(dma.address_of(self.pages)) + pages.astype(np.uint64) * np.uint64(page_size)

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        self.counters.pages_read += len(pages)
        copy_pages(addresses, self._addresses(pages), self.geometry.page_size)
        return crc32c_pages(addresses, self.geometry.page_size)

    def read_oob(self, superblock: int) -> np.ndarray:
        size = self.geometry.pages_per_superblock
        self.counters.oob_pages_read += size
        records = self.oob[superblock * size : (superblock + 1) * size].copy()
        self._rules.found(superblock, records["magic"] != 0)
        return records

    def programmed_superblocks(self) -> np.ndarray:
        per_superblock = self.oob["magic"].reshape(self.geometry.num_superblocks, -1)
        return np.flatnonzero((per_superblock != 0).any(axis=1))

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        self._rules.program(pages)
        complete_oob(addresses, self.geometry.page_size, oob)
        copy_pages(self._addresses(pages), addresses, self.geometry.page_size)
        self.oob[pages] = oob
        self.counters.pages_programmed += len(pages)

    def erase(self, superblock: int) -> None:
        self._rules.erase(superblock)
        size = self.geometry.pages_per_superblock
        self.pages[superblock * size : (superblock + 1) * size] = 0
        self.oob[superblock * size : (superblock + 1) * size] = np.zeros((), PAGE_OOB)
        self._erase_counts[superblock] += 1
        self.counters.blocks_erased += self.geometry.num_planes

    def sync(self) -> None:
        self.counters.syncs += 1

    def erase_counts(self) -> np.ndarray:
        return self._erase_counts.copy()

    def bad_superblocks(self) -> np.ndarray:
        return np.zeros(self.geometry.num_superblocks, bool)

    def close(self) -> None:
        """Nothing to release."""
