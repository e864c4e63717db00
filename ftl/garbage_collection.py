"""Choosing what to collect: greedy, the full superblock with the fewest valid pages."""

import numpy as np

from ftl.superblocks import State, Superblocks


def choose_victim(superblocks: Superblocks, valid_pages: np.ndarray, pages_per_superblock: int) -> int | None:
    """The superblock whose collection frees most, or None when none frees anything.

    A quarantined one is a victim only once nothing in it is mapped: its pages cannot be copied.
    """
    full = superblocks.of(State.FULL)
    dead = superblocks.of(State.QUARANTINED)
    candidates = np.concatenate([full, dead[valid_pages[dead] == 0]])
    if not len(candidates):
        return None
    victim = int(candidates[np.argmin(valid_pages[candidates])])
    return victim if valid_pages[victim] < pages_per_superblock else None
