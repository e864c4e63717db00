"""Logical blocks: which are free. Next fit over a sorted list of free extents.

Next fit keeps the groups of a growing sequence consecutive, so an attention command names them in one
extent. What durable metadata still names must not be written: blocks freed are held back until the
metadata that forgets them is durable, then `release` hands them on.
"""

from bisect import bisect_left

Extent = tuple[int, int]  # first LBA, number of LBAs


class Allocator:
    def __init__(self, first_lba: int, stop_lba: int, used: list[Extent]):
        """Free is what [first_lba, stop_lba) holds besides `used`. Raises ValueError on overlap."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._held: list[Extent] = []
        self._next = 0  # index of the extent that the last allocation came from
        position = first_lba
        for start, count in sorted(used):
            if start < position or start + count > stop_lba:
                raise ValueError(f"extent at LBA {start} overlaps another or lies outside the data area")
            if start > position:
                self._starts.append(position)
                self._stops.append(start)
            position = start + count
        if position < stop_lba:
            self._starts.append(position)
            self._stops.append(stop_lba)

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
                self._starts[index] += num_lbas
                if self._starts[index] == self._stops[index]:
                    del self._starts[index], self._stops[index]
                    self._next = 0 if index >= len(self._starts) else index
                return first
        return None

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
