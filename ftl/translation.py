"""The flash translation layer: logical blocks over flash that cannot be overwritten.

Writes append to the open superblock of their stream; the map points at the newest version of each LBA.
Locking: one lock holds the map, the superblocks and all programming; reading flash happens outside it,
behind a read guard. Errors leave the map as it was before the failed batch.

Before a superblock is erased, everything that replaced its content is made durable: the copies or newer
versions (media sync) and the deallocations (log). So no instant exists at which a power cut could bring
back a version older than the newest durable one.
"""

import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from ftl import deallocation_log
from ftl.direct_io.api import zero_pages
from ftl.errors import CorruptPage, LbaOutOfRange, MediaClosed, OutOfFlash, ReadOnlyMedia
from ftl.garbage_collection import choose_victim
from ftl.layout import DEALLOCATION, LBA_NONE, OOB_MAGIC, PAGE_OOB, PageKind
from ftl.mapping import PAGE_NONE, Mapping
from ftl.media import FlashMedia
from ftl.provisioning import GC_RESERVE, num_lbas, num_streams
from ftl.read_guard import ReadGuards
from ftl.recovery import recover
from ftl.superblocks import State, Superblocks
from spdk_glue import dma

__all__ = ["PAGE_NONE", "FlashTranslationLayer", "FtlCounters"]

log = logging.getLogger(__name__)

GC_STREAM = 0xFE
LOG_STREAM = 0xFF
MARK_PAGES = 256  # programs since the last durable mark after which a flush leaves a new one


@dataclass
class FtlCounters:
    """Since the drive was opened, in pages unless said otherwise."""

    host_pages_written: int = 0
    host_pages_read: int = 0
    gc_pages_written: int = 0
    metadata_pages_written: int = 0
    superblocks_erased: int = 0  # superblocks
    corrupt_pages: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class FlashTranslationLayer:
    """One drive's map, streams and recovery. Made by `format` or `open`; thread-safe."""

    def __init__(self, media: FlashMedia):
        self.media = media
        self.geometry = media.geometry
        self.page_size = media.geometry.page_size
        self.uuid = uuid.UUID(bytes=media.uuid)
        self.num_lbas = num_lbas(media.geometry)
        self.num_streams = num_streams(media.geometry)
        self.counters = FtlCounters()
        self._per_superblock = media.geometry.pages_per_superblock
        self._lock = threading.RLock()
        self._guards = ReadGuards(self._lock)
        self._map = Mapping(self.num_lbas, media.geometry.num_superblocks, self._per_superblock)
        self._superblocks = Superblocks(media.bad_superblocks(), media.erase_counts())
        self._payload_crc32c = np.zeros(media.geometry.num_pages, np.uint32)
        self._open: dict[int, int] = {}  # stream to superblock
        self._next_index = np.zeros(media.geometry.num_superblocks, np.int64)
        self._log_superblocks: list[int] = []  # oldest first; the last is being written
        self._pending_deallocations: list[tuple[int, int, int]] = []
        self._erasing: list[tuple[int, int]] = []  # superblock, epoch whose readers it waits for
        self._erase_callbacks: list[Callable[[int, int], None]] = []
        self._sequence_number = 1
        self._program_number = 1
        self._durable_program_number = 0
        self._marked_program_number = 0
        self._session = 1
        self._changed = False
        self._closed = False

    # opening and closing

    @classmethod
    def format(cls, media: FlashMedia) -> "FlashTranslationLayer":
        """A layer over erased flash."""
        return cls(media)

    @classmethod
    def open(cls, media: FlashMedia) -> "FlashTranslationLayer":
        """A layer over flash that was used before: see recovery.py."""
        ftl = cls(media)
        found = recover(media, ftl._map, ftl._payload_crc32c)
        ftl._sequence_number = found.next_sequence_number
        ftl._program_number = found.next_program_number
        # program numbers of earlier sessions are durable or verified from here on
        ftl._durable_program_number = ftl._marked_program_number = found.next_program_number - 1
        ftl._session = found.session
        ftl._next_index[:] = found.fill
        for superblock in np.flatnonzero(found.fill).tolist():
            is_log = superblock in found.log_superblocks
            ftl._superblocks.move(superblock, State.LOG if is_log else State.OPEN)
            if not is_log:
                ftl._superblocks.move(superblock, State.FULL)
        ftl._log_superblocks = sorted(found.log_superblocks, key=lambda superblock: ftl._log_age(superblock))
        ftl._resume(found.last_stream)
        if not media.read_only and found.next_program_number > 1:
            media.sync()  # what survived a cut must not be lost by the next one
        return ftl

    def _log_age(self, superblock: int) -> int:
        records = self.media.read_oob(superblock)
        return int(records["program_number"].max())

    def _resume(self, last_stream: dict[int, int]) -> None:
        """Go on programming what was open: a restart, or a crash of many, must not use up superblocks."""
        for superblock, stream in last_stream.items():
            known = stream == GC_STREAM or stream < self.num_streams
            if known and stream not in self._open and self._superblocks.states[superblock] == State.FULL:
                self._superblocks.states[superblock] = State.OPEN
                self._open[stream] = superblock

    def close(self) -> None:
        """Flush and end; every later call raises MediaClosed."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._changed and not self.media.read_only:
                    self.flush()
            finally:
                self._closed = True

    def _check_usable(self, change: str | None = None) -> None:
        if self._closed:
            raise MediaClosed
        if change and self.media.read_only:
            raise ReadOnlyMedia(change)

    def _check_range(self, lbas: np.ndarray) -> np.ndarray:
        lbas = np.ascontiguousarray(lbas, np.int64)
        if len(lbas):
            low, high = int(lbas.min()), int(lbas.max())
            if low < 0 or high >= self.num_lbas:
                raise LbaOutOfRange(low if low < 0 else high, self.num_lbas)
        return lbas

    # writing

    def write(self, lbas: np.ndarray, sources: np.ndarray, stream: int = 0) -> None:
        """Write pages: int64 [n] LBAs from uint64 [n] addresses. Of an LBA named twice the last counts.

        Raises LbaOutOfRange, OutOfFlash, MediaIoError, ReadOnlyMedia; LBAs not written keep their content.
        """
        lbas = self._check_range(lbas)
        with self._lock:
            self._check_usable("write")
            self._append(stream % self.num_streams, lbas, sources)
            self.counters.host_pages_written += len(lbas)

    def _append(self, stream: int, lbas, sources, sequence_numbers=None, old_pages=None) -> None:
        """Program a batch into a stream and map it. Copies keep their versions and come with old_pages."""
        done = 0
        while done < len(lbas):
            superblock = self._open_superblock(stream)
            index = int(self._next_index[superblock])
            count = min(self._per_superblock - index, len(lbas) - done)
            part = slice(done, done + count)
            pages = superblock * self._per_superblock + np.arange(index, index + count)
            oob = np.zeros(count, PAGE_OOB)
            oob["lba"] = lbas[part]
            if sequence_numbers is None:
                oob["sequence_number"] = np.arange(self._sequence_number, self._sequence_number + count)
                self._sequence_number += count
            else:
                oob["sequence_number"] = sequence_numbers[part]
            self._program(stream, PageKind.DATA, superblock, pages, sources[part], oob)
            if old_pages is None:
                self._map.assign(lbas[part], pages)
            else:
                self._map.move(lbas[part], old_pages[part], pages)
            if self._next_index[superblock] == self._per_superblock:
                self._superblocks.move(superblock, State.FULL)
                del self._open[stream]
            done += count

    def _program(self, stream: int, kind: PageKind, superblock: int, pages, sources, oob) -> None:
        count = len(pages)
        oob["magic"] = OOB_MAGIC
        oob["kind"] = kind
        oob["stream"] = stream
        oob["program_number"] = np.arange(self._program_number, self._program_number + count)
        oob["durable_program_number"] = self._durable_program_number
        oob["session"] = self._session
        self._program_number += count
        self._changed = True
        try:
            self.media.program(pages, sources, oob)
        except BaseException:
            # how far it came is unknown: nothing is programmed there again before an erase
            self._abandon(stream, superblock)
            raise
        self._next_index[superblock] += count
        self._payload_crc32c[pages] = oob["payload_crc32c"]

    def _abandon(self, stream: int, superblock: int) -> None:
        self._next_index[superblock] = self._per_superblock
        if self._open.get(stream) == superblock:
            del self._open[stream]
            self._superblocks.move(superblock, State.FULL)

    def _open_superblock(self, stream: int) -> int:
        if stream not in self._open:
            if stream != GC_STREAM:
                self._make_room()
            superblock = self._superblocks.take_free(State.OPEN)
            if superblock is None:
                raise OutOfFlash(0, len(self._erasing))
            self._open[stream] = superblock
            self._next_index[superblock] = 0
        return self._open[stream]

    # garbage collection

    def _make_room(self) -> None:
        """Have more than GC_RESERVE superblocks free, collecting as needed. Raises OutOfFlash."""
        while self._superblocks.count(State.FREE) <= GC_RESERVE:
            if self._finish_erases():
                continue
            victim = choose_victim(self._superblocks, self._map.valid_pages, self._per_superblock)
            if victim is None and not self._erasing:
                raise OutOfFlash(self._superblocks.count(State.FREE), 0)
            if victim is not None and self._collect(victim):
                self._start_erase(victim)
            elif self._erasing:
                self._guards.changed.wait()  # for readers; the lock is released meanwhile

    def _collect(self, victim: int) -> bool:
        """Copy a victim's valid pages elsewhere; False, and quarantined, when one is corrupt."""
        if self._map.valid_pages[victim] == 0:
            return True
        records = self.media.read_oob(victim)
        pages = victim * self._per_superblock + np.arange(self._per_superblock)
        data = (records["magic"] == OOB_MAGIC) & (records["kind"] == PageKind.DATA)
        data &= records["lba"] < self.num_lbas
        records, pages = records[data], pages[data]
        lbas = records["lba"].astype(np.int64)
        valid = self._map.resolve(lbas) == pages
        records, pages, lbas = records[valid], pages[valid], lbas[valid]
        buffer = dma.allocate(len(pages) * self.page_size)
        addresses = dma.page_addresses(buffer, self.page_size)
        try:
            self._read_checked(pages, lbas, addresses)
        except CorruptPage as error:
            log.error("superblock %d is kept out of collection: %s", victim, error)
            self._superblocks.move(victim, State.QUARANTINED)
            return False
        self._append(GC_STREAM, lbas, addresses, records["sequence_number"], pages)
        self.counters.gc_pages_written += len(pages)
        return True

    def _start_erase(self, superblock: int) -> None:
        """Erase once it is safe: what replaced the content is durable, and no reader is inside."""
        self._make_durable()
        self._superblocks.move(superblock, State.ERASING)
        self._erasing.append((superblock, self._guards.next_epoch()))
        self._finish_erases()

    def _finish_erases(self) -> bool:
        """Erase what no reader holds any more; whether any was."""
        ready = [entry for entry in self._erasing if self._guards.is_past(entry[1])]
        for entry in ready:
            superblock = entry[0]
            self.media.erase(superblock)
            self._erasing.remove(entry)
            self._superblocks.move(superblock, State.FREE)
            self._superblocks.erase_counts[superblock] += 1
            self._next_index[superblock] = 0
            self.counters.superblocks_erased += 1
            for callback in self._erase_callbacks:
                callback(superblock * self._per_superblock, self._per_superblock)
        return bool(ready)

    # deallocation and durability

    def deallocate(self, ranges: np.ndarray) -> None:
        """Give back ranges: int64 [m, 2] of (first LBA, number of LBAs). They read as zeros at once, and
        after a power cut once flushed. Raises LbaOutOfRange with nothing done."""
        ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
        for first, count in ranges.tolist():
            if first < 0 or count < 0 or first + count > self.num_lbas:
                raise LbaOutOfRange(max(first + count - 1, first), self.num_lbas)
        with self._lock:
            self._check_usable("deallocate")
            for first, count in ranges.tolist():
                if self._map.unmap(first, count):
                    self._changed = True
                    self._pending_deallocations.append((first, count, self._sequence_number))
                    self._sequence_number += 1

    def flush(self) -> None:
        """Every write and deallocation so far survives a power cut when this returns."""
        with self._lock:
            self._check_usable()
            if self.media.read_only:
                return
            self._make_durable()
            if self._program_number - self._marked_program_number > MARK_PAGES:
                # tells the next recovery that these pages need not be read to be believed
                self._program_log(
                    PageKind.DEALLOCATE, deallocation_log.encode(self.page_size, np.empty(0, DEALLOCATION))
                )
                self._marked_program_number = self._program_number - 1

    def _make_durable(self) -> None:
        if self._pending_deallocations:
            records = np.array(self._pending_deallocations, DEALLOCATION)
            self._pending_deallocations.clear()
            try:
                self._program_log(PageKind.DEALLOCATE, deallocation_log.encode(self.page_size, records))
            except BaseException:
                self._pending_deallocations[:0] = records.tolist()
                raise
        if self._durable_program_number < self._program_number - 1:
            last = self._program_number - 1
            self.media.sync()
            self._durable_program_number = last

    def _program_log(self, kind: PageKind, payload: np.ndarray) -> None:
        """Append metadata pages, uint8 [n, page_size], to the log."""
        room = 0
        if self._log_superblocks:
            room = self._per_superblock - int(self._next_index[self._log_superblocks[-1]])
        if room < len(payload):
            self._rotate_log()
        self._append_log(kind, payload)

    def _append_log(self, kind: PageKind, payload: np.ndarray) -> None:
        addresses = dma.page_addresses(payload, self.page_size)
        done = 0
        while done < len(payload):
            superblock = self._log_superblocks[-1]
            index = int(self._next_index[superblock])
            count = min(self._per_superblock - index, len(payload) - done)
            if count == 0:
                self._take_log_superblock()
                continue
            oob = np.zeros(count, PAGE_OOB)
            oob["lba"] = LBA_NONE
            oob["sequence_number"] = self._sequence_number
            pages = superblock * self._per_superblock + np.arange(index, index + count)
            self._program(LOG_STREAM, kind, superblock, pages, addresses[done : done + count], oob)
            self.counters.metadata_pages_written += count
            done += count

    def _take_log_superblock(self) -> None:
        superblock = self._superblocks.take_free(State.LOG)
        if superblock is None:
            raise OutOfFlash(0, len(self._erasing))
        self._next_index[superblock] = 0
        self._log_superblocks.append(superblock)

    def _rotate_log(self) -> None:
        """Start a new log with a snapshot of every unmapped range; the old one is erased once that is safe."""
        old = list(self._log_superblocks)
        self._take_log_superblock()
        number = self._sequence_number
        self._sequence_number += 1
        ranges = self._map.unmapped_ranges()
        records = np.zeros(len(ranges), DEALLOCATION)
        records["lba"], records["num_lbas"], records["sequence_number"] = *ranges.T, number
        self._append_log(PageKind.MAPPING_SNAPSHOT, deallocation_log.encode(self.page_size, records, number))
        self.media.sync()
        self._durable_program_number = self._program_number - 1
        for superblock in old:
            self._log_superblocks.remove(superblock)
            self._superblocks.move(superblock, State.ERASING)
            self._erasing.append((superblock, self._guards.next_epoch()))
        self._finish_erases()

    # reading

    def read(self, lbas: np.ndarray, destinations: np.ndarray) -> None:
        """Read int64 [n] LBAs into uint64 [n] addresses; unmapped ones become zeros.

        Raises CorruptPage, LbaOutOfRange, MediaIoError.
        """
        lbas = self._check_range(lbas)
        with self.read_guard():
            pages = self.resolve(lbas)
            mapped = pages != PAGE_NONE
            if not mapped.all():
                zero_pages(destinations[~mapped], self.page_size)
            self.read_physical(pages[mapped], lbas[mapped], destinations[mapped])
        self.counters.host_pages_read += len(lbas)

    def resolve(self, lbas: np.ndarray) -> np.ndarray:
        """int64 physical pages, PAGE_NONE where unmapped. They hold while a read guard does."""
        lbas = self._check_range(lbas)
        with self._lock:
            self._check_usable()
            return self._map.resolve(lbas)

    def read_guard(self):
        """While held (as a context), nothing that was readable at its start is erased."""
        return self._guards.guard()

    def read_physical(self, pages: np.ndarray, lbas: np.ndarray, destinations: np.ndarray) -> None:
        """Read resolved pages, each checked against its checksum. lbas are for the error only."""
        if len(pages):
            self._read_checked(pages, lbas, destinations)

    def _read_checked(self, pages: np.ndarray, lbas: np.ndarray, destinations: np.ndarray) -> None:
        found = self.media.read(pages, destinations)
        expected = self._payload_crc32c[pages]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            self.counters.corrupt_pages += len(wrong)
            first = wrong[0]
            raise CorruptPage(int(lbas[first]), int(pages[first]), int(expected[first]), int(found[first]))

    def on_erase(self, callback: Callable[[int, int], None]) -> None:
        """Have `callback(first page, number of pages)` called after each erase."""
        self._erase_callbacks.append(callback)

    # facts

    @property
    def mapped_pages(self) -> int:
        return self._map.mapped_pages

    @property
    def free_superblocks(self) -> int:
        return self._superblocks.count(State.FREE)

    def erase_counts(self) -> np.ndarray:
        """int64 [num_superblocks]."""
        return self._superblocks.erase_counts.copy()
