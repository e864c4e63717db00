"""The life of a superblock: every state and every transition.

FREE -> OPEN -> FULL -> ERASING -> FREE
FREE -> LOG -> ERASING            metadata log
FULL -> QUARANTINED               a page in it failed its checksum; it is never collected
BAD                               has a bad erase block; never used
"""

from enum import IntEnum

import numpy as np


class State(IntEnum):
    FREE = 0
    OPEN = 1
    FULL = 2
    LOG = 3
    ERASING = 4
    QUARANTINED = 5
    BAD = 6


NEXT = {
    State.FREE: {State.OPEN, State.LOG},
    State.OPEN: {State.FULL},
    State.FULL: {State.ERASING, State.QUARANTINED},
    State.LOG: {State.ERASING},
    State.ERASING: {State.FREE},
    State.QUARANTINED: {State.ERASING},  # once nothing in it is mapped any more
    State.BAD: set(),
}


class Superblocks:
    """State of each superblock, and the choice of the next one to write: the least worn free one."""

    def __init__(self, bad: np.ndarray, erase_counts: np.ndarray):
        self.states = np.where(bad, State.BAD, State.FREE).astype(np.uint8)
        self.erase_counts = erase_counts

    def move(self, superblock: int, state: State) -> None:
        old = State(self.states[superblock])
        assert state in NEXT[old], f"superblock {superblock}: {old.name} to {state.name}"
        self.states[superblock] = state

    def count(self, state: State) -> int:
        return int(np.count_nonzero(self.states == state))

    def of(self, state: State) -> np.ndarray:
        """int64: the superblocks in a state."""
        return np.flatnonzero(self.states == state)

    def take_free(self, state: State) -> int | None:
        """The least worn free superblock, moved to `state`; None when there is none."""
        free = self.of(State.FREE)
        if not len(free):
            return None
        superblock = int(free[np.argmin(self.erase_counts[free])])
        self.move(superblock, state)
        return superblock
