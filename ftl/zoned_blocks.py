"""Blocks that can be written in any order, kept as a log in zones that cannot.

The first zones of a namespace hold records: a header block that names blocks, then those blocks. Memory keeps
where the newest version of each is. Opening reads every record; one that a power cut has torn is not there at
all, so a record happens or it does not.

One zone is being written, and one at least is free. When the one being written is full, a free one takes its
place; if that was the last, the zone with the fewest living blocks is emptied into it: copies, a flush, a
reset. Only then is anything else written there. So of a drive without a free zone, opening knows that the
newest zone holds nothing but copies, or that some other zone holds nothing living: either can be reset.

A block that was made zero is as living as any other: its older versions may lie in zones that are not emptied
yet.
"""

import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ftl.direct_io.api import copy_pages, crc32c_pages, crc32c_records, zero_pages
from ftl.errors import NotADrive, backing_error
from ftl.layout import BLOCK_BYTES, ZONE_EXTENT, ZONE_EXTENTS_MAX, ZONE_RECORD, ZONE_RECORD_MAGIC
from ftl.raw_namespace import joined
from ftl.zones import Zones
from spdk_glue import dma
from spdk_glue.dma import EXTENT

log = logging.getLogger(__name__)

NOWHERE = -1  # a block that is zero; a zone of none
RECORD_BLOCKS_MAX = 128
RECORD_SHARE = 4  # a record takes up to this part of a zone
ZONES_MIN = 3  # being written, being emptied, free
SCAN_BYTES = 4 << 20  # read at a time; more than any record


def zones_needed(num_blocks: int, zone_bytes: int) -> int:
    """Zones for so many blocks. Half of them are living at most, so that emptying a zone gives half a zone."""
    return max(ZONES_MIN, 2 + -(-2 * num_blocks * BLOCK_BYTES // zone_bytes))


@dataclass
class Record:
    """A whole one. extents: ZONE_EXTENT [n]; place: of its header, in blocks of the namespace."""

    sequence_number: int
    zone: int
    place: int
    is_copy: bool
    extents: np.ndarray


def _runs(blocks: np.ndarray, is_zero: bool) -> np.ndarray:
    """ZONE_EXTENT: blocks, int64 [n], as few as possible."""
    starts = np.flatnonzero(np.concatenate([[True], np.diff(blocks) != 1]))
    runs = np.empty(len(starts), ZONE_EXTENT)
    runs["first_block"], runs["is_zero"] = blocks[starts], is_zero
    runs["num_blocks"] = np.diff(np.append(starts, len(blocks)))
    return runs


def _by_block(extents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n] blocks, uint64 [n] addresses) of EXTENT [m]."""
    counts = extents["length"].astype(np.int64) // BLOCK_BYTES
    before = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.repeat(extents["offset"].astype(np.int64) // BLOCK_BYTES, counts) + before
    addresses = np.repeat(extents["address"], counts) + before.astype(np.uint64) * np.uint64(BLOCK_BYTES)
    return blocks, addresses


class ZonedBlocks:
    """Offsets and lengths are bytes, multiples of BLOCK_BYTES. Thread-safe. Failures are MediaIoErrors."""

    def __init__(self, zones: Zones, num_zones: int, num_blocks: int):
        self.num_zones, self.num_blocks = num_zones, num_blocks
        self.is_damaged = False  # a record is gone that was whole once
        self._zones = zones
        self._lock = threading.Lock()
        self._places = np.full(num_blocks, NOWHERE, np.int64)  # in blocks of the namespace; NOWHERE: zero
        self._owners = np.full(num_blocks, NOWHERE, np.int32)  # zone of the record that says so
        self._sequence_number = 0  # of the newest record
        self._previous = np.full(num_zones, NOWHERE)  # place of the last record in each zone
        self._open: int | None = None
        self._free: list[int] = []  # the longest free first
        capacity = int(zones.capacity[:num_zones].min()) // BLOCK_BYTES
        self._record_blocks = max(1, min(RECORD_BLOCKS_MAX, capacity // RECORD_SHARE - 1))
        self._buffer = dma.allocate((1 + self._record_blocks) * BLOCK_BYTES)  # a record, to be written

    @staticmethod
    def create(zones: Zones, num_blocks: int, num_zones: int) -> "ZonedBlocks":
        """Blocks of zeros, in zones that were reset."""
        blocks = ZonedBlocks(zones, num_zones, num_blocks)
        blocks._free = np.flatnonzero(zones.is_usable[:num_zones]).tolist()
        return blocks

    @staticmethod
    def open(zones: Zones, read_only: bool) -> "ZonedBlocks":
        """What the zones hold. Raises NotADrive."""
        header = dma.allocate(BLOCK_BYTES)
        for zone in np.flatnonzero((zones.written > 0) & ~zones.is_offline).tolist():
            zones.read(_extent(header, zones.start(zone)))
            found = header.view(ZONE_RECORD)[0]
            if _holds(found, zones.start(zone) // BLOCK_BYTES) and zone < found["num_zones"] <= len(zones):
                blocks = ZonedBlocks(zones, int(found["num_zones"]), int(found["space_blocks"]))
                blocks._recover(read_only)
                return blocks
        raise NotADrive(zones.name, "no zone begins with records of a drive")

    # what Backing asks for

    def read_extents(self, extents: np.ndarray) -> None:
        """Read EXTENT [n]."""
        blocks, addresses = _by_block(extents)
        with self._lock:  # emptying a zone would take away what is being read
            places = self._places[blocks]
            there = places != NOWHERE
            zero_pages(addresses[~there], BLOCK_BYTES)
            if there.any():
                self._zones.read(self._joined(addresses[there], places[there]))

    def write_extents(self, extents: np.ndarray) -> None:
        """Write EXTENT [n], in pieces that happen whole or not at all."""
        blocks, addresses = _by_block(extents)
        with self._lock:
            for start in range(0, len(blocks), self._record_blocks):
                part = slice(start, start + self._record_blocks)
                self._make_room(len(blocks[part]))
                copy_pages(self._addresses(len(blocks[part])), addresses[part], BLOCK_BYTES)
                self._append(_runs(blocks[part], False))

    def clear(self, offset: int, length: int) -> None:
        """Make a range zero."""
        blocks = np.arange(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES)
        with self._lock:
            self._make_room(0)
            self._append(_runs(blocks, True))

    def written_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Offset ranges of what is not zero."""
        with self._lock:
            is_there = self._places[start // BLOCK_BYTES : stop // BLOCK_BYTES] != NOWHERE
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_there, [False]])))
        yield from map(tuple, (edges.reshape(-1, 2) * BLOCK_BYTES + start).tolist())

    # records

    def _addresses(self, num_blocks: int) -> np.ndarray:
        """uint64: where the blocks of the record to be written lie in memory."""
        return dma.page_addresses(self._buffer, BLOCK_BYTES)[1 : 1 + num_blocks]

    def _joined(self, addresses: np.ndarray, places: np.ndarray) -> np.ndarray:
        offsets = places * BLOCK_BYTES
        return joined(addresses, offsets, BLOCK_BYTES, offsets // self._zones.size_bytes)

    def _room(self) -> int:
        """Blocks that the zone being written takes still."""
        if self._open is None:
            return 0
        return int(self._zones.capacity[self._open]) // BLOCK_BYTES - self._fill()

    def _fill(self) -> int:
        """Blocks that are written of the zone being written; one that was begun counts."""
        return -(-int(self._zones.written[self._open]) // BLOCK_BYTES)

    def _append(self, extents: np.ndarray, is_copy: bool = False) -> None:
        """Write a record: ZONE_EXTENT [n], whose blocks are in the buffer. There is room."""
        num_blocks = int(extents["num_blocks"][extents["is_zero"] == 0].sum())
        zones, zone, fill = self._zones, self._open, self._fill()
        if self._room() < 1 + num_blocks:
            raise backing_error(errno.ENOSPC, zones.name, zones.start(zone))
        place = zones.start(zone) // BLOCK_BYTES + fill
        header = self._buffer[:BLOCK_BYTES].view(ZONE_RECORD)
        header[:] = np.zeros((), ZONE_RECORD)
        header["magic"], header["place"], header["is_copy"] = ZONE_RECORD_MAGIC, place, is_copy
        header["sequence_number"] = self._sequence_number + 1
        previous = int(self._previous[zone])
        header["previous"] = place if previous == NOWHERE else previous
        header["num_zones"], header["space_blocks"] = self.num_zones, self.num_blocks
        header["num_extents"], header["num_blocks"] = len(extents), num_blocks
        header["extents"][0, : len(extents)] = extents
        header["blocks_crc32c"] = _crc32c(self._buffer[BLOCK_BYTES : (1 + num_blocks) * BLOCK_BYTES])
        header["crc32c"] = crc32c_records(header)
        self._sequence_number += 1  # whatever comes of this one, no other has its number
        self._open = None  # what a failure has left of it is gone over only after a reset
        zones.pad(zone, fill * BLOCK_BYTES)
        size = (1 + num_blocks) * BLOCK_BYTES
        zones.append(zone, np.array([dma.address_of(self._buffer)]), np.array([size]))
        self._open = zone
        self._note(Record(self._sequence_number, zone, place, is_copy, extents))

    def _note(self, record: Record) -> None:
        """The newest record is this one."""
        place = record.place + 1
        for block, count, is_zero in record.extents.tolist():
            part = slice(block, block + count)
            self._owners[part] = record.zone
            self._places[part] = NOWHERE if is_zero else np.arange(place, place + count)
            place += 0 if is_zero else count
        self._previous[record.zone] = record.place

    # room

    def _make_room(self, num_blocks: int) -> None:
        """Have a zone open that takes a record with so many blocks."""
        if self._room() < 1 + num_blocks:
            self._next_zone()

    def _next_zone(self) -> None:
        if not self._free:
            raise backing_error(errno.ENOSPC, self._zones.name, 0)
        self._open = self._free.pop(0)
        self._finish_others()
        while not self._free:
            self._empty_one()

    def _finish_others(self) -> None:
        """Leave one zone active."""
        for zone in np.flatnonzero(self._zones.is_active[: self.num_zones]).tolist():
            if zone != self._open:
                # what a torn record lacks could look like blocks of zeros then, and make it whole
                written, capacity = int(self._zones.written[zone]), int(self._zones.capacity[zone])
                self._zones.pad(zone, min(written + BLOCK_BYTES, capacity))
                self._zones.finish(zone)

    def _empty_one(self) -> None:
        """Free the zone with the fewest living blocks."""
        zones = self._zones
        candidates = np.flatnonzero(zones.is_usable[: self.num_zones])
        candidates = candidates[candidates != self._open]
        if not len(candidates):
            raise backing_error(errno.ENOSPC, zones.name, 0)
        living = np.bincount(self._owners[self._places != NOWHERE], minlength=self.num_zones)
        victim = int(candidates[np.argmin(living[candidates])])
        mine = np.flatnonzero(self._owners == victim)
        there = mine[self._places[mine] != NOWHERE]
        for start in range(0, len(there), self._record_blocks):
            part = there[start : start + self._record_blocks]
            zones.read(self._joined(self._addresses(len(part)), self._places[part]))
            self._append(_runs(part, False), is_copy=True)
        zeros = np.setdiff1d(mine, there)
        runs = _runs(zeros, True) if len(zeros) else np.empty(0, ZONE_EXTENT)
        for start in range(0, len(runs), ZONE_EXTENTS_MAX):
            self._append(runs[start : start + ZONE_EXTENTS_MAX], is_copy=True)
        zones.flush()
        self._reset(victim)

    def _reset(self, zone: int) -> None:
        self._zones.reset(zone)
        self._previous[zone] = NOWHERE
        self._free.append(zone)

    # opening

    def _recover(self, read_only: bool) -> None:
        zones = self._zones
        if not read_only:
            zones.flush()  # what is found must not be lost by what is done to it
        records = [record for zone in range(self.num_zones) for record in self._scan(zone)]
        if not records:
            raise NotADrive(zones.name, "no record of a drive is whole")
        records.sort(key=lambda record: record.sequence_number)
        self._take_over(records)
        if read_only:
            return
        usable = np.flatnonzero(zones.is_usable[: self.num_zones]).tolist()
        for zone in usable:
            if self._previous[zone] == NOWHERE:  # empty, or a cut has torn its first record
                self._reset(zone)
        newest = records[-1].zone
        if not self._free:
            living = set(np.unique(self._owners).tolist())
            dead = [zone for zone in usable if zone not in living and zone != newest]
            if not dead:  # it was being emptied, and is whole still
                if not all(record.is_copy for record in records if record.zone == newest):
                    log.error("%s: no zone for tables is free", zones.name)
                    return
                dead = [newest]
                records = [record for record in records if record.zone != newest]
                self._take_over(records)
                newest = records[-1].zone
            self._reset(dead[0])
        if zones.is_usable[newest]:
            self._open = newest
        self._finish_others()

    def _take_over(self, records: list[Record]) -> None:
        """What the blocks are, from all records in their order."""
        self._places[:] = NOWHERE
        self._owners[:] = NOWHERE
        self._previous[:] = NOWHERE
        for record in records:
            self._note(record)
        self._sequence_number = records[-1].sequence_number

    def _scan(self, zone: int) -> Iterator[Record]:
        """The whole records of a zone."""
        start = self._zones.start(zone) // BLOCK_BYTES
        stop = start + int(self._zones.written[zone]) // BLOCK_BYTES
        place, previous, newest = start, NOWHERE, 0
        buffer = dma.allocate(SCAN_BYTES)
        first, end = start, start  # what is in the buffer
        while place < stop:
            if place + 1 + RECORD_BLOCKS_MAX > end and end < stop:
                first, end = place, min(place + SCAN_BYTES // BLOCK_BYTES, stop)
                size = (end - first) * BLOCK_BYTES
                self._zones.read(_extent(buffer[:size], first * BLOCK_BYTES))
            offset = (place - first) * BLOCK_BYTES
            header = buffer[offset : offset + BLOCK_BYTES].view(ZONE_RECORD)[0]
            num_blocks = int(header["num_blocks"])
            if not _holds(header, place) or not self._names_blocks(header) or place + num_blocks >= end:
                place += 1  # torn: the next one is behind it
                continue
            offset += BLOCK_BYTES
            crc32c = _crc32c(buffer[offset : offset + num_blocks * BLOCK_BYTES])
            number = int(header["sequence_number"])
            if crc32c != header["blocks_crc32c"] or number <= newest:  # or of the zone's life before this one
                place += 1
                continue
            if header["previous"] != (place if previous == NOWHERE else previous):
                log.error("%s: a record before the one at block %d is damaged", self._zones.name, place)
                self.is_damaged = True
            extents = header["extents"][: int(header["num_extents"])].copy()
            yield Record(number, zone, place, bool(header["is_copy"]), extents)
            previous, newest = place, number
            place += 1 + num_blocks

    def _names_blocks(self, header: np.void) -> bool:
        """Whether a record is one of these blocks, and names such."""
        extents = header["extents"][: int(header["num_extents"])]
        counts = extents["num_blocks"]
        fits = extents["first_block"] + counts <= self.num_blocks
        return bool(
            header["num_zones"] == self.num_zones
            and header["space_blocks"] == self.num_blocks
            and header["num_blocks"] == counts[extents["is_zero"] == 0].sum()
            and fits.all()
        )


def _extent(buffer: np.ndarray, offset: int) -> np.ndarray:
    return np.array([(dma.address_of(buffer), offset, buffer.nbytes)], EXTENT)


def _crc32c(memory: np.ndarray) -> int:
    """Of uint8, whole blocks; 0 of none."""
    if not len(memory):
        return 0
    return int(crc32c_pages(np.array([dma.address_of(memory)], np.uint64), memory.nbytes)[0])


def _holds(header: np.void, place: int) -> bool:
    """Whether a block is the header of a record that was written where it is."""
    if header["magic"] != ZONE_RECORD_MAGIC or header["place"] != place:
        return False
    record = np.frombuffer(header.tobytes(), ZONE_RECORD)
    small = header["num_blocks"] <= RECORD_BLOCKS_MAX and header["num_extents"] <= ZONE_EXTENTS_MAX
    return bool(small and header["crc32c"] == crc32c_records(record)[0])
