"""Logical blocks: which are free. Next fit over a sorted list of free extents.

Next fit keeps the groups of a growing sequence consecutive, so an attention command names them in one
extent. What durable metadata still names must not be written: blocks freed are held back until the
metadata that forgets them is durable, then `release` hands them on.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

Extent = tuple[int, int]  # first LBA, number of LBAs


class Allocator:
    def __init__(self, first_lba: int, stop_lba: int, used: Sequence[Extent] | np.ndarray):
        """Free is what [first_lba, stop_lba) holds besides `used`. Raises ValueError on overlap."""
        extents = np.asarray(used, np.int64).reshape(-1, 2)
        extents = extents[np.argsort(extents[:, 0], kind="stable")]
        # what is free lies between the end of one and the start of the next
        starts = np.concatenate([[first_lba], extents.sum(1)])
        stops = np.concatenate([extents[:, 0], [stop_lba]])
        wrong = np.flatnonzero(stops < starts)
        if len(wrong):
            start = extents[max(0, wrong[0] - (wrong[0] == len(extents))), 0]
            raise ValueError(f"extent at LBA {start} overlaps another or lies outside the data area")
        is_free = stops > starts
        self._starts: list[int] = starts[is_free].tolist()
        self._stops: list[int] = stops[is_free].tolist()
        self._held: list[Extent] = []
        self._next = 0  # index of the extent that the last allocation came from

    @classmethod
    def of_free(cls, first_lba: int, stop_lba: int, free: Sequence[Extent]) -> "Allocator":
        """One that knows what is free. Raises ValueError for what overlaps or lies outside."""
        used = cls(first_lba, stop_lba, free).free_extents  # one's free extents are the other's used ones
        return cls(first_lba, stop_lba, used)

    @property
    def free_lbas(self) -> int:
        """Free blocks, those held back included."""
        return sum(self._stops) - sum(self._starts) + sum(count for _, count in self._held)

    @property
    def free_extents(self) -> list[Extent]:
        """Free extents that can be allocated now, in order."""
        return [(start, stop - start) for start, stop in zip(self._starts, self._stops, strict=True)]

    @property
    def held_extents(self) -> list[Extent]:
        """What waits for the next `release`."""
        return list(self._held)

    @property
    def largest_free_lbas(self) -> int:
        return max((b - a for a, b in zip(self._starts, self._stops, strict=True)), default=0)

    @property
    def has_held(self) -> bool:
        return bool(self._held)

    def allocate(self, num_lbas: int) -> int | None:
        """First LBA of a new extent, or None when no free extent is that large."""
        count = len(self._starts)
        for step in range(count):
            index = (self._next + step) % count
            if self._stops[index] - self._starts[index] >= num_lbas:
                self._next = index
                first = self._starts[index]
                self._take(index, num_lbas)
                return first
        return None

    def allocate_some(self, num_lbas: int, behind: int | None = None) -> list[Extent] | None:
        """Extents of so many blocks together, few and long; None, with none taken, when there are not so many.

        behind: the LBA from which on they are wanted most.
        """
        index = -1 if behind is None else bisect_left(self._starts, behind)
        if 0 <= index < len(self._starts) and self._starts[index] == behind:
            count = min(num_lbas, self._stops[index] - behind)
            if count < num_lbas and not self._has(num_lbas):
                return None
            self._take(index, count)
            found = [(behind, count)]
        else:
            found = []
        missing = num_lbas - sum(count for _, count in found)
        if missing:
            first = self.allocate(missing)
            if first is not None:
                found.append((first, missing))
            elif found or self._has(num_lbas):
                found += self._collect(missing)
            else:
                return None
        return found

    def _has(self, num_lbas: int) -> bool:
        return sum(self._stops) - sum(self._starts) >= num_lbas

    def _collect(self, num_lbas: int) -> list[Extent]:
        """As many of the longest free extents as it takes: there are enough."""
        found = []
        lengths = sorted(((b - a, a) for a, b in zip(self._starts, self._stops, strict=True)), reverse=True)
        for length, start in lengths:
            if num_lbas == 0:
                break
            count = min(length, num_lbas)
            self._take(bisect_left(self._starts, start), count)
            found.append((start, count))
            num_lbas -= count
        return found

    def _take(self, index: int, count: int) -> None:
        """The first blocks of a free extent."""
        self._starts[index] += count
        if self._starts[index] == self._stops[index]:
            del self._starts[index], self._stops[index]
            if self._next > index:
                self._next -= 1
            if self._next >= len(self._starts):
                self._next = 0

    def give_back(self, first_lba: int, num_lbas: int) -> None:
        """Free blocks that were never written: usable at once."""
        self._insert(first_lba, num_lbas)

    def hold(self, first_lba: int, num_lbas: int) -> None:
        """Free blocks that hold data or that durable metadata may name: usable after the next `release`."""
        self._held.append((first_lba, num_lbas))

    def release(self) -> list[Extent]:
        """The metadata is durable: make held blocks usable. Returns them, for NVMe Deallocate."""
        released, self._held = self._held, []
        for first_lba, num_lbas in released:
            self._insert(first_lba, num_lbas)
        return released

    def _insert(self, first: int, count: int) -> None:
        stop = first + count
        index = bisect_left(self._starts, first)
        joins_left = index > 0 and self._stops[index - 1] == first
        joins_right = index < len(self._starts) and self._starts[index] == stop
        if joins_left and joins_right:
            self._stops[index - 1] = self._stops[index]
            del self._starts[index], self._stops[index]
        elif joins_left:
            self._stops[index - 1] = stop
        elif joins_right:
            self._starts[index] = first
        else:
            self._starts.insert(index, first)
            self._stops.insert(index, stop)
        if self._next >= len(self._starts):
            self._next = 0
