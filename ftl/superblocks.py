"""The life of a superblock: every state and every transition, and what each one holds.

FREE -> OPEN -> FULL -> ERASING -> FREE
FREE -> LOG -> ERASING            metadata
FREE -> BAD                       its only good blocks were on a die that is dead
FULL -> QUARANTINED               a page in it failed its checksum; it is collected once nothing in it is mapped
ERASING -> BAD                    no good erase block is left in it
BAD -> FULL                       opening found there what a power cut kept from being moved

A superblock goes on with the erase blocks that are good: a bad one costs its own pages and no more.
"""

from enum import IntEnum

import numpy as np

from ftl.geometry import Geometry
from ftl.provisioning import kept_back, num_lbas

STREAM_UNKNOWN = -1
DEAD_DIE_SHARE = 0.5  # of bad blocks, from which on a die counts as dead


class State(IntEnum):
    FREE = 0
    OPEN = 1
    FULL = 2
    LOG = 3
    ERASING = 4
    QUARANTINED = 5
    BAD = 6


NEXT = {
    State.FREE: {State.OPEN, State.LOG, State.BAD},
    State.OPEN: {State.FULL},
    State.FULL: {State.ERASING, State.QUARANTINED},
    State.LOG: {State.ERASING},
    State.ERASING: {State.FREE, State.BAD},
    State.QUARANTINED: {State.ERASING},
    State.BAD: {State.FULL},
}


class Superblocks:
    """Arrays over all superblocks.

    states: uint8; erase_counts: int64; bad_planes: bool [num_superblocks, num_planes]
    capacity: int64, pages that can hold data, as of the last erase
    row_pages: int, pages that a flush makes full: those for data of a row, with parity
    fill: int64, one past the index of the last page programmed
    first, newest: int64, program numbers of the first and last page programmed: what it holds has not changed
        since
    stream: int64, whose pages it was opened for, or goes on with; STREAM_UNKNOWN: before this session, or none
    keeps_parity: whether what is written from now on has it: not where a die is dead and room is short
    retiring: set of those with a block that failed; what they hold is moved before all else
    damaged: set of those with a page that only parity could give back
    unsynced: bool, erased since the media was last synced
    """

    def __init__(self, geometry: Geometry, bad_planes: np.ndarray, erase_counts: np.ndarray):
        self._geometry = geometry
        self.bad_planes = bad_planes
        by_die = bad_planes.reshape(len(bad_planes), -1, geometry.num_dies)
        self._dead_dies = by_die.mean(axis=(0, 1)) > DEAD_DIE_SHARE
        self.keeps_parity = self._has_room_for_parity()
        self.row_pages = geometry.num_planes - geometry.planes_per_die if geometry.parity else 1
        self.capacity = self._data_pages(bad_planes)
        self.states = np.where(bad_planes.all(axis=1), State.BAD, State.FREE).astype(np.uint8)
        self.erase_counts = erase_counts
        self.fill = np.zeros(len(self.states), np.int64)
        self.first = np.zeros(len(self.states), np.int64)
        self.newest = np.zeros(len(self.states), np.int64)
        self.stream = np.full(len(self.states), STREAM_UNKNOWN, np.int64)
        self.unsynced = np.zeros(len(self.states), bool)
        self.retiring: set[int] = set()
        self.damaged: set[int] = set()

    def move(self, superblock: int, state: State) -> None:
        old = State(self.states[superblock])
        assert state in NEXT[old], f"superblock {superblock}: {old.name} to {state.name}"
        self.states[superblock] = state

    def erased(self, superblock: int) -> None:
        """It is empty, one cycle older, and free unless all its blocks are bad."""
        self.fill[superblock] = self.first[superblock] = self.newest[superblock] = 0
        self.stream[superblock] = STREAM_UNKNOWN
        self.erase_counts[superblock] += 1
        self.retiring.discard(superblock)
        self.damaged.discard(superblock)
        self.unsynced[superblock] = True
        self.capacity[superblock] = self._data_pages(self.bad_planes[superblock : superblock + 1])[0]
        self.move(superblock, State.BAD if self.bad_planes[superblock].all() else State.FREE)

    def _has_room_for_parity(self) -> bool:
        """Without a die rows are shorter, and parity takes a larger share of them: it may not fit any more."""
        if not self._geometry.parity or not self._dead_dies.any():
            return bool(self._geometry.parity)
        dead = np.tile(self._dead_dies, self._geometry.planes_per_die)
        capacity = np.sort(self._data_pages(self.bad_planes | dead, with_parity=True))
        return int(capacity[kept_back(self._geometry) :].sum()) >= num_lbas(self._geometry)

    def die_failed(self, die: int) -> list[int]:
        """A die's blocks in free superblocks are bad from now on; the superblocks that had such."""
        self._dead_dies[die] = True
        planes = np.arange(die, self._geometry.num_planes, self._geometry.num_dies)
        free = self.of(State.FREE)
        free = free[~self.bad_planes[np.ix_(free, planes)].all(axis=1)]
        self.bad_planes[np.ix_(free, planes)] = True
        self.keeps_parity = self._has_room_for_parity()
        self.capacity = self._data_pages(self.bad_planes)
        for superblock in free[self.bad_planes[free].all(axis=1)].tolist():
            self.move(superblock, State.BAD)
        return free.tolist()

    def _data_pages(self, bad_planes: np.ndarray, with_parity: bool | None = None) -> np.ndarray:
        """Pages on good blocks that parity does not take, by superblock."""
        with_parity = self.keeps_parity if with_parity is None else with_parity
        good = np.count_nonzero(~bad_planes, axis=1)
        if self._geometry.parity and with_parity:
            by_group = ~bad_planes.reshape(len(bad_planes), -1, self._geometry.num_dies)
            good = good - np.count_nonzero(np.count_nonzero(by_group, axis=2) >= 2, axis=1)
        return good * self._geometry.pages_per_erase_block

    def planes_failed(self, superblock: int, planes: np.ndarray) -> None:
        """These erase blocks of it are bad from now on."""
        self.bad_planes[superblock, planes] = True

    def count(self, state: State) -> int:
        return int(np.count_nonzero(self.states == state))

    def of(self, state: State) -> np.ndarray:
        """int64: the superblocks in a state."""
        return np.flatnonzero(self.states == state)

    def take_free(self, state: State, most_worn: bool = False) -> int | None:
        """The least worn free superblock (or the most worn, for what will stay), moved to `state`; None when
        there is none whose erase was synced."""
        free = np.flatnonzero((self.states == State.FREE) & ~self.unsynced)
        if not len(free):
            return None
        counts = self.erase_counts[free]
        superblock = int(free[np.argmax(counts) if most_worn else np.argmin(counts)])
        self.move(superblock, state)
        return superblock
