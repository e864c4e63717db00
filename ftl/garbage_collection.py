"""Choosing what to collect. A policy sees arrays over the candidates and returns the position of one."""

from typing import Protocol

import numpy as np

from ftl.superblocks import State, Superblocks


class Policy(Protocol):
    """utilization: float64 [n], share of a superblock's pages that is valid; age: int64 [n], pages programmed
    on the drive since its last one."""

    def __call__(self, utilization: np.ndarray, age: np.ndarray) -> int: ...


def greedy(utilization: np.ndarray, age: np.ndarray) -> int:
    """The one that frees most."""
    return int(np.argmin(utilization))


def cost_benefit(utilization: np.ndarray, age: np.ndarray) -> int:
    """Space gained times age over cost (Rosenblum and Ousterhout, 1992): old ones are collected earlier, since
    waiting would not empty them further."""
    return int(np.argmax((1 - utilization) * (age + 1) / (1 + utilization)))


class DChoices:
    """The best of a few at random (Van Houdt, 2013): nearly as good as greedy at a fixed cost."""

    def __init__(self, d: int = 10, seed: int = 1):
        self._d = d
        self._random = np.random.default_rng(seed)

    def __call__(self, utilization: np.ndarray, age: np.ndarray) -> int:
        sample = self._random.integers(0, len(utilization), self._d)
        return int(sample[np.argmin(utilization[sample])])


POLICIES = {"greedy": lambda: greedy, "cost-benefit": lambda: cost_benefit, "d-choices": DChoices}


def make_policy(name: str) -> Policy:
    """Raises ValueError with a line for the user."""
    if name not in POLICIES:
        raise ValueError(f"no collection policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()


def choose_victim(
    superblocks: Superblocks, valid_pages: np.ndarray, policy: Policy, program_number: int, row_pages: int
) -> int | None:
    """The superblock to collect next, or None when none frees anything: what is copied fills whole rows.

    Those with a failed block come first, whatever it costs. A quarantined one is a victim only once nothing
    in it is mapped: its pages cannot be copied.
    """
    retiring = [s for s in superblocks.retiring if superblocks.states[s] == State.FULL]
    if retiring:
        return min(retiring)
    full = superblocks.of(State.FULL)
    dead = superblocks.of(State.QUARANTINED)
    candidates = np.concatenate([full, dead[valid_pages[dead] == 0]])
    rows = -(-valid_pages[candidates] // row_pages)
    candidates = candidates[rows * row_pages < superblocks.capacity[candidates]]
    if not len(candidates):
        return None
    empty = candidates[valid_pages[candidates] == 0]
    if len(empty):
        return int(empty[0])
    age = program_number - superblocks.newest[candidates]
    utilization = valid_pages[candidates] / superblocks.capacity[candidates]
    return int(candidates[policy(utilization, age)])
