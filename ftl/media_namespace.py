"""Flash on a raw NVMe namespace: the format of media_file.py in the blocks of any drive.

The drive below has a translation layer of its own, so its blocks never wear out for us; what is gained is the
placement and recovery of this one without a file system in between. Deallocation is a hint that a drive may
ignore, so an erase writes zeros over the OOB and deallocates only the payload.
"""

import logging
from collections.abc import Iterator

import numpy as np

from ftl import media_zoned
from ftl.direct_io.api import crc32c_pages
from ftl.drive_layout import HEADERS_BYTES, DriveLayout, has_magic, new_table
from ftl.errors import NotADrive, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, ERASE_BLOCK
from ftl.media_stored import StoredMedia, complete_oob_images, extent_of
from ftl.media_zoned import NO_PARITY, ZonedMedia
from ftl.raw_namespace import capacity_of, joined, media_errors, name_of
from spdk_glue import dma
from spdk_glue.command import CommandSet
from spdk_glue.dma import EXTENT
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeStatusError

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

    def _media_errors(self, offset: int):
        return media_errors(self._namespace, offset)

    def _page_extents(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """EXTENT, as few as possible: pages that follow each other on flash and in memory are one."""
        offsets = self._data_start + pages * self._page_size
        return joined(addresses, offsets, self._page_size)

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
        complete_oob_images(addresses, self._page_size, oob, oob_pieces)
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
    """See FlashMedia. Owns the namespace while open; that nobody else uses it is the caller's promise.

    On a zoned namespace it is ZonedMedia that is made and opened.
    """

    @staticmethod
    def geometry_for(namespace: BlockNamespace, size_bytes: int | None = None, **options: int) -> Geometry:
        """A geometry that fits; size_bytes: of flash, None for as much as there is room for.

        options: see Geometry.for_capacity. Raises ValueError where the namespace is too small, MediaIoError.
        """
        if is_zoned(namespace):
            if options.pop("parity", 0):
                raise ValueError(NO_PARITY)
            return media_zoned.geometry_for(namespace, size_bytes, **options)
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
    def create(namespace: BlockNamespace, geometry: Geometry) -> StoredMedia:
        """Make a drive of erased flash, over whatever the namespace holds.

        Raises ValueError where the geometry does not fit, MediaIoError.
        """
        if is_zoned(namespace):
            return ZonedMedia.create(namespace, geometry)
        layout = DriveLayout.new(geometry)
        wanted, found = layout.size_bytes, capacity_of(namespace)
        if wanted > found or not _suits(namespace):
            raise ValueError(f"{wanted} bytes are needed, {name_of(namespace)} has {_blocks_of(namespace)}")
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
    def open(namespace: BlockNamespace, read_only: bool = False) -> StoredMedia:
        """Open a drive. Raises NotADrive and its relatives, MediaIoError."""
        if is_zoned(namespace):
            return ZonedMedia.open(namespace, read_only)
        name = name_of(namespace)
        if not _suits(namespace) or capacity_of(namespace) < HEADERS_BYTES:
            raise NotADrive(name, _blocks_of(namespace))
        with media_errors(namespace, 0):
            headers = namespace.read(0, HEADERS_BYTES // namespace.block_bytes)
        layout = DriveLayout.read(name, headers.tobytes())
        if capacity_of(namespace) < layout.size_bytes:
            raise TruncatedDrive(name, layout.size_bytes, capacity_of(namespace))
        return NamespaceMedia(NamespaceBacking(namespace, layout), layout, read_only)


def holds_flash(namespace: BlockNamespace) -> bool:
    """Whether a namespace holds a drive, whole or damaged. Raises NvmeStatusError, MediaIoError."""
    if namespace.command_set() == CommandSet.ZONED:
        return media_zoned.holds_flash(namespace)
    count = min(-(-HEADERS_BYTES // namespace.block_bytes), namespace.num_lbas)
    return has_magic(namespace.read(0, count)[:HEADERS_BYTES].tobytes())


def is_zoned(namespace: BlockNamespace) -> bool:
    with media_errors(namespace, 0):
        return namespace.command_set() == CommandSet.ZONED


def _suits(namespace: BlockNamespace) -> bool:
    return BLOCK_BYTES % namespace.block_bytes == 0 and not namespace.metadata_bytes


def _blocks_of(namespace: BlockNamespace) -> str:
    text = f"{namespace.num_lbas} blocks of {namespace.block_bytes} bytes"
    return f"{text} and {namespace.metadata_bytes} of metadata" if namespace.metadata_bytes else text
