"""Which tokens a sequence had at some time, and whether it still has them.

Appending never changes a token, so a version is good until a truncation cuts into it.
"""

import itertools
from dataclasses import dataclass

MAX_CUTS = 256  # of each sequence; beyond, old versions may count as cut that were not

_epochs = itertools.count(1)  # of all sequences, so that no two histories share one


@dataclass(frozen=True, slots=True)
class Version:
    """The first num_tokens tokens as of an epoch: a number that grows with every truncation."""

    num_tokens: int
    epoch: int


class History:
    """The truncations of one sequence since it was opened. Not safe for several threads."""

    def __init__(self):
        self.epoch = next(_epochs)
        self._cuts: list[tuple[int, int]] = []  # (epoch that began, tokens that were left), both growing

    def cut(self, num_tokens: int) -> None:
        """A truncation has left `num_tokens` tokens."""
        self.epoch = next(_epochs)
        while self._cuts and self._cuts[-1][1] >= num_tokens:
            self._cuts.pop()
        self._cuts.append((self.epoch, num_tokens))
        if len(self._cuts) > MAX_CUTS:
            self._cuts[:2] = [(self._cuts[1][0], self._cuts[0][1])]

    def holds(self, version: Version) -> bool:
        """Whether no truncation since has cut into the version's tokens."""
        # what was left grows along the list: the first cut of later epochs is the deepest of them
        for epoch, num_tokens in self._cuts:
            if epoch > version.epoch:
                return num_tokens >= version.num_tokens
        return True
