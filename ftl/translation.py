"""The flash translation layer: logical blocks over flash that cannot be overwritten.

Writes append to the open superblock of their stream; the map points at the newest version of each LBA. This
module coordinates; each part has a module of its own: page_writer, metadata_log, collector, checksums, parity,
recovery.

Locking: one lock (state.lock) over the map and everything beside it, released while the media work. Errors
leave the map as it was before the failed part of a batch.
"""

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ftl.check import Finding, check
from ftl.collector import BackgroundCollector, Collector, CollectorOptions
from ftl.direct_io.api import MappedRuns, zero_pages
from ftl.errors import CorruptPage, LbaOutOfRange, MediaClosed, OutOfFlash, ReadOnlyMedia
from ftl.mapping import PAGE_NONE
from ftl.media import FlashMedia
from ftl.metadata_log import MetadataLog
from ftl.page_writer import GC_STREAM, INTERNAL_STREAMS, PageWriter
from ftl.provisioning import num_streams
from ftl.recovery import Recovered, recover
from ftl.repair import repair_page
from ftl.state import FlashState, FtlCounters
from ftl.superblocks import State, Superblocks

__all__ = ["PAGE_NONE", "CollectorOptions", "FlashTranslationLayer", "FtlCounters"]

log = logging.getLogger(__name__)

CHECKPOINT_PAGES = 1 << 15  # 128 MiB at 4 KiB: some 10 ms of scanning
LARGE_READ_PAGES = 256  # takes the media longer than waking a thread


class FlashTranslationLayer:
    """One drive's map, streams and recovery. Made by `format` or `open`; thread-safe."""

    def __init__(
        self, media: FlashMedia, options, background: bool, checkpoint_pages: int, found: Recovered | None
    ):
        self.media = media
        self.geometry = media.geometry
        self.page_size = media.geometry.page_size
        self.uuid = uuid.UUID(bytes=media.uuid)
        self.num_streams = num_streams(media.geometry)
        if media.max_open_superblocks is not None:
            self.num_streams = min(self.num_streams, media.max_open_superblocks - len(INTERNAL_STREAMS))
        self._state = FlashState(media)
        self.num_lbas = self._state.num_lbas
        self.options = options or CollectorOptions()
        self._collector = Collector(self._state, self.options, self._read_checked)
        self._writer = PageWriter(self._state, self.num_streams, self._collector.make_room)
        if found:
            self._take_over(found)
        log_superblocks = self._of_log(found.log_superblocks) if found else []
        checkpoints = self._of_log(found.checkpoint_superblocks) if found else []
        self._log = MetadataLog(self._state, self._writer, log_superblocks, checkpoints, checkpoint_pages)
        self._log.replaced += self._of_log(found.superseded_log) if found else []
        going_on = self._writer.superblocks | self._log.open_superblock
        for superblock in np.flatnonzero(self._state.superblocks.fill).tolist():
            if superblock not in going_on:
                media.closed(superblock)
        self._collector.connect(self._writer, self._log)
        self._runs = None
        if media.plain_file is not None:
            found = self._state.checksums
            columns = found.columns, found.known, found.slots, found.used
            self._runs = MappedRuns(media.plain_file, self._state.mapping.entries, *columns)
        self._background = None
        if background and not media.read_only:
            self._background = BackgroundCollector(self._state, self._collector)
        self._beside = ThreadPoolExecutor(1, "kvfs-checksums") if background else None

    # opening and closing

    @classmethod
    def format(
        cls,
        media: FlashMedia,
        options: CollectorOptions | None = None,
        background: bool = False,
        checkpoint_pages: int = CHECKPOINT_PAGES,
    ) -> "FlashTranslationLayer":
        """A layer over erased flash.

        background: with threads: collect ahead of need, too; checkpoint_pages: see MetadataLog
        """
        return cls(media, options, background, checkpoint_pages, None)

    @classmethod
    def open(
        cls,
        media: FlashMedia,
        options: CollectorOptions | None = None,
        background: bool = False,
        checkpoint_pages: int = CHECKPOINT_PAGES,
        progress: Callable[[int, int], None] | None = None,
    ) -> "FlashTranslationLayer":
        """A layer over flash that was used before: see recovery.py, also for `progress`."""
        found = recover(media, progress)
        ftl = cls(media, options, background, checkpoint_pages, found)
        if not media.read_only and found.next_program_number > 1:
            media.sync()  # what survived a cut must not be lost by the next one
            ftl._protect(found)
            with ftl._state.lock:
                ftl._collector.erase_replaced()
        return ftl

    def _protect(self, found: Recovered) -> None:
        """Write anew what the next fault would take: see Recovered.unprotected_groups."""
        if self.geometry.parity and not self._state.superblocks.keeps_parity:
            return  # there is no protection to be had
        if not len(found.unprotected_groups):
            return
        with self._state.lock:
            try:
                self._collector.move_groups(found.unprotected_groups)
                if found.is_log_unprotected:
                    self._log.renew()
                self._log.make_durable()
            except OutOfFlash as error:
                log.warning("no room to write anew what a power cut left unprotected: %s", error)

    def _of_log(self, superblocks: list[int]) -> list[int]:
        """Oldest first, without those of which no good block is left: nothing can be done with those."""
        found = self._state.superblocks
        left = [superblock for superblock in superblocks if found.states[superblock] == State.LOG]
        return sorted(left, key=lambda superblock: found.newest[superblock])

    def _take_over(self, found: Recovered) -> None:
        """What recovery found out becomes the state."""
        state = self._state
        state.mapping = found.mapping
        state.next_sequence_number = found.next_sequence_number
        state.next_program_number = found.next_program_number
        # program numbers of earlier sessions are durable or verified from here on
        state.durable_program_number = found.next_program_number - 1
        state.session = found.session
        state.earlier_sessions = found.durable_numbers
        state.superblocks.fill[:] = found.fill
        state.superblocks.first[:] = found.first
        state.superblocks.newest[:] = found.newest
        metadata = {*found.log_superblocks, *found.superseded_log, *found.checkpoint_superblocks}
        # what is mapped may lie on bad blocks only, which `fill` leaves out
        for superblock in np.flatnonzero((found.fill > 0) | (state.mapping.valid_pages > 0)).tolist():
            if state.superblocks.states[superblock] == State.BAD:
                if state.mapping.valid_pages[superblock]:
                    state.superblocks.move(superblock, State.FULL)
                    state.superblocks.retiring.add(superblock)
                continue
            is_log = superblock in metadata
            state.superblocks.move(superblock, State.LOG if is_log else State.OPEN)
            if not is_log:
                state.superblocks.move(superblock, State.FULL)
        # a restart, or a crash of many, must not use up superblocks: streams go on with those with most room
        for superblock, stream in found.last_stream.items():
            state.superblocks.stream[superblock] = stream
        begun = [s for s in found.last_stream if state.superblocks.states[s] == State.FULL]
        begun.sort(key=lambda superblock: found.fill[superblock])
        for superblock in begun:
            self._writer.resume(found.last_stream[superblock], superblock)
        for superblock in begun:  # collection may find no other
            if state.superblocks.states[superblock] == State.FULL:
                self._writer.resume(GC_STREAM, superblock)

    def close(self) -> None:
        """Flush and end; every later call raises MediaClosed."""
        if self._background is not None:
            self._background.close()
            self._background = None
        with self._state.lock:
            if self._state.closed:
                return
            try:
                if self._state.has_changed and not self.media.read_only:
                    self._flush()
                    self._leave_mark()
            finally:
                self._state.closed = True
        if self._beside is not None:
            self._beside.shutdown()

    def _leave_mark(self) -> None:
        try:
            self._log.mark(after_pages=1)
            self._log.sync()
            self._collector.erase_replaced()
        except OutOfFlash as error:
            log.info("closed without a mark: %s", error)

    def _check_usable(self, change: str | None = None) -> None:
        if self._state.closed:
            raise MediaClosed
        if change and self.media.read_only:
            raise ReadOnlyMedia(change)

    def _check_range(self, lbas: np.ndarray) -> np.ndarray:
        lbas = np.ascontiguousarray(lbas, np.int64)
        if not self._state.mapping.holds(lbas):
            low, high = int(lbas.min()), int(lbas.max())
            raise LbaOutOfRange(low if low < 0 else high, self.num_lbas)
        return lbas

    # writing

    def write(self, lbas: np.ndarray, sources: np.ndarray, stream: int = 0) -> None:
        """Write pages: int64 [n] LBAs from uint64 [n] addresses. Of an LBA named twice the last counts.

        stream: any number from 0; data of one stream are expected to die together.
        Raises LbaOutOfRange, OutOfFlash, MediaIoError, ReadOnlyMedia; LBAs not written keep their content.
        """
        lbas = self._check_range(lbas)
        with self._state.lock:
            self._check_usable("write")
            if stream in INTERNAL_STREAMS:
                stream += 1 << 16  # the caller's numbers never meet the layer's own
            for part, pages in self._writer.append(stream, lbas, sources):
                self._state.mapping.assign(lbas[part], pages)
                self._state.counters.host_pages_written += len(pages)

    def deallocate(self, ranges: np.ndarray) -> None:
        """Give back ranges: int64 [m, 2] of (first LBA, number of LBAs). They read as zeros at once, and
        after a power cut once flushed. Raises LbaOutOfRange with nothing done."""
        ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
        for first, count in ranges.tolist():
            if first < 0 or count < 0 or first + count > self.num_lbas:
                raise LbaOutOfRange(max(first + count - 1, first), self.num_lbas)
        state = self._state
        with state.lock:
            self._check_usable("deallocate")
            # writes that came before this and are not in the map yet must not undo it
            self._writer.wait_for_commits(state.next_sequence_number)
            for first, count in ranges.tolist():
                if state.mapping.unmap(first, count):
                    self._log.deallocated(first, count, state.new_sequence_numbers(1))
            state.pressure.notify()

    def flush(self) -> None:
        """Every write and deallocation so far survives a power cut when this returns."""
        with self._state.lock:
            self._check_usable()
            if not self.media.read_only:
                self._flush()

    def _flush(self) -> None:
        self._log.make_durable()
        while self.geometry.parity and self._collector.is_retiring:
            self._collector.finish_retiring()  # a row that a failure cut short has no parity
            self._log.make_durable()
        self._log.mark()
        self._log.checkpoint_if_due()
        self._collector.erase_replaced()

    def collect(self, max_superblocks: int | None = None) -> int:
        """Collect now, up to a number of superblocks or as long as something is gained; how many were."""
        done = 0
        with self._state.lock:
            self._check_usable("collect")
            while max_superblocks is None or done < max_superblocks:
                if not self._collector.gains() or not self._collector.step():
                    break
                done += 1
        return done

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
        self._state.counters.host_pages_read += len(lbas)

    def read_run(self, first_lba: int, data: np.ndarray) -> bool:
        """Read whole pages into DMA memory if they are one run of flash and right; False: `read` is to do it.

        The short way for a few pages: no lock, no guard, no repair, and no error.
        """
        num_pages = data.nbytes // self.page_size
        run = self._runs.find(first_lba, num_pages) if self._runs and not self._state.closed else None
        if run is None or not self._runs.read(run, data):
            return False
        self.count_reads(num_pages)
        return True

    @property
    def page_map(self) -> int | None:
        """Address of a dio_map (direct_io/records.h), by which native code reads as `read_run` does, as long as
        this layer is open; None where pages do not lie in a plain file.
        """
        return self._runs.address if self._runs else None

    def count_reads(self, num_pages: int) -> None:
        """So many pages were read by the short way."""
        self.media.counters.add(pages_read=num_pages)
        self._state.counters.host_pages_read += num_pages

    def resolve(self, lbas: np.ndarray) -> np.ndarray:
        """int64 physical pages, PAGE_NONE where unmapped. They hold while a read guard does."""
        lbas = self._check_range(lbas)
        with self._state.lock:
            self._check_usable()
            return self._state.mapping.resolve(lbas)

    def read_guard(self):
        """While held (as a context), nothing that was readable at its start is erased."""
        return self._state.guards.guard()

    def begin_read(self, take: Callable[[np.ndarray], bool]) -> int | None:
        """A read guard, for `end_read`, if `take` says so of the map's entries (see Mapping), which stand still
        meanwhile. For who resolves and pins in one go."""
        with self._state.lock:
            self._check_usable()
            return self._state.guards.begin() if take(self._state.mapping.entries) else None

    def end_read(self, guard: int) -> None:
        self._state.guards.end(guard)

    def read_physical(self, pages: np.ndarray, lbas: np.ndarray, destinations: np.ndarray) -> None:
        """Read resolved pages, each checked against its checksum. lbas are for the error only."""
        if len(pages):
            self._read_checked(pages, lbas, destinations)

    def _read_checked(self, pages: np.ndarray, lbas: np.ndarray, destinations: np.ndarray) -> None:
        beside, checksums = self._beside, self._state.checksums
        if beside is not None and len(pages) >= LARGE_READ_PAGES and checksums.lacks(pages):
            beside.submit(checksums.load, pages)  # what fails there fails again below
        found = self.media.read(pages, destinations)
        expected, known = checksums.expected(pages, lbas)
        for wrong in np.flatnonzero((found != expected) | ~known).tolist():
            self._state.counters.corrupt_pages += 1
            page, lba = int(pages[wrong]), int(lbas[wrong])
            with self._state.lock:
                unwritten = self._state.unwritten_parity(page // self.geometry.pages_per_superblock)
            if not repair_page(self.media, page, lba, int(destinations[wrong]), unwritten):
                raise CorruptPage(lba, page, int(expected[wrong]), int(found[wrong]))
            self._state.counters.repaired_pages += 1
            self._state.superblocks.damaged.add(page // self.geometry.pages_per_superblock)
            log.warning("LBA %d at physical page %d was corrupt; parity gave it back", lba, page)

    def renew(self, superblocks: set[int] | None = None) -> int:
        """Move what these hold elsewhere, as long as there is room; how many were moved.

        None: those with a page that, since the drive was opened, only parity could give back.
        """
        with self._state.lock:
            self._check_usable("renew")
            found = self._state.superblocks
            self._writer.close(superblocks or found.damaged)
            wanted = {s for s in superblocks or found.damaged if found.states[s] == State.FULL}
            found.retiring |= wanted
            try:
                self._collector.finish_retiring()
            except OutOfFlash as error:
                log.error("no room to write damaged data anew: %s", error)
            waiting = {s for s in found.retiring if found.states[s] == State.FULL}
            return len(wanted - waiting - set(found.of(State.QUARANTINED).tolist()))

    def check(self) -> list[Finding]:
        """What does not hold of the invariants between map, OOB and superblocks: see check.py."""
        self.flush()
        return check(self._state)

    def on_erase(self, callback: Callable[[int, int], None]) -> None:
        """Have `callback(first page, number of pages)` called before each erase."""
        self._collector.on_erase(callback)

    # facts

    @property
    def counters(self) -> FtlCounters:
        return self._state.counters

    @property
    def mapped_pages(self) -> int:
        return self._state.mapping.mapped_pages

    @property
    def free_superblocks(self) -> int:
        return self._state.superblocks.count(State.FREE)

    @property
    def superblocks(self) -> Superblocks:
        """For looking at."""
        return self._state.superblocks

    @property
    def lifetime_pages_programmed(self) -> int:
        """Since the drive was made."""
        return self._state.next_program_number - 1

    @property
    def lifetime_versions(self) -> int:
        """Given since the drive was made: one for each page that the host wrote and each deallocation."""
        return self._state.next_sequence_number - 1

    def superblock_states(self) -> np.ndarray:
        """uint8 [num_superblocks], State."""
        return self._state.superblocks.states.copy()

    def valid_pages(self) -> np.ndarray:
        """int64 [num_superblocks]: mapped pages in each."""
        return self._state.mapping.valid_pages.copy()

    def erase_counts(self) -> np.ndarray:
        """int64 [num_superblocks]."""
        return self._state.superblocks.erase_counts.copy()
