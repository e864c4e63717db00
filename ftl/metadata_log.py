"""The log of what data pages cannot tell, and what makes writes durable.

Deallocations are appended to log superblocks. When one is full, a snapshot of every unmapped range starts the
next, and the old ones are erased: the log never outgrows a superblock or two. A checkpoint (checkpoint.py) lies
in log superblocks of its own and is replaced as a whole.
"""

import numpy as np

from ftl import checkpoint, deallocation_log
from ftl.checkpoint import Checkpoint
from ftl.errors import OutOfFlash, ProgramFailed
from ftl.layout import CHECKPOINT_SUPERBLOCK, DEALLOCATION, SESSION, PageKind
from ftl.open_superblock import OpenSuperblock
from ftl.page_writer import CHECKPOINT_STREAM, LOG_STREAM, PageWriter, log_oob
from ftl.provisioning import GC_RESERVE
from ftl.state import FlashState
from ftl.superblocks import State
from spdk_glue import dma

CHECKPOINT_SHARE = 256  # pages are programmed for each page of a checkpoint, at least
MARK_PAGES = 256  # programs since the last durable mark after which a flush leaves a new one


class LogSuperblocks:
    """Metadata pages of one purpose, in order, over as many superblocks as they need."""

    def __init__(self, state: FlashState, writer: PageWriter, superblocks: list[int], stream: int):
        self._state = state
        self._writer = writer
        self._stream = stream
        self.superblocks = superblocks  # oldest first; the last is being written
        self._open: OpenSuperblock | None = None
        if superblocks:
            self._open = self._opened(superblocks[-1])

    def _opened(self, superblock: int) -> OpenSuperblock:
        found = self._state.superblocks
        bad, fill = found.bad_planes[superblock], int(found.fill[superblock])
        return OpenSuperblock(superblock, self._state.geometry, bad, fill, found.keeps_parity, self._stream)

    @property
    def num_left(self) -> int:
        return self._open.num_left if self._open else 0

    def begin_superblock(self) -> None:
        state = self._state
        superblock = self._writer.take_free(State.LOG)
        if superblock is None:
            raise OutOfFlash(0, state.superblocks.count(State.ERASING))
        self.close()
        self._open = self._opened(superblock)
        self.superblocks.append(superblock)

    def close(self) -> None:
        """Nothing more is written into the last one."""
        if self._open is not None:
            self._state.media.closed(self._open.superblock)
            self._open = None

    def append(self, kind: PageKind, payload: np.ndarray, sequence_number: int) -> None:
        """Program uint8 [n, page_size]. The lock is held, but released while programming."""
        addresses = dma.page_addresses(payload, self._state.page_size)
        done = 0
        while done < len(payload):
            if not self.num_left:
                self.begin_superblock()
            found = self._open
            pages = found.take(len(payload) - done)
            oob = log_oob(len(pages), kind, sequence_number)
            try:
                self._writer.program_with_parity(found, pages, addresses[done : done + len(pages)], oob)
            except ProgramFailed as failure:
                self._writer.retire(failure, found)  # its pages stay readable until the log is replaced
                continue
            self._state.counters.metadata_pages_written += len(pages)
            done += len(pages)

    def complete_row(self) -> None:
        if self.num_left:  # none are left behind a failure, nor is a row begun behind the last page
            self._writer.complete_row(self._open)

    @property
    def is_cut_short(self) -> bool:
        """Whether the last row has no parity, and never will, because a block failed."""
        return bool(self.superblocks) and self.superblocks[-1] in self._state.superblocks.retiring


class MetadataLog:
    """Deallocations, durability, checkpoints. Methods are called with the lock held; one thread writes."""

    def __init__(
        self,
        state: FlashState,
        writer: PageWriter,
        log_superblocks: list[int],
        checkpoint_superblocks: list[int],
        checkpoint_pages: int,
    ):
        """checkpoint_pages: programmed between two checkpoints, at least."""
        self._state = state
        self._writer = writer
        self._log = LogSuperblocks(state, writer, log_superblocks, LOG_STREAM)
        self._checkpoint_superblocks = checkpoint_superblocks
        self._checkpoint_pages = checkpoint_pages
        self._checkpoint_due = state.next_program_number + checkpoint_pages
        self._pending: list[tuple[int, int, int]] = []
        self._marked_program_number = self._synced_program_number = state.durable_program_number
        self._is_busy = False
        self.replaced: list[int] = []  # superblocks that hold nothing needed, to be erased

    @property
    def open_superblock(self) -> set[int]:
        """The one that the log goes on in, if there is one."""
        return set(self._log.superblocks[-1:])

    def deallocated(self, first_lba: int, num_lbas: int, sequence_number: int) -> None:
        """A range that was unmapped: durable after the next make_durable."""
        self._pending.append((first_lba, num_lbas, sequence_number))
        self._state.has_changed = True

    def make_durable(self) -> None:
        """All that was written and deallocated before this call survives a power cut after it."""
        self._claim()
        try:
            self._append_pending()
            if self._state.geometry.parity:
                self._writer.complete_rows()
                self._log.complete_row()
            self.sync()
            if self._state.geometry.parity and self._log.is_cut_short:
                self._rotate()
        finally:
            self._release()

    def _append_pending(self) -> None:
        if not self._pending:
            return
        records = np.array(self._pending, DEALLOCATION)
        self._pending.clear()
        try:
            self._append(PageKind.DEALLOCATE, deallocation_log.encode(self._state.page_size, records))
        except BaseException:
            self._pending[:0] = records.tolist()
            raise

    def renew(self) -> None:
        """Supersede what the log says by a snapshot."""
        self._claim()
        try:
            if self._log.num_left < self._state.superblocks.row_pages:
                self._rotate()
            else:  # a series of power cuts must not take a superblock each
                self._append_snapshot()
        finally:
            self._release()

    def mark(self, after_pages: int = MARK_PAGES) -> None:
        """After so many programs, leave a page that tells the next recovery which of them need not be read.

        Nor may be doubted: what was durable and does not match its checksum is damage, no write that was cut.
        """
        state = self._state
        if state.next_program_number - self._marked_program_number <= after_pages:
            return
        self._claim()
        try:
            no_records = np.empty(0, DEALLOCATION)
            self._append(PageKind.DEALLOCATE, deallocation_log.encode(state.page_size, no_records))
            self._marked_program_number = state.next_program_number - 1
        finally:
            self._release()

    # checkpoints

    def checkpoint_if_due(self) -> None:
        """Take a checkpoint after many programs, if there is room for one."""
        if self._state.next_program_number >= self._checkpoint_due:
            self.checkpoint()

    def checkpoint(self) -> None:
        state = self._state
        self._claim()
        try:
            with self._writer.quiesced():
                taken = Checkpoint(
                    state.mapping.copy_entries(),
                    self._superblock_table(),
                    state.next_sequence_number,
                    state.next_program_number - 1,
                    state.session,
                )
            self._append_pending()  # the map knows these, and must not be the only one
            if state.geometry.parity:  # recovery takes what the checkpoint knows for protected
                self._writer.complete_rows()
                self._log.complete_row()
            self.sync()
            with state.unlocked():
                pages = checkpoint.encode(taken, state.page_size)
            self._checkpoint_due = state.next_program_number + max(
                self._checkpoint_pages, CHECKPOINT_SHARE * len(pages)
            )
            needed = -(-len(pages) // state.pages_per_superblock) + 1
            if state.superblocks.count(State.FREE) <= GC_RESERVE + needed:
                return
            taken_by = LogSuperblocks(state, self._writer, [], CHECKPOINT_STREAM)
            try:
                taken_by.append(PageKind.CHECKPOINT, pages, taken.sequence_number)
                if state.geometry.parity:
                    taken_by.complete_row()
                self.sync()
            except BaseException:
                self.replaced.extend(taken_by.superblocks)
                raise
            finally:
                taken_by.close()
            self.replaced.extend(self._checkpoint_superblocks)
            self._checkpoint_superblocks = taken_by.superblocks
        finally:
            self._release()

    def _superblock_table(self) -> np.ndarray:
        superblocks = self._state.superblocks
        table = np.zeros(len(superblocks.states), CHECKPOINT_SUPERBLOCK)
        holds = np.isin(superblocks.states, (State.OPEN, State.FULL, State.LOG, State.QUARANTINED))
        holds[self._checkpoint_superblocks] = False
        table["fill"] = np.where(holds, superblocks.fill, 0)
        table["first_program_number"] = np.where(holds, superblocks.first, 0)
        table["newest_program_number"] = np.where(holds, superblocks.newest, 0)
        table["is_closed"] = np.isin(superblocks.states, (State.FULL, State.LOG, State.QUARANTINED))
        table["is_closed"][self._log.superblocks[-1:]] = 0
        return table

    def give_up_checkpoint(self) -> bool:
        """Have its superblocks erased, when room is short; whether there were any. Nothing depends on it."""
        self.replaced.extend(self._checkpoint_superblocks)
        gained = bool(self._checkpoint_superblocks)
        self._checkpoint_superblocks = []
        return gained

    def sync(self) -> None:
        """Everything that was programmed when this is called is on stable media when it returns.

        Rows under way are not called durable before they have their parity: recovery counts on that.
        """
        state = self._state
        finished = self._writer.last_finished()
        # programs that began later than one under way may have ended
        if self._synced_program_number < state.next_program_number - 1:
            durable = min(finished, state.first_begun_number() - 1)
            erased = state.superblocks.unsynced.copy()
            with state.unlocked():
                state.media.sync()
            state.superblocks.unsynced[erased] = False
            self._synced_program_number = max(finished, self._synced_program_number)
            state.durable_program_number = max(durable, state.durable_program_number)

    def _claim(self) -> None:
        while self._is_busy:
            self._state.changed.wait()
        self._is_busy = True

    def _release(self) -> None:
        self._is_busy = False
        self._state.changed.notify_all()

    def _append(self, kind: PageKind, payload: np.ndarray) -> None:
        if self._log.num_left < len(payload):
            self._rotate()
        self._log.append(kind, payload, self._state.next_sequence_number)

    def _rotate(self) -> None:
        """Start a new log with a snapshot; what it replaces may be erased then."""
        old = list(self._log.superblocks)
        self._log.begin_superblock()
        self._append_snapshot()
        for superblock in old:
            self._log.superblocks.remove(superblock)
            self.replaced.append(superblock)

    def _append_snapshot(self) -> None:
        """Of every unmapped range; at its end as durable as what it replaces."""
        state = self._state
        with self._writer.quiesced():  # what is on its way would look unmapped
            number = state.new_sequence_numbers(1)
            ranges = state.mapping.unmapped_ranges()
        # What the snapshot leaves out is mapped, by writes that must not be lost once it supersedes the log: a
        # version that was deallocated before them would come back.
        self.sync()
        records = np.zeros(len(ranges), DEALLOCATION)
        records["lba"], records["num_lbas"], records["sequence_number"] = *ranges.T, number
        pages = deallocation_log.encode(state.page_size, records, number)
        self._log.append(PageKind.MAPPING_SNAPSHOT, pages, number)
        if state.earlier_sessions:  # their marks go with the log that this replaces
            sessions = np.zeros(len(state.earlier_sessions), SESSION)
            sessions["session"] = list(state.earlier_sessions)
            sessions["durable_program_number"] = list(state.earlier_sessions.values())
            pages = deallocation_log.encode(state.page_size, sessions.view(DEALLOCATION))
            self._log.append(PageKind.SESSIONS, pages, number)
        if state.geometry.parity:
            self._log.complete_row()
        self.sync()
