"""Appending pages to streams: the only place that programs data.

A stream writes into a superblock of its own. There are as many open superblocks as the drive has streams; where
a new stream finds none left, it goes on with the one that was written longest ago, whose stream has most likely
ended. So placement identifiers may be any numbers, and wrong ones cost performance only.

One batch at a time is programmed per stream, several streams at once, with the lock released. Batches of the
host become visible in the order of their versions: the map never shows what recovery would not choose.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numba import njit

from ftl.errors import OutOfFlash, ProgramFailed
from ftl.layout import LBA_NONE, OOB_MAGIC, PAGE_OOB, PageKind
from ftl.open_superblock import OpenSuperblock
from ftl.parity import ParityPages
from ftl.state import FlashState
from ftl.superblocks import State

log = logging.getLogger(__name__)

# Streams of the layer itself. They take no part in the sharing of open superblocks.
CHECKPOINT_STREAM = 0xFD
GC_STREAM = 0xFE
LOG_STREAM = 0xFF
INTERNAL_STREAMS = (CHECKPOINT_STREAM, GC_STREAM, LOG_STREAM)
LOG_RESERVE = 1  # superblocks that collection leaves: without a log nothing that it empties can be erased
DEAD_DIE_FAILURES = 3  # in a row, in as many superblocks
PROGRAM_ATTEMPTS = 8  # a batch that fails in so many superblocks means that the flash is at its end


class PageWriter:
    """All methods are called with the lock held. make_room: called before the caller's streams take a free
    superblock."""

    def __init__(self, state: FlashState, num_streams: int, make_room: Callable[[], None]):
        self._state = state
        self._num_streams = num_streams
        self._make_room = make_room
        self._open: dict[int, OpenSuperblock] = {}  # by stream
        self._uses = 0
        self._failing_dies: Counter[int] = Counter()  # how often in a row programs have failed on them
        self._programming: set[int] = set()  # first program number of each batch under way
        self._is_held = False  # nothing new of the host's begins: see quiesced
        self._uncommitted: set[int] = set()  # first version of each of the host's batches not in the map yet

    # what is open

    def resume(self, stream: int, superblock: int) -> None:
        """Go on with a superblock that recovery found part-filled, unless the stream has one already."""
        state = self._state
        if stream in self._open or (stream not in INTERNAL_STREAMS and self._num_open() >= self._num_streams):
            return
        found = self._open_superblock(superblock, stream)
        if found.num_left:
            state.superblocks.states[superblock] = State.OPEN
            self._open[stream] = found

    def _open_superblock(self, superblock: int, stream: int) -> OpenSuperblock:
        superblocks = self._state.superblocks
        bad, fill = superblocks.bad_planes[superblock], int(superblocks.fill[superblock])
        keeps_parity = superblocks.keeps_parity
        found = OpenSuperblock(superblock, self._state.geometry, bad, fill, keeps_parity, stream)
        if found.parity is not None:
            self._state.begun[superblock] = found
        return found

    @property
    def superblocks(self) -> set[int]:
        """Those that are open."""
        return {found.superblock for found in self._open.values()}

    def _num_open(self) -> int:
        return sum(stream not in INTERNAL_STREAMS for stream in self._open)

    def _close(self, superblock: int) -> None:
        for stream, found in list(self._open.items()):
            if found.superblock == superblock:
                del self._open[stream]
                self._state.superblocks.move(superblock, State.FULL)
                self._state.media.closed(superblock)
                if found.parity is not None and not found.parity.is_begun:
                    del self._state.begun[superblock]

    def close(self, superblocks: set[int]) -> None:
        """Write no more into those that are open, so that they can be collected."""
        for found in [found for found in self._open.values() if found.superblock in superblocks]:
            while found.is_busy:
                self._state.changed.wait()
            self.complete_row(found)
            self._close(found.superblock)

    def _acquire(self, stream: int) -> OpenSuperblock:
        """The stream's open superblock, with room, marked busy. Waits for the batch before this one."""
        state = self._state
        while True:
            found = self._open.get(stream)
            if found is None:
                found = self._take_over(stream) or self._open_new(stream)
            if found is not None and self._open.get(stream) is found and not found.is_busy:
                break
            if found is not None and self._open.get(stream) is found:
                state.changed.wait()
        self._uses += 1
        found.last_used = self._uses
        found.is_busy = True
        return found

    def _take_over(self, stream: int) -> OpenSuperblock | None:
        """With all streams open: the superblock of the one that was used longest ago."""
        if stream in INTERNAL_STREAMS or self._num_open() < self._num_streams:
            return None
        idle = [
            (found.last_used, other)
            for other, found in self._open.items()
            if other not in INTERNAL_STREAMS and not found.is_busy
        ]
        if not idle:
            self._state.changed.wait()
            return None
        found = self._open[stream] = self._open.pop(min(idle)[1])
        found.stream = stream
        self._state.superblocks.stream[found.superblock] = stream
        return found

    def _open_new(self, stream: int) -> OpenSuperblock | None:
        """A free superblock for the stream; None if the stream, or all streams, got one meanwhile."""
        state = self._state
        if stream not in INTERNAL_STREAMS:
            self._make_room()  # may release the lock
            if stream in self._open or self._num_open() >= self._num_streams:
                return self._open.get(stream)
        # what is copied has lived long and will stay: it goes where wear has to slow down
        if stream == GC_STREAM and state.superblocks.count(State.FREE) <= LOG_RESERVE:
            raise OutOfFlash(state.superblocks.count(State.FREE), 0)
        superblock = self.take_free(State.OPEN, most_worn=stream == GC_STREAM)
        if superblock is None:
            raise OutOfFlash(0, state.superblocks.count(State.ERASING))
        state.superblocks.stream[superblock] = stream
        self._open[stream] = self._open_superblock(superblock, stream)
        return self._open[stream]

    def take_free(self, becomes: State, most_worn: bool = False) -> int | None:
        """A free superblock, about to be written; None when there is none. See Superblocks.take_free.

        Before anything is written its erase is durable, or a power cut could leave what it held beside that.
        Collection syncs before every erase, so there is hardly ever one to wait for.
        """
        state = self._state
        superblock = state.superblocks.take_free(becomes, most_worn)
        if superblock is None and state.superblocks.unsynced.any():
            state.media.sync()
            state.superblocks.unsynced[:] = False
            superblock = state.superblocks.take_free(becomes, most_worn)
        if superblock is not None:
            state.checksums.begin(superblock)
            state.pressure.notify()
        return superblock

    # writing

    def append(self, stream: int, lbas, sources, sequence_numbers=None) -> Iterator[tuple[slice, np.ndarray]]:
        """Program pages; yields (part of the batch, int64 pages) after each program, for the caller to map.

        lbas: int64 [n]; sources: uint64 [n] addresses; sequence_numbers: versions of copies; the host's data
        get new ones here. Raises OutOfFlash, MediaIoError, ReadOnlyMedia: what was not yielded is not written.
        """
        done = failures = 0
        while done < len(lbas):
            found = self._acquire(stream)
            version = None
            try:
                pages = found.take(len(lbas) - done)
                part = slice(done, done + len(pages))
                while self._is_held:
                    self._state.changed.wait()
                if sequence_numbers is None:
                    version = self._state.new_sequence_numbers(len(pages))
                    self._uncommitted.add(version)
                    versions = np.arange(version, version + len(pages), dtype=np.uint64)
                else:
                    versions = sequence_numbers[part]
                oob = data_oob(stream, lbas[part], versions)
                try:
                    self.program_with_parity(found, pages, sources[part], oob)
                except ProgramFailed as failure:
                    failures += 1
                    self.retire(failure, found)
                    if failures == PROGRAM_ATTEMPTS:
                        raise
                    continue
                except BaseException:
                    # how far it came is unknown: nothing is programmed there again before an erase
                    if found.parity is not None:
                        found.parity.undo()
                    self._close(found.superblock)
                    raise
                while version is not None and min(self._uncommitted) < version:
                    self._state.changed.wait()
                yield part, pages
                done += len(pages)
            finally:
                if not found.num_left:
                    # Only now that its last pages are in the map: to collection, a full one looks empty before.
                    self._close(found.superblock)
                found.is_busy = False
                self._uncommitted.discard(version)
                self._state.changed.notify_all()

    def program_with_parity(self, found: OpenSuperblock, pages, sources, oob) -> None:
        """Program pages, and the parity of rows that they complete, in one batch."""
        self.number(oob)
        if found.parity is not None:
            first = found.superblock * self._state.pages_per_superblock
            parity = found.parity.add(pages - first, sources, oob)
            if parity is not None:
                self._prepare_parity(parity)
                # in the order of pages: a block takes its parity page before those of later rows
                pages = np.concatenate([pages, first + parity.pages])
                order = np.argsort(pages)
                pages, sources = pages[order], np.concatenate([sources, parity.addresses])[order]
                oob = np.concatenate([oob, parity.oob])[order]
        else:
            found.chain.link(oob)
        self.program(found, pages, sources, oob)
        found.has_data = True

    def _prepare_parity(self, parity: ParityPages) -> None:
        parity.oob["kind"] = PageKind.PARITY
        self.number(parity.oob)
        self._state.counters.parity_pages_written += len(parity.pages)

    def complete_rows(self) -> None:
        """Give rows that are begun their parity, so that what was written so far survives the loss of a die."""
        for found in list(self._open.values()):
            while found.is_busy:
                self._state.changed.wait()
            self.complete_row(found)

    def complete_row(self, found: OpenSuperblock) -> None:
        parity = found.parity.end_row() if found.parity is not None else None
        if parity is None:
            return
        found.is_busy = True
        self._state.counters.padding_pages += found.skip_row()
        try:
            self._prepare_parity(parity)
            pages = found.superblock * self._state.pages_per_superblock + parity.pages
            self.program(found, pages, parity.addresses, parity.oob)
            if not found.num_left:
                self._close(found.superblock)
        except ProgramFailed as failure:
            self.retire(failure, found)
        finally:
            found.is_busy = False
            self._state.changed.notify_all()

    def number(self, oob: np.ndarray) -> None:
        """Give records the next program numbers, and what holds of any page programmed now."""
        state = self._state
        _number(oob, state.next_program_number, state.session, state.durable_program_number)
        state.next_program_number += len(oob)

    def program(self, found: OpenSuperblock, pages, sources, oob) -> None:
        """Program pages of one superblock, ascending, with the lock released. Their records have just got the
        newest program numbers, in any order. Raises what the media raises."""
        state, superblock = self._state, found.superblock
        last = state.next_program_number - 1
        first = last - len(oob) + 1
        state.has_changed = True
        self._programming.add(first)
        superblocks = state.superblocks
        if superblocks.first[superblock] == 0:
            superblocks.first[superblock] = first
        fill = int(pages[-1]) + 1 - superblock * state.pages_per_superblock
        # a row's parity may lie before its last data
        superblocks.fill[superblock] = max(fill, superblocks.fill[superblock])
        superblocks.newest[superblock] = last
        try:
            with state.unlocked():
                state.media.program(pages, sources, oob, found.stream)
        finally:
            self._programming.discard(first)
            state.changed.notify_all()
        if self._failing_dies:
            for die in self._dies(pages):
                del self._failing_dies[die]
        state.checksums.set(pages, oob)

    def _dies(self, planes: np.ndarray) -> list[int]:
        """Of planes, or of pages."""
        return np.unique(planes % self._state.geometry.num_dies).tolist()

    def _note_failures(self, planes: np.ndarray) -> None:
        """Give up a die that fails again and again: trying it everywhere would use up flash and time."""
        state = self._state
        if state.geometry.num_dies == 1:
            return  # there is no other
        for die in self._dies(planes):
            self._failing_dies[die] += 1
            if self._failing_dies[die] < DEAD_DIE_FAILURES:
                continue
            log.error("die %d fails whatever is programmed: it is used no more", die)
            planes = np.arange(die, state.geometry.num_planes, state.geometry.num_dies)
            for superblock in state.superblocks.die_failed(die):
                state.media.mark_bad(superblock, planes)

    def retire(self, failure: ProgramFailed, found: OpenSuperblock) -> None:
        """Erase blocks could not be programmed: they are bad from now on.

        What their superblock holds is moved. If it holds nothing yet, writing goes on in it without them.
        """
        state = self._state
        log.warning("%s", failure)
        state.counters.program_failures += len(failure.planes)
        state.media.mark_bad(failure.superblock, failure.planes)
        state.superblocks.planes_failed(failure.superblock, failure.planes)
        self._note_failures(failure.planes)
        if found.parity is not None:
            found.parity.undo()
        if found.has_data:
            found.abandon()
            state.superblocks.retiring.add(failure.superblock)
            self._close(failure.superblock)
            state.pressure.notify()
            return
        found.restart(state.superblocks.bad_planes[failure.superblock])
        if not found.num_left:
            self._close(failure.superblock)

    def last_finished(self) -> int:
        """The program number up to which every program has ended."""
        return min(self._programming, default=self._state.next_program_number) - 1

    def wait_for_commits(self, version: int) -> None:
        """Until all of the host's batches with versions before this one are in the map."""
        while min(self._uncommitted, default=version) < version:
            self._state.changed.wait()

    @contextmanager
    def quiesced(self):
        """No batch is under way inside: each is wholly in the map or has no version yet."""
        self._is_held = True
        try:
            while self._uncommitted or self._programming:
                self._state.changed.wait()
            yield
        finally:
            self._is_held = False
            self._state.changed.notify_all()


@njit(nogil=True, cache=True)
def _number(records, first_program_number, session, durable_program_number):
    for index in range(len(records)):
        record = records[index]
        record.magic = OOB_MAGIC
        record.program_number = first_program_number + index
        record.session = session
        record.durable_program_number = durable_program_number


def data_oob(stream: int, lbas: np.ndarray, sequence_numbers: np.ndarray) -> np.ndarray:
    """PAGE_OOB [n] for data pages: int64 [n] LBAs in uint64 [n] versions."""
    oob = np.zeros(len(lbas), PAGE_OOB)
    oob["kind"] = PageKind.DATA
    oob["stream"] = stream if stream in INTERNAL_STREAMS else stream % CHECKPOINT_STREAM
    oob["lba"] = lbas
    oob["sequence_number"] = sequence_numbers
    return oob


def log_oob(count: int, kind: PageKind, sequence_number: int) -> np.ndarray:
    """PAGE_OOB [count] for metadata pages."""
    oob = np.zeros(count, PAGE_OOB)
    oob["kind"] = kind
    oob["stream"] = CHECKPOINT_STREAM if kind == PageKind.CHECKPOINT else LOG_STREAM
    oob["lba"] = LBA_NONE
    oob["sequence_number"] = sequence_number
    return oob
