"""The order in which slots were used: a linked list in two arrays, exact, eight bytes a slot."""

from array import array

import numpy as np

NO_SLOT = -1
_OUTSIDE = -1
_ENDS = 0  # the entry that stands before the oldest and behind the newest; slot n has entry n + 1


class UseOrder:
    """Slots are in it or outside; a slot that is new to `add_slots` is outside."""

    def __init__(self):
        self._later = array("i", [_ENDS])
        self._earlier = array("i", [_ENDS])

    @property
    def num_slots(self) -> int:
        return len(self._later) - 1

    def add_slots(self, count: int) -> None:
        self._later.extend([_OUTSIDE] * count)
        self._earlier.extend([_OUTSIDE] * count)

    def fill(self, slots: np.ndarray) -> None:
        """All slots there are, int64 [any number], the oldest first."""
        chain = np.concatenate(([_ENDS], slots + 1, [_ENDS]))
        np.asarray(self._later)[chain[:-1]] = chain[1:]
        np.asarray(self._earlier)[chain[1:]] = chain[:-1]

    def __contains__(self, slot: int) -> bool:
        return self._later[slot + 1] != _OUTSIDE

    @property
    def oldest(self) -> int:
        """NO_SLOT where there is none."""
        return self._later[_ENDS] - 1

    def append(self, slot: int) -> None:
        """It is the newest; it was outside."""
        entry, last = slot + 1, self._earlier[_ENDS]
        self._later[last] = self._earlier[_ENDS] = entry
        self._earlier[entry], self._later[entry] = last, _ENDS

    def remove(self, slot: int) -> None:
        """It is outside; it was in the order."""
        entry = slot + 1
        earlier, later = self._earlier[entry], self._later[entry]
        self._later[earlier], self._earlier[later] = later, earlier
        self._later[entry] = _OUTSIDE
