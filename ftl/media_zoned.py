"""Flash on a zoned NVMe namespace: a superblock is a zone, its erase is the zone's reset.

The superblock has one plane, so what a zone asks for is what the flash's rules give: pages in ascending
order, once between erases. Pages that the layer leaves out are padded, and a zone that gets no more is
finished when another needs its place among the active ones. What has no order (headers, erase-block table,
OOB) lies in the first zones: see zoned_blocks.py.

After a power cut a zone may be written further than its OOB tells. Such pages are shown as programmed, with
OOB that does not hold; a zone without any OOB is reset. It may also be written less far: then what OOB tells
of is torn.
"""

import logging
import threading
from collections.abc import Iterable

import numpy as np

from ftl.direct_io.api import crc32c_pages
from ftl.drive_layout import HEADERS_BYTES, DriveLayout, new_table
from ftl.errors import EraseFailed, MediaIoError, NandRuleViolation, NotADrive, ProgramFailed, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, ERASE_BLOCK, OOB_MAGIC
from ftl.media_stored import StoredMedia, complete_oob_images, extent_of
from ftl.raw_namespace import joined
from ftl.zoned_blocks import ZonedBlocks, zones_needed
from ftl.zones import Zones, fill_with_pad
from spdk_glue import dma
from spdk_glue.namespace import BlockNamespace

log = logging.getLogger(__name__)

ACTIVE_MIN = 5  # tables, a stream, collection, the log, a checkpoint
NO_PARITY = "no parity on a zoned namespace: it is written in order, and a row's parity comes behind its pages"
THE_PLANE = np.zeros(1, np.int64)


class ZonedBacking:
    """See media_stored.Backing. Owns the namespace. Where a zone is offline, nothing seems to be programmed.

    max_active: superblocks that may be partly written; None for any number
    """

    discards_at_once = True

    def __init__(self, zones: Zones, blocks: ZonedBlocks, layout: DriveLayout):
        self.name = zones.name
        # one is that of the tables
        self.max_active = None if zones.max_active is None else zones.max_active - 1
        self._zones = zones
        self._blocks = blocks
        self._layout = layout
        self._page_size = layout.geometry.page_size
        self._per_superblock = layout.geometry.pages_per_superblock
        self._lock = threading.Lock()
        active = np.flatnonzero(zones.is_active[blocks.num_zones :])
        self._active = set(active.tolist())  # superblocks
        self._closed: list[int] = []  # of these, the ones that nothing more will be written to, oldest first

    def _zone(self, superblock):
        return self._blocks.num_zones + superblock

    # what a superblock's zone is

    def pages_written(self, superblock: int) -> int:
        """Pages that cannot be programmed any more, from the first on."""
        written = int(self._zones.written[self._zone(superblock)])
        return min(-(-written // self._page_size), self._per_superblock)

    def is_usable(self, superblock: int) -> bool:
        return bool(self._zones.is_usable[self._zone(superblock)])

    def is_active(self, superblock: int) -> bool:
        return superblock in self._active

    def pad(self, superblock: int, num_pages: int) -> None:
        """Have so many pages written at least."""
        self._zones.pad(self._zone(superblock), num_pages * self._page_size)

    def reset(self, superblock: int) -> None:
        with self._lock:
            self._zones.reset(self._zone(superblock))
            self._give_up(superblock)

    def _give_up(self, superblock: int) -> None:
        """It is not active."""
        self._active.discard(superblock)
        if superblock in self._closed:
            self._closed.remove(superblock)

    def _activate(self, superblock: int) -> None:
        """Have a place among the active zones for one that is about to be written."""
        with self._lock:
            if superblock in self._active:
                if superblock in self._closed:  # a layer that was opened since goes on with it
                    self._closed.remove(superblock)
                return
            while self.max_active is not None and len(self._active) >= self.max_active:
                if not self._closed:
                    first_page = superblock * self._per_superblock
                    raise NandRuleViolation(f"{self.max_active} superblocks are written at once", first_page)
                self._finish(self._closed[0])
            self._active.add(superblock)

    def _finish(self, superblock: int) -> None:
        self._zones.finish(self._zone(superblock))
        self._give_up(superblock)

    def closed(self, superblock: int) -> None:
        with self._lock:
            if superblock in self._active and superblock not in self._closed:
                self._closed.append(superblock)

    # pages

    def read_pages(self, pages: np.ndarray, addresses: np.ndarray, crc32c: np.ndarray) -> None:
        superblocks, indices = np.divmod(pages, self._per_superblock)
        zones = self._zone(superblocks)
        # what a drive gives for blocks that were not written may look like a page of zeros
        there = (indices + 1) * self._page_size <= self._zones.written[zones]
        there &= ~self._zones.is_offline[zones]
        for address in addresses[~there].tolist():
            fill_with_pad(dma.view(address, self._page_size))
        if there.any():
            offsets = zones * self._zones.size_bytes + indices * self._page_size
            self._zones.read(joined(addresses[there], offsets[there], self._page_size, zones[there]))
        if len(pages):
            crc32c[:] = crc32c_pages(addresses, self._page_size)

    def program_pages(self, pages, addresses, oob, oob_pieces, extents, stream: int) -> None:
        superblocks = pages // self._per_superblock
        for superblock in np.unique(superblocks).tolist():
            mine = superblocks == superblock
            self._program(superblock, pages[mine] % self._per_superblock, addresses[mine])
        complete_oob_images(addresses, self._page_size, oob, oob_pieces)
        self.write_extents(extents)

    def _program(self, superblock: int, indices: np.ndarray, addresses: np.ndarray) -> None:
        zone = self._zone(superblock)
        if indices[0] * self._page_size < self._zones.written[zone]:
            page = superblock * self._per_superblock + int(indices[0])
            raise NandRuleViolation("pages are programmed in order, once per erase", page)
        self._activate(superblock)
        try:
            for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) != 1) + 1):
                self._zones.pad(zone, int(indices[run[0]]) * self._page_size)
                joint = joined(addresses[run], indices[run] * self._page_size, self._page_size)
                self._zones.append(zone, joint["address"], joint["length"].astype(np.int64))
            if indices[-1] + 1 == self._per_superblock:
                with self._lock:
                    self._finish(superblock)
        except MediaIoError as error:
            if self._zones.is_usable[zone]:
                raise
            raise ProgramFailed(superblock, THE_PLANE) from error

    def discard(self, offset: int, length: int) -> None:
        """Erase a superblock, whose place these are in the format. Raises EraseFailed where its zone is no
        more."""
        superblock = (offset - self._layout.data_start) // self._layout.geometry.superblock_bytes
        try:
            self.reset(superblock)
        except MediaIoError as error:
            if self.is_usable(superblock):
                raise
            raise EraseFailed(superblock, THE_PLANE) from error

    # everything else

    def has_oob(self, superblock: int) -> bool:
        """Whether anything was recorded of it since its erase."""
        start = self._layout.oob_of(superblock)
        return any(True for _ in self.written_ranges(start, start + self._layout.oob_stride))

    def read_extents(self, extents: np.ndarray) -> None:
        self._blocks.read_extents(extents)

    def write_extents(self, extents: np.ndarray) -> None:
        self._blocks.write_extents(extents)

    def clear(self, offset: int, length: int) -> None:
        self._blocks.clear(offset, length)

    def written_ranges(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        return self._blocks.written_ranges(start, stop)

    def sync(self) -> None:
        self._zones.flush()

    def close(self) -> None:
        self._zones.close()


class ZonedMedia(StoredMedia):
    """See FlashMedia. Owns the namespace while open. Geometries have one plane: see `geometry_for`."""

    def __init__(self, backing: ZonedBacking, layout: DriveLayout, read_only: bool):
        super().__init__(backing, layout, read_only)
        self.max_open_superblocks = backing.max_active
        if not self.read_only:
            self._settle()

    @staticmethod
    def create(namespace: BlockNamespace, geometry: Geometry) -> "ZonedMedia":
        """Make a drive of erased flash, over whatever the namespace holds.

        Raises ValueError where the geometry does not fit, MediaIoError.
        """
        zones = Zones(namespace)
        layout = DriveLayout.new(geometry)
        num_blocks, num_zones = _check(zones, layout)
        for zone in np.flatnonzero(zones.is_usable).tolist():
            zones.reset(zone)
        zones.flush()
        blocks = ZonedBlocks.create(zones, num_blocks, num_zones)
        backing = ZonedBacking(zones, blocks, layout)
        table = dma.allocate(layout.oob_start - layout.table_start)
        raw = new_table(geometry).reshape(-1).view(np.uint8)
        table[: geometry.num_erase_blocks * ERASE_BLOCK.itemsize] = raw
        backing.write_extents(extent_of(table, layout.table_start))
        backing.sync()
        media = ZonedMedia(backing, layout, read_only=False)  # writes the header
        media.sync()
        return media

    @staticmethod
    def open(namespace: BlockNamespace, read_only: bool = False) -> "ZonedMedia":
        """Open a drive. Raises NotADrive and its relatives, MediaIoError."""
        try:
            zones = Zones(namespace)
        except ValueError as error:
            raise NotADrive("a zoned namespace", str(error)) from error
        blocks = ZonedBlocks.open(zones, read_only)
        headers = dma.allocate(HEADERS_BYTES)
        blocks.read_extents(extent_of(headers, 0))
        layout = DriveLayout.read(zones.name, headers.tobytes())
        wanted, found = blocks.num_zones + layout.geometry.num_superblocks, len(zones)
        if found < wanted:
            raise TruncatedDrive(zones.name, wanted * zones.size_bytes, found * zones.size_bytes)
        if layout.oob_end != blocks.num_blocks * BLOCK_BYTES or layout.geometry.num_planes != 1:
            raise NotADrive(zones.name, "the header does not fit the zones")
        backing = ZonedBacking(zones, blocks, layout)
        return ZonedMedia(backing, layout, read_only or blocks.is_damaged)

    def _settle(self) -> None:
        """Make what a power cut has left fit to go on with."""
        for superblock in range(self.geometry.num_superblocks):
            if self._rules.bad[superblock, 0]:
                continue
            if not self._backing.is_usable(superblock):
                log.warning("%s: the zone of superblock %d cannot be written", self._backing.name, superblock)
                self.mark_bad(superblock, THE_PLANE)
            elif not self._backing.has_oob(superblock):
                # erased, but for the reset; or the OOB of all that it holds was lost
                self._backing.reset(superblock)
            elif self._backing.is_active(superblock):
                # finishing the zone would let what is missing look like anything
                self._backing.pad(superblock, _num_recorded(super().read_oob(superblock)))

    def read_oob(self, superblock: int) -> np.ndarray:
        records = super().read_oob(superblock)
        recorded = _num_recorded(records)
        if recorded and not self._rules.bad[superblock, 0]:
            records["magic"][recorded : self._backing.pages_written(superblock)] = OOB_MAGIC
            self._rules.found(superblock, records["magic"] != 0)
        return records

    def closed(self, superblock: int) -> None:
        self._backing.closed(superblock)


def _num_recorded(records: np.ndarray) -> int:
    """Pages up to the last one with OOB."""
    return int(np.flatnonzero(records["magic"]).max(initial=-1)) + 1


def is_written(namespace: BlockNamespace) -> bool:
    """Whether anything is in a zoned namespace. Raises MediaIoError."""
    return bool(Zones(namespace).written.any())


def holds_flash(namespace: BlockNamespace) -> bool:
    """Whether a zoned namespace holds a drive, whole or damaged. Raises MediaIoError."""
    try:
        ZonedBlocks.open(Zones(namespace), read_only=True)
    except NotADrive:
        return False
    return True


def geometry_for(
    namespace: BlockNamespace, size_bytes: int | None = None, page_size: int = 4096, spare_percent: int = 7
) -> Geometry:
    """A geometry for a zoned namespace; size_bytes: of flash at most, None for as much as there is room for.

    Raises ValueError where the namespace is too small, MediaIoError.
    """
    zones = Zones(namespace)
    num_pages = _capacity(zones) // page_size
    num_superblocks = len(zones)
    if size_bytes is not None:
        num_superblocks = min(num_superblocks, size_bytes // max(1, num_pages * page_size))
    while True:
        geometry = Geometry(
            page_size=page_size,
            num_channels=1,
            pages_per_erase_block=num_pages,
            num_superblocks=num_superblocks,
            spare_percent=spare_percent,
        )
        if num_superblocks + _tables(zones, DriveLayout.new(geometry))[1] <= len(zones):
            return geometry
        num_superblocks -= 1


def _tables(zones: Zones, layout: DriveLayout) -> tuple[int, int]:
    """(blocks, zones) for everything that is not pages."""
    num_blocks = layout.oob_end // BLOCK_BYTES
    return num_blocks, zones_needed(num_blocks, _capacity(zones))


def _capacity(zones: Zones) -> int:
    """Bytes that every zone takes. Raises ValueError where none can be written."""
    if not zones.is_usable.any():
        raise ValueError(f"{zones.name}: no zone can be written")
    return int(zones.capacity[zones.is_usable].min())


def _check(zones: Zones, layout: DriveLayout) -> tuple[int, int]:
    """_tables of a new drive. Raises ValueError where it does not fit."""
    geometry = layout.geometry
    if geometry.parity:
        raise ValueError(NO_PARITY)
    if geometry.num_planes != 1:
        raise ValueError(f"a zone is one erase block: num_planes must be 1, not {geometry.num_planes}")
    num_blocks, num_zones = _tables(zones, layout)
    if not zones.is_usable[:num_zones].all():
        raise ValueError(f"{zones.name}: one of the first {num_zones} zones cannot be written")
    capacity = _capacity(zones)
    if geometry.superblock_bytes > capacity:
        raise ValueError(f"a superblock of {geometry.superblock_bytes} bytes in a zone that takes {capacity}")
    if num_zones + geometry.num_superblocks > len(zones):
        wanted = f"{num_zones} for tables, {geometry.num_superblocks} for superblocks"
        raise ValueError(f"{zones.name} has {len(zones)} zones, needed are {wanted}")
    if zones.max_active is not None and zones.max_active < ACTIVE_MIN:
        raise ValueError(f"{zones.name}: {zones.max_active} zones may be active, needed are {ACTIVE_MIN}")
    return num_blocks, num_zones
