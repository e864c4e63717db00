"""Flash on a raw NVMe namespace: the format of media_file.py in the blocks of any drive.

The drive below has a translation layer of its own, so its blocks never wear out for us; what is gained is the
placement and recovery of this one without a file system in between. Deallocation is a hint that a drive may
ignore, so an erase writes zeros over the OOB and deallocates only the payload.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ftl.direct_io.api import complete_oob, crc32c_pages
from ftl.drive_layout import HEADERS_BYTES, DriveLayout, new_table
from ftl.errors import NotADrive, TruncatedDrive, backing_error
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, ERASE_BLOCK, PAGE_OOB
from ftl.media_stored import StoredMedia, extent_of
from spdk_glue import dma
from spdk_glue.dma import EXTENT
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeError, NvmeStatusError, Status

log = logging.getLogger(__name__)

CLEAR_BYTES = 8 << 20  # zeros written at a time


class NamespaceBacking:
    """See media_stored.Backing. Owns the namespace."""

    discards_at_once = True

    def __init__(self, namespace: BlockNamespace, layout: DriveLayout):
        self.name = name_of(namespace)
        self._namespace = namespace
        self._page_size = layout.geometry.page_size
        self._may_deallocate = True
        self._data_start = layout.data_start
        self._placement_ids = namespace.placement_identifiers().tolist()

    @contextmanager
    def _media_errors(self, offset: int):
        try:
            yield
        except NvmeStatusError as error:
            number = errno.ENOSPC if error.status == Status.CAPACITY_EXCEEDED else errno.EIO
            if error.lba is not None:
                offset = error.lba * self._namespace.block_bytes
            raise backing_error(number, self.name, offset) from error
        except NvmeError as error:
            log.error("%s: %s", self.name, error)
            raise backing_error(errno.EIO, self.name, offset) from error

    def _page_extents(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """EXTENT, as few as possible: pages that follow each other on flash and in memory are one."""
        size = self._page_size
        apart = (np.diff(pages) != 1) | (np.diff(addresses) != size)
        starts = np.flatnonzero(np.concatenate([[True], apart]))
        extents = np.empty(len(starts), EXTENT)
        extents["address"] = addresses[starts]
        extents["offset"] = self._data_start + pages[starts] * size
        extents["length"] = np.diff(np.append(starts, len(pages))) * size
        return extents

    def read_pages(self, pages: np.ndarray, addresses: np.ndarray, crc32c: np.ndarray) -> None:
        if len(pages):
            with self._media_errors(self._data_start + int(pages[0]) * self._page_size):
                self._namespace.read_extents(self._page_extents(pages, addresses))
            crc32c[:] = crc32c_pages(addresses, self._page_size)

    def _placement_id(self, stream: int) -> int | None:
        """Where the drive is to place a stream; None where it does not ask.

        What has no identifier goes by the drive's first: tables and OOB, which are overwritten in place. So the
        streams share the others.
        """
        if len(self._placement_ids) < 2:
            return self._placement_ids[0] if self._placement_ids else None
        return self._placement_ids[1 + stream % (len(self._placement_ids) - 1)]

    def program_pages(self, pages, addresses, oob, oob_pieces, extents, stream: int) -> None:
        with self._media_errors(self._data_start + int(pages[0]) * self._page_size):
            self._namespace.write_extents(self._page_extents(pages, addresses), self._placement_id(stream))
        complete_oob(addresses, self._page_size, oob)
        for first, count, image in oob_pieces.tolist():
            dma.view(image, count * PAGE_OOB.itemsize).view(PAGE_OOB)[:] = oob[first : first + count]
        self.write_extents(extents)

    def read_extents(self, extents: np.ndarray) -> None:
        with self._media_errors(int(extents["offset"][0])):
            self._namespace.read_extents(extents)

    def write_extents(self, extents: np.ndarray) -> None:
        with self._media_errors(int(extents["offset"][0])):
            self._namespace.write_extents(extents)

    def clear(self, offset: int, length: int) -> None:
        zeros = dma.allocate(min(length, CLEAR_BYTES))
        extents = np.zeros(-(-length // CLEAR_BYTES), EXTENT)
        extents["address"] = dma.address_of(zeros)
        extents["offset"] = np.arange(offset, offset + length, CLEAR_BYTES)
        extents["length"] = np.minimum(offset + length - extents["offset"].astype(np.int64), CLEAR_BYTES)
        self.write_extents(extents)

    def discard(self, offset: int, length: int) -> None:
        block_bytes = self._namespace.block_bytes
        if not self._may_deallocate:
            return
        with self._media_errors(offset):
            try:
                self._namespace.deallocate([(offset // block_bytes, length // block_bytes)])
            except NvmeStatusError as error:  # nothing depends on it: an erase has cleared the OOB
                log.warning("%s does not deallocate, and is not asked again: %s", self.name, error)
                self._may_deallocate = False

    def written_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        yield start, stop  # a drive does not tell

    def sync(self) -> None:
        with self._media_errors(0):
            self._namespace.flush()

    def close(self) -> None:
        self._namespace.close()


class NamespaceMedia(StoredMedia):
    """See FlashMedia. Owns the namespace while open; that nobody else uses it is the caller's promise."""

    @staticmethod
    def geometry_for(namespace: BlockNamespace, size_bytes: int | None = None, **options: int) -> Geometry:
        """A geometry that fits; size_bytes: of flash, None for as much as there is room for.

        options: see Geometry.for_capacity. Raises ValueError where the namespace is too small.
        """
        if size_bytes is not None:
            return Geometry.for_capacity(size_bytes, **options)
        size = room = capacity_of(namespace)
        while True:
            geometry = Geometry.for_capacity(size, **options)
            excess = DriveLayout.new(geometry).size_bytes - room
            if excess <= 0:
                return geometry
            size -= max(excess, geometry.superblock_bytes)

    @staticmethod
    def create(namespace: BlockNamespace, geometry: Geometry) -> "NamespaceMedia":
        """Make a drive of erased flash, over whatever the namespace holds.

        Raises ValueError where the geometry does not fit, MediaIoError.
        """
        layout = DriveLayout.new(geometry)
        wanted, found = layout.size_bytes, capacity_of(namespace)
        if wanted > found or BLOCK_BYTES % namespace.block_bytes:
            blocks = f"{namespace.num_lbas} blocks of {namespace.block_bytes} bytes"
            raise ValueError(f"{wanted} bytes are needed, {name_of(namespace)} has {blocks}")
        backing = NamespaceBacking(namespace, layout)
        backing.clear(0, layout.oob_end)
        table = dma.allocate(layout.oob_start - layout.table_start)
        table[: geometry.num_erase_blocks * ERASE_BLOCK.itemsize] = (
            new_table(geometry).reshape(-1).view(np.uint8)
        )
        backing.write_extents(extent_of(table, layout.table_start))
        backing.discard(layout.data_start, geometry.capacity_bytes)
        backing.sync()
        media = NamespaceMedia(backing, layout, read_only=False)  # writes the header
        media.sync()
        return media

    @staticmethod
    def open(namespace: BlockNamespace, read_only: bool = False) -> "NamespaceMedia":
        """Open a drive. Raises NotADrive and its relatives, MediaIoError."""
        name = name_of(namespace)
        if BLOCK_BYTES % namespace.block_bytes or capacity_of(namespace) < HEADERS_BYTES:
            raise NotADrive(name, f"{namespace.num_lbas} blocks of {namespace.block_bytes} bytes")
        try:
            headers = namespace.read(0, HEADERS_BYTES // namespace.block_bytes)
        except NvmeStatusError as error:
            raise backing_error(errno.EIO, name, 0) from error
        layout = DriveLayout.read(name, headers.tobytes())
        if capacity_of(namespace) < layout.size_bytes:
            raise TruncatedDrive(name, layout.size_bytes, capacity_of(namespace))
        return NamespaceMedia(NamespaceBacking(namespace, layout), layout, read_only)


def name_of(namespace: BlockNamespace) -> str:
    """What errors call a namespace: its drive's serial number."""
    return f"NVMe drive {namespace.serial_number}"


def capacity_of(namespace: BlockNamespace) -> int:
    """Bytes."""
    return namespace.num_lbas * namespace.block_bytes
