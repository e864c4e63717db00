"""Flash in memory, for tests and simulation: the same rules, nothing survives the process."""

import os

import numpy as np

from ftl.direct_io.api import complete_oob, copy_pages, crc32c_pages, crc32c_records
from ftl.errors import ReadOnlyMedia
from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media import MediaCounters, NandRules
from spdk_glue import dma


class CountingMedia:
    """See FlashMedia. Keeps OOB and no payload: write amplification of a large drive in little memory.

    A page's checksum is what the caller put into its OOB; `read` returns it and leaves the buffers alone.
    """

    plain_file = None
    max_open_superblocks: int | None = None

    def __init__(self, geometry: Geometry, uuid: bytes | None = None):
        self.geometry = geometry
        self.counters = MediaCounters()
        self.read_only = False
        self.uuid = uuid or os.urandom(16)
        self.oob = np.zeros(geometry.num_pages, PAGE_OOB)
        self._rules = NandRules(geometry)
        self._erase_counts = np.zeros((geometry.num_superblocks, geometry.num_planes), np.int64)

    def _check_writable(self, operation: str) -> None:
        if self.read_only:
            raise ReadOnlyMedia(operation)

    def _rows(self, array: np.ndarray, superblock: int) -> np.ndarray:
        """A superblock's part of an array by page, as [page_in_block, plane, ...]."""
        size, planes = self.geometry.pages_per_superblock, self.geometry.num_planes
        part = array[superblock * size : (superblock + 1) * size]
        return part.reshape(-1, planes, *array.shape[1:])

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        self._rules.check_range(pages)
        self.counters.add(pages_read=len(pages))
        return self.oob["payload_crc32c"][pages]

    def read_oob(self, superblock: int) -> np.ndarray:
        self._rules.check_superblock(superblock)
        size = self.geometry.pages_per_superblock
        self.counters.add(oob_pages_read=size)
        records = self.oob[superblock * size : (superblock + 1) * size].copy()
        self._rules.found(superblock, records["magic"] != 0)
        return records

    def read_oob_pages(self, pages: np.ndarray) -> np.ndarray:
        self._rules.check_range(pages)
        self.counters.add(oob_pages_read=len(pages))
        return self.oob[pages]

    def programmed_superblocks(self) -> np.ndarray:
        per_superblock = self.oob["magic"].reshape(self.geometry.num_superblocks, -1)
        return np.flatnonzero((per_superblock != 0).any(axis=1))

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        self._check_writable("program")
        self._rules.program(pages)
        self._checksum(addresses, oob)
        self._store(pages, addresses, oob)
        self.counters.add(pages_programmed=len(pages))

    def _checksum(self, addresses: np.ndarray, oob: np.ndarray) -> None:
        oob["oob_crc32c"] = crc32c_records(oob)

    def _store(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        self.oob[pages] = oob

    def closed(self, superblock: int) -> None:
        """Nothing to do: any number may be written at once."""

    def erase(self, superblock: int) -> None:
        self._check_writable("erase")
        good = self._rules.erasable(superblock)
        self._clear(superblock, good)
        self._rules.erased(superblock, good)
        self._erase_counts[superblock, good] += 1
        self.counters.add(blocks_erased=int(np.count_nonzero(good)))

    def _clear(self, superblock: int, planes: np.ndarray) -> None:
        """Forget what blocks hold; planes: bool [num_planes]."""
        self._rows(self.oob, superblock)[:, planes] = np.zeros((), PAGE_OOB)

    def sync(self) -> None:
        self.counters.add(syncs=not self.read_only)

    def erase_counts(self) -> np.ndarray:
        return self._erase_counts.max(axis=1)

    def read_counts(self) -> np.ndarray:
        return np.zeros(self.geometry.num_superblocks, np.int64)

    def bad_blocks(self) -> np.ndarray:
        return self._rules.bad.copy()

    def bad_superblocks(self) -> np.ndarray:
        return self._rules.bad.all(axis=1)

    def mark_bad(self, superblock: int, planes: np.ndarray) -> None:
        self._check_writable("mark a block bad")
        self._rules.check_superblock(superblock)
        self._rules.bad[superblock, planes] = True

    def close(self) -> None:
        """Nothing to release."""


class MemoryMedia(CountingMedia):
    """See FlashMedia. `pages` (uint8 [num_pages, page_size]) and `oob` are open to fault injection."""

    def __init__(self, geometry: Geometry, uuid: bytes | None = None):
        super().__init__(geometry, uuid)
        self.pages = dma.allocate(geometry.capacity_bytes).reshape(geometry.num_pages, geometry.page_size)

    def _addresses(self, pages: np.ndarray) -> np.ndarray:
        page_size = self.geometry.page_size
        return np.uint64(dma.address_of(self.pages)) + pages.astype(np.uint64) * np.uint64(page_size)

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        self._rules.check_range(pages)
        self.counters.add(pages_read=len(pages))
        copy_pages(addresses, self._addresses(pages), self.geometry.page_size)
        return crc32c_pages(addresses, self.geometry.page_size)

    def _checksum(self, addresses: np.ndarray, oob: np.ndarray) -> None:
        complete_oob(addresses, self.geometry.page_size, oob)

    def _store(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        copy_pages(self._addresses(pages), addresses, self.geometry.page_size)
        super()._store(pages, addresses, oob)

    def _clear(self, superblock: int, planes: np.ndarray) -> None:
        self._rows(self.pages, superblock)[:, planes] = 0
        super()._clear(superblock, planes)
