"""Flash kept in a store of bytes: the format and the NAND rules, whatever holds the bytes.

The store is a file (media_file.py) or an NVMe namespace (media_namespace.py). An erase clears the OOB of the
superblock, for without it a page does not exist. The space of its payload is given back at once, or, where that
would slow down what goes on beside it, when the media are closed.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

import numpy as np

from ftl.direct_io.api import OOB_PIECE, complete_oob
from ftl.drive_layout import DriveLayout, damaged_erase_blocks, erase_block_crc32c, round_up
from ftl.errors import MediaIoError, ReadOnlyMedia
from ftl.layout import BLOCK_BYTES, ERASE_BLOCK, ERASE_BLOCK_BAD, PAGE_OOB
from ftl.media import MediaCounters, NandRules
from spdk_glue import dma
from spdk_glue.dma import EXTENT

log = logging.getLogger(__name__)

OOB_IMAGES = 32  # superblocks whose OOB is kept in memory while they are programmed


class Backing(Protocol):
    """Bytes at offsets, which like lengths are multiples of BLOCK_BYTES. Failures raise MediaIoError."""

    name: str
    discards_at_once: bool  # whether `discard` costs nothing beside itself

    def read_pages(self, pages: np.ndarray, addresses: np.ndarray, crc32c: np.ndarray) -> None:
        """Read pages; fills uint32 [n] with the CRC32C of each. Thread-safe, without the GIL."""

    def program_pages(self, pages, addresses, oob, oob_pieces, extents, stream: int) -> None:
        """Write pages and then their OOB: see direct_io.api.DirectFile, and media.FlashMedia for the stream."""

    def read_extents(self, extents: np.ndarray) -> None: ...

    def write_extents(self, extents: np.ndarray) -> None: ...

    def clear(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""

    def discard(self, offset: int, length: int) -> None:
        """Give a range's space back where possible; what it reads as is undefined."""

    def written_ranges(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """Offset ranges that cover everything between start and stop that is not zero."""

    def sync(self) -> None: ...

    def close(self) -> None: ...


def extent_of(buffer: np.ndarray, offset: int) -> np.ndarray:
    """EXTENT [1]: a whole buffer at an offset."""
    return np.array([(dma.address_of(buffer), offset, buffer.nbytes)], EXTENT)


def complete_oob_images(addresses: np.ndarray, page_size: int, oob: np.ndarray, pieces: np.ndarray) -> None:
    """Fill in the checksums of PAGE_OOB [n], and put them where OOB_PIECE says, to be written."""
    complete_oob(addresses, page_size, oob)
    for first, count, image in pieces.tolist():
        dma.view(image, count * PAGE_OOB.itemsize).view(PAGE_OOB)[:] = oob[first : first + count]


class StoredMedia:
    """See FlashMedia. With a damaged erase-block table it opens, but read-only."""

    plain_file = None
    max_open_superblocks: int | None = None

    def __init__(self, backing: Backing, layout: DriveLayout, read_only: bool):
        self.geometry = layout.geometry
        self.counters = MediaCounters()
        self.read_only = read_only
        self.uuid = layout.uuid
        self.layout = layout
        self._backing = backing
        self._rules = NandRules(self.geometry)
        self._erased: set[int] = set()  # superblocks whose payload may be discarded
        self._lock = threading.Lock()  # of the table with its writing, the images and what is erased
        self._oob_images: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sync_failure: MediaIoError | None = None
        self._table = self._read_table()
        self._rules.bad[:] = (self._table["flags"] & ERASE_BLOCK_BAD) != 0
        if not self.read_only:
            self._mend_headers()

    # plain transfers of whole blocks

    def _read_bytes(self, offset: int, size: int) -> bytes:
        start = offset - offset % BLOCK_BYTES
        buffer = dma.allocate(round_up(offset + size - start, BLOCK_BYTES))
        self._backing.read_extents(extent_of(buffer, start))
        return buffer[offset - start : offset - start + size].tobytes()

    def _write_block(self, offset: int, content: bytes) -> None:
        buffer = dma.allocate(BLOCK_BYTES)
        buffer[: len(content)] = np.frombuffer(content, np.uint8)
        self._backing.write_extents(extent_of(buffer, offset))

    def _mend_headers(self) -> None:
        """Rewrite a damaged copy of the header, before the other one is lost too."""
        for offset in (0, BLOCK_BYTES):
            if self._read_bytes(offset, BLOCK_BYTES) != self.layout.header:
                log.info("%s: rewriting the damaged header copy at %d", self._backing.name, offset)
                self._write_block(offset, self.layout.header)

    def _read_table(self) -> np.ndarray:
        """ERASE_BLOCK [num_superblocks, num_planes]."""
        shape = self.geometry.num_superblocks, self.geometry.num_planes
        raw = self._read_bytes(self.layout.table_start, shape[0] * shape[1] * ERASE_BLOCK.itemsize)
        table = np.frombuffer(bytearray(raw), ERASE_BLOCK).reshape(shape)
        damaged = damaged_erase_blocks(table)
        if damaged.any():
            facts = self._backing.name, int(np.count_nonzero(damaged)), int(np.argwhere(damaged)[0, 0])
            log.error("%s: erase-block table damaged (%d records, first of superblock %d): read-only", *facts)
            self.read_only = True
            table[damaged] = np.zeros((), ERASE_BLOCK)
        return table

    def _write_table(self, superblock: int) -> None:
        """Write the blocks of the erase-block table that a superblock's records lie in."""
        row = self._table[superblock : superblock + 1]
        row["crc32c"] = erase_block_crc32c(row, superblock)
        row_bytes = self.geometry.num_planes * ERASE_BLOCK.itemsize
        raw = self._table.reshape(-1).view(np.uint8)
        first, stop = superblock * row_bytes // BLOCK_BYTES, -(-(superblock + 1) * row_bytes // BLOCK_BYTES)
        for block in range(first, stop):
            start = block * BLOCK_BYTES
            self._write_block(self.layout.table_start + start, raw[start : start + BLOCK_BYTES].tobytes())

    # the four verbs

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        self._rules.check_range(pages)
        crc32c = np.empty(len(pages), np.uint32)
        self._backing.read_pages(pages, addresses, crc32c)
        self.counters.add(pages_read=len(pages))
        return crc32c

    def read_oob(self, superblock: int) -> np.ndarray:
        self._rules.check_superblock(superblock)
        size = self.geometry.pages_per_superblock
        buffer = dma.allocate(self.layout.oob_stride)
        self._backing.read_extents(extent_of(buffer, self.layout.oob_of(superblock)))
        records = buffer[: size * PAGE_OOB.itemsize].view(PAGE_OOB)
        self.counters.add(oob_pages_read=size)
        self._rules.found(superblock, records["magic"] != 0)
        return records

    def read_oob_pages(self, pages: np.ndarray) -> np.ndarray:
        self._rules.check_range(pages)
        if not len(pages):
            return np.empty(0, PAGE_OOB)
        superblocks, indices = np.divmod(pages, self.geometry.pages_per_superblock)
        offsets = self.layout.oob_start + superblocks * self.layout.oob_stride + indices * PAGE_OOB.itemsize
        buffer = dma.allocate(len(pages) * BLOCK_BYTES)
        extents = np.zeros(len(pages), EXTENT)
        extents["address"] = dma.page_addresses(buffer, BLOCK_BYTES)
        extents["offset"] = offsets // BLOCK_BYTES * BLOCK_BYTES
        extents["length"] = BLOCK_BYTES
        self._backing.read_extents(extents)
        records = buffer.view(PAGE_OOB).reshape(-1, BLOCK_BYTES // PAGE_OOB.itemsize)
        self.counters.add(oob_pages_read=len(pages))
        return records[np.arange(len(pages)), offsets % BLOCK_BYTES // PAGE_OOB.itemsize].copy()

    def programmed_superblocks(self) -> np.ndarray:
        oob_start, stride = self.layout.oob_start, self.layout.oob_stride
        found = np.zeros(self.geometry.num_superblocks, bool)
        for start, stop in self._backing.written_ranges(oob_start, self.layout.oob_end):
            found[(start - oob_start) // stride : -(-(stop - oob_start) // stride)] = True
        return np.flatnonzero(found)

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        self._check_writable("program")
        if not len(pages):
            return
        self._rules.program(pages)
        superblocks = pages // self.geometry.pages_per_superblock
        changed = np.unique(superblocks).tolist()
        with self._lock:
            self._erased.difference_update(changed)
        try:
            images = {superblock: self._oob_image(superblock) for superblock in changed}
            pieces, extents = self._oob_writes(pages, superblocks, images)
            self._backing.program_pages(pages, addresses, oob, pieces, extents, stream)
        except MediaIoError:
            # the images may hold records of pages that are not there
            self._forget_images(changed)
            raise
        self.counters.add(pages_programmed=len(pages))

    def _oob_writes(self, pages, superblocks, images) -> tuple[np.ndarray, np.ndarray]:
        """Where each run's OOB goes in the images, and the blocks of them to write: OOB_PIECE, EXTENT."""
        pieces, extents = [], []
        breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(superblocks) != 0)) + 1
        bounds = [0, *breaks.tolist(), len(pages)]
        for first, stop in pairwise(bounds):
            superblock = int(superblocks[first])
            address = dma.address_of(images[superblock])
            index = int(pages[first]) % self.geometry.pages_per_superblock
            begin = index * PAGE_OOB.itemsize
            end = begin + (stop - first) * PAGE_OOB.itemsize
            pieces.append((first, stop - first, address + begin))
            begin -= begin % BLOCK_BYTES
            end = round_up(end, BLOCK_BYTES)
            extents.append((address + begin, self.layout.oob_of(superblock) + begin, end - begin))
        return np.array(pieces, OOB_PIECE), np.array(extents, EXTENT)

    def _oob_image(self, superblock: int) -> np.ndarray:
        """A superblock's OOB as it is in the store, in memory: its blocks are written whole."""
        with self._lock:
            if superblock not in self._oob_images:
                image = dma.allocate(self.layout.oob_stride)
                start = self.layout.oob_of(superblock)
                if any(self._backing.written_ranges(start, start + image.nbytes)):
                    self._backing.read_extents(extent_of(image, start))
                self._oob_images[superblock] = image
                while len(self._oob_images) > OOB_IMAGES:
                    self._oob_images.popitem(last=False)
            self._oob_images.move_to_end(superblock)
            return self._oob_images[superblock]

    def _forget_images(self, superblocks: list[int]) -> None:
        with self._lock:
            for superblock in superblocks:
                self._oob_images.pop(superblock, None)

    def erase(self, superblock: int) -> None:
        self._check_writable("erase")
        good = self._rules.erasable(superblock)
        with self._lock:
            self._table["erase_count"][superblock, good] += 1
            self._write_table(superblock)
        # OOB first: without it a page does not exist, whatever its payload holds
        if good.all():
            self._forget_images([superblock])
            self._backing.clear(self.layout.oob_of(superblock), self.layout.oob_stride)
            if self._backing.discards_at_once:
                self._discard(superblock)
            else:
                with self._lock:
                    self._erased.add(superblock)
        else:
            self._clear_oob(superblock, good)
        self._rules.erased(superblock, good)
        self.counters.add(blocks_erased=int(np.count_nonzero(good)))

    def _discard(self, superblock: int) -> None:
        self._backing.discard(self.layout.data_of(superblock), self.geometry.superblock_bytes)

    def _clear_oob(self, superblock: int, planes: np.ndarray) -> None:
        """Clear the OOB of some blocks; planes: bool [num_planes]. A bad block between keeps its pages."""
        image = self._oob_image(superblock)
        records = image.view(PAGE_OOB)[: self.geometry.pages_per_superblock]
        records.reshape(-1, self.geometry.num_planes)[:, planes] = np.zeros((), PAGE_OOB)
        try:
            self._backing.write_extents(extent_of(image, self.layout.oob_of(superblock)))
        except MediaIoError:
            self._forget_images([superblock])
            raise

    def closed(self, superblock: int) -> None:
        """Nothing to do: any number may be written at once."""

    def sync(self) -> None:
        """As FlashMedia. A failure is final: the store may have dropped what it could not write, so no later
        sync could promise anything."""
        if self.read_only:
            return
        if self._sync_failure is not None:
            raise self._sync_failure
        try:
            self._backing.sync()
        except MediaIoError as error:
            self._sync_failure = error
            raise
        self.counters.add(syncs=1)

    # facts

    def erase_counts(self) -> np.ndarray:
        return self._table["erase_count"].max(axis=1).astype(np.int64)

    def read_counts(self) -> np.ndarray:
        return np.zeros(self.geometry.num_superblocks, np.int64)

    def bad_blocks(self) -> np.ndarray:
        return self._rules.bad.copy()

    def bad_superblocks(self) -> np.ndarray:
        return self._rules.bad.all(axis=1)

    def mark_bad(self, superblock: int, planes: np.ndarray) -> None:
        self._check_writable("mark a block bad")
        self._rules.check_superblock(superblock)
        with self._lock:
            self._table["flags"][superblock, planes] |= ERASE_BLOCK_BAD
            self._rules.bad[superblock, planes] = True
            self._write_table(superblock)

    def _check_writable(self, operation: str) -> None:
        if self.read_only:
            raise ReadOnlyMedia(operation)

    def close(self) -> None:
        try:
            for superblock in sorted(self._erased):
                self._discard(superblock)
            self._erased.clear()
        finally:
            self._backing.close()
