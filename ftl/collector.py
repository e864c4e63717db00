"""Collection: emptying superblocks and erasing them, in the background or when a write finds no room.

A victim's valid pages are copied a few at a time with the lock released. A copy counts only if its LBA still
points at the original; whatever the host wrote or deallocated meanwhile wins.

Before a superblock is erased, what replaced its content is made durable: copies and newer versions (media sync)
and deallocations (log); and readers that may have resolved its pages have gone. So no instant exists at which a
power cut could bring back a version older than the newest durable one.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ftl import oob
from ftl.errors import CorruptPage, EraseFailed, FlashError, OutOfFlash
from ftl.garbage_collection import choose_victim, make_policy
from ftl.layout import PageKind
from ftl.metadata_log import MetadataLog
from ftl.page_writer import GC_STREAM, PageWriter
from ftl.provisioning import GC_RESERVE
from ftl.state import FlashState
from ftl.superblocks import State
from spdk_glue import dma

log = logging.getLogger(__name__)

LITTLE_GAIN = 1 / 8  # of a superblock
COPY_PAGES = 64  # copied at once: what a reader or writer of the same flash may have to wait for


@dataclass(frozen=True)
class CollectorOptions:
    """policy: see garbage_collection.POLICIES.

    background_free: superblocks that the background thread keeps free beyond the reserve: more of them is more
        wear, since a superblock empties further while it waits
    rated_cycles: erases that a block is made for; wear_spread: how far apart erase counts may get, as a share
    of them, before what lies cold on little-worn superblocks is moved
    read_disturb_limit: reads of a superblock after which its data are written anew; 0 for no limit
    """

    policy: str = "greedy"
    background_free: int = 3
    rated_cycles: int = 3000
    wear_spread: float = 0.05
    read_disturb_limit: int = 0

    def __post_init__(self):
        make_policy(self.policy)  # raises ValueError


class Collector:
    """Methods are called with the lock held. read_checked(pages, lbas, addresses) reads and verifies, or
    repairs.
    """

    def __init__(
        self,
        state: FlashState,
        options: CollectorOptions,
        read_checked: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
    ):
        self._state = state
        self._options = options
        self._read_checked = read_checked
        self._policy = make_policy(options.policy)
        self._writer: PageWriter = None  # set by connect: writing needs collection, collection writes
        self._log: MetadataLog = None
        self._is_busy = False
        self._emptied: list[int] = []  # hold nothing valid; erased once that is durable
        self._erasing: list[tuple[int, int]] = []  # superblock, epoch whose readers it waits for
        self._erase_callbacks: list[Callable[[int, int], None]] = []

    def connect(self, writer: PageWriter, metadata_log: MetadataLog) -> None:
        self._writer, self._log = writer, metadata_log

    def on_erase(self, callback: Callable[[int, int], None]) -> None:
        self._erase_callbacks.append(callback)

    # when

    def make_room(self) -> None:
        """Have more than GC_RESERVE superblocks free. Raises OutOfFlash."""
        superblocks = self._state.superblocks
        num_resorts = 0
        while superblocks.count(State.FREE) <= GC_RESERVE:
            if self.step():
                continue
            if num_resorts < len(superblocks.states) and self.step(is_last_resort=True):
                num_resorts += 1  # more would wear the flash for nothing
                continue
            if self._is_busy or self._erasing:
                self._state.changed.wait()  # for another collection, or for readers
            elif superblocks.count(State.FREE) <= GC_RESERVE:
                raise OutOfFlash(superblocks.count(State.FREE), 0)

    @property
    def is_retiring(self) -> bool:
        """Whether something lies on superblocks with failed blocks that is to be moved."""
        superblocks = self._state.superblocks
        return any(superblocks.states[s] == State.FULL for s in superblocks.retiring)

    def finish_retiring(self) -> None:
        """Move what lies on superblocks with failed blocks now."""
        while self.is_retiring:
            if not self.step():
                self._state.changed.wait()  # for another collection

    def wants_background(self) -> bool:
        """Whether collecting ahead of need is worth its wear."""
        superblocks = self._state.superblocks
        if superblocks.retiring or self._disturbed() is not None:
            return True
        return superblocks.count(State.FREE) < GC_RESERVE + self._options.background_free

    def gains(self) -> bool:
        """Whether a step would free anything, or mend what should be."""
        return bool(self._emptied or self._erasing) or self._choose() is not None

    def step(self, is_last_resort: bool = False) -> bool:
        """Collect one superblock, or erase what was waiting; whether anything was gained.

        is_last_resort: also where the rows that a flush completes may cost what is gained
        """
        if self._is_busy:
            return False
        self._is_busy = True
        try:
            if self._finish_erases():
                return True
            victim = self._choose(is_last_resort)
            if self._is_short(victim) and self._log.give_up_checkpoint():
                self.erase_replaced()
                return True
            if victim is None:
                return self._erase_emptied()
            try:
                if self._empty(victim):
                    self._level_wear()
            except OutOfFlash:
                if not self._erase_emptied():
                    raise
            return True  # one that is quarantined is no candidate any more
        finally:
            self._is_busy = False
            self._state.changed.notify_all()

    def _choose(self, is_last_resort: bool = False) -> int | None:
        state = self._state
        disturbed = self._disturbed()
        if disturbed is not None:
            return disturbed
        return choose_victim(
            state.superblocks,
            state.mapping.valid_pages,
            self._policy,
            state.next_program_number,
            1 if is_last_resort else state.superblocks.row_pages,
        )

    def _is_short(self, victim: int | None) -> bool:
        """Whether room is needed and collecting would give little of it, or has hardly any to work in."""
        state = self._state
        num_free = state.superblocks.count(State.FREE)
        if num_free > GC_RESERVE or self._emptied:
            return False
        if victim is None or num_free <= 1:
            return True
        capacity = int(state.superblocks.capacity[victim])
        return capacity - int(state.mapping.valid_pages[victim]) < capacity * LITTLE_GAIN

    def _disturbed(self) -> int | None:
        """A superblock that was read so often that its neighbours suffer."""
        limit = self._options.read_disturb_limit
        if not limit:
            return None
        full = self._state.superblocks.of(State.FULL)
        worn = full[self._state.media.read_counts()[full] > limit]
        return int(worn[0]) if len(worn) else None

    def _level_wear(self) -> None:
        """Static wear levelling: what lies on the least worn superblock goes to the most worn free one."""
        superblocks = self._state.superblocks
        full = superblocks.of(State.FULL)
        if not len(full) or superblocks.count(State.FREE) <= GC_RESERVE:
            return
        coldest = int(full[np.argmin(superblocks.erase_counts[full])])
        spread = int(superblocks.erase_counts.max()) - int(superblocks.erase_counts[coldest])
        if spread <= self._options.wear_spread * self._options.rated_cycles:
            return
        before = self._state.counters.gc_pages_written
        self._empty(coldest)
        self._state.counters.wear_leveling_pages_written += self._state.counters.gc_pages_written - before

    # how

    def _empty(self, victim: int) -> bool:
        """Move what is valid in a superblock and have it erased; False where that cannot be."""
        if not self._copy(victim):
            return False
        self._state.superblocks.move(victim, State.ERASING)
        self._emptied.append(victim)
        self._erase_emptied()
        return True

    def _quarantine(self, superblock: int, why) -> None:
        log.error("superblock %d is kept out of collection: %s", superblock, why)
        self._state.superblocks.move(superblock, State.QUARANTINED)
        self._state.superblocks.retiring.discard(superblock)

    def _copy(self, victim: int) -> bool:
        """Copy a victim's valid pages elsewhere; False, and quarantined, when one is corrupt."""
        state = self._state
        if state.mapping.valid_pages[victim] == 0:
            return True
        try:
            self._move(*self._data_records(victim))
        except CorruptPage as error:
            self._quarantine(victim, error)
            return False
        if state.mapping.valid_pages[victim]:
            # pages that the map names but whose OOB does not hold any more
            self._quarantine(victim, "its OOB is damaged")
            return False
        return True

    def _data_records(self, superblock: int) -> tuple[np.ndarray, np.ndarray]:
        """PAGE_OOB [n] and int64 [n] pages of a superblock's data, as far as known."""
        state = self._state
        unwritten = state.unwritten_parity(superblock)
        with state.unlocked():
            records = state.media.read_oob(superblock)
            records, pages, _ = oob.known_records(state.media, superblock, records, unwritten)
        data = (records["kind"] == PageKind.DATA) & (records["lba"] < state.num_lbas)
        return records[data], pages[data]

    def _move(self, records: np.ndarray, pages: np.ndarray) -> None:
        """Copy those of a superblock's pages that are mapped. Raises CorruptPage."""
        state = self._state
        lbas = records["lba"].astype(np.int64)
        buffer = dma.allocate(COPY_PAGES * state.page_size)
        addresses = dma.page_addresses(buffer, state.page_size)
        position = 0
        while position < len(pages):
            valid = position + np.flatnonzero(state.mapping.resolve(lbas[position:]) == pages[position:])
            chosen = valid[:COPY_PAGES]
            if not len(chosen):
                break
            position = int(chosen[-1]) + 1
            with state.unlocked():
                self._read_checked(pages[chosen], lbas[chosen], addresses[: len(chosen)])
            versions = records["sequence_number"][chosen]
            for part, copies in self._writer.append(GC_STREAM, lbas[chosen], addresses, versions):
                state.mapping.move(lbas[chosen][part], pages[chosen][part], copies)
                state.counters.gc_pages_written += len(copies)

    def move_groups(self, groups: np.ndarray) -> None:
        """Copy what is mapped in these rows of dies, int64 of page // num_dies; what is corrupt stays."""
        state = self._state
        num_dies = state.geometry.num_dies
        superblocks = np.unique(groups * num_dies // state.pages_per_superblock)
        for superblock in superblocks[state.mapping.valid_pages[superblocks] > 0].tolist():
            with suppress(OutOfFlash):  # it may do without
                self.make_room()
            records, pages = self._data_records(superblock)
            chosen = np.isin(pages // num_dies, groups)
            try:
                self._move(records[chosen], pages[chosen])
            except CorruptPage as error:
                log.error("%s", error)

    def erase_replaced(self) -> None:
        """Metadata superblocks that hold nothing needed any more."""
        for superblock in self._log.replaced:
            self._state.superblocks.move(superblock, State.ERASING)
            self._erasing.append((superblock, self._state.guards.next_epoch()))
        self._log.replaced.clear()
        self._finish_erases()

    def _erase_emptied(self) -> bool:
        if not self._emptied:
            return False
        emptied = list(self._emptied)
        self._log.make_durable()
        self.erase_replaced()
        for superblock in emptied:
            self._emptied.remove(superblock)
            self._erasing.append((superblock, self._state.guards.next_epoch()))
        return self._finish_erases()

    def _finish_erases(self) -> bool:
        """Erase what no reader holds any more; whether any was."""
        state = self._state
        ready = [entry for entry in self._erasing if state.guards.is_past(entry[1])]
        for entry in ready:
            self._erasing.remove(entry)
        for superblock, _ in ready:
            # whoever caches its pages forgets them first: afterwards they may hold anything
            for callback in self._erase_callbacks:
                callback(superblock * state.pages_per_superblock, state.pages_per_superblock)
            try:
                if not state.superblocks.bad_planes[superblock].all():
                    with state.unlocked():
                        state.media.erase(superblock)
            except EraseFailed as failure:
                log.warning("%s", failure)
                state.counters.erase_failures += len(failure.planes)
                state.media.mark_bad(superblock, failure.planes)
                state.superblocks.planes_failed(superblock, failure.planes)
            state.checksums.forget(superblock)
            state.begun.pop(superblock, None)
            state.superblocks.erased(superblock)
            state.counters.superblocks_erased += 1
            state.changed.notify_all()
        return bool(ready)


class BackgroundCollector:
    """A thread that collects ahead of need, so that writes seldom have to."""

    def __init__(self, state: FlashState, collector: Collector):
        self._state = state
        self._collector = collector
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="kvfs-collector", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        state = self._state
        with state.lock:
            while not self._ending:
                try:
                    if self._collector.wants_background() and self._collector.step():
                        continue
                except FlashError as error:
                    # a write that needs the room will meet the same error and report it
                    log.error("background collection stops: %s", error)
                    return
                state.pressure.wait()

    def close(self) -> None:
        with self._state.lock:
            self._ending = True
            self._state.pressure.notify_all()
        self._thread.join()
