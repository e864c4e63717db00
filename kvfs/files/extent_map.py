"""Where a file's blocks lie: sorted runs of blocks with their LBAs; what no run covers is a hole, and zero."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from kvfs.allocator import Extent

MAX_BLOCK = 1 << 62  # beyond any file

Run = tuple[int, int, int]  # first file block, number of blocks, LBA of the first
Piece = tuple[int, int, int | None]  # first file block, stop block, LBA of the first or None for a hole


class ExtentMap:
    """version counts removals: a reader that finds it changed may have read blocks that are another's by now.

    Not thread-safe: see FileData.
    """

    def __init__(self, runs: Iterable[Run] = ()):
        """runs: sorted and disjoint."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._lbas: list[int] = []
        self.num_blocks = 0
        self.version = 0
        self.changed: tuple[int, int] | None = None  # file blocks [first, stop) whose rows are to be stored
        for first, count, lba in runs:
            self._starts.append(first)
            self._stops.append(first + count)
            self._lbas.append(lba)
            self.num_blocks += count

    def runs(self, first: int = 0, stop: int = MAX_BLOCK) -> Iterator[Run]:
        """Those that begin in [first, stop)."""
        for index in range(bisect_left(self._starts, first), bisect_left(self._starts, stop)):
            start = self._starts[index]
            yield start, self._stops[index] - start, self._lbas[index]

    def pieces(self, first: int, stop: int) -> list[Piece]:
        """[first, stop) cut into runs and holes, in order."""
        found: list[Piece] = []
        index = bisect_right(self._stops, first)
        while first < stop and index < len(self._starts) and self._starts[index] < stop:
            start = self._starts[index]
            if first < start:
                found.append((first, start, None))
                first = start
            end = min(self._stops[index], stop)
            found.append((first, end, self._lbas[index] + first - start))
            first = end
            index += 1
        if first < stop:
            found.append((first, stop, None))
        return found

    def lba(self, block: int) -> int | None:
        index = bisect_right(self._stops, block)
        if index < len(self._starts) and self._starts[index] <= block:
            return self._lbas[index] + block - self._starts[index]
        return None

    def run_lba(self, first: int, stop: int) -> int | None:
        """Where blocks [first, stop) lie, if that is one run."""
        index = bisect_right(self._stops, first)
        if index < len(self._starts) and self._starts[index] <= first and stop <= self._stops[index]:
            return self._lbas[index] + first - self._starts[index]
        return None

    def lba_behind(self, block: int) -> int | None:
        """Where a block would continue the run before it."""
        index = bisect_left(self._starts, block) - 1
        return None if index < 0 else self._lbas[index] + self._stops[index] - self._starts[index]

    def add(self, first: int, count: int, lba: int) -> None:
        """Fill a hole, or part of one; joined with neighbours that it continues."""
        stop = first + count
        index = bisect_left(self._starts, first)
        low, high = first, stop
        joins_left = (
            index > 0
            and self._stops[index - 1] == first
            and self._lbas[index - 1] + first - self._starts[index - 1] == lba
        )
        joins_right = (
            index < len(self._starts) and self._starts[index] == stop and self._lbas[index] == lba + count
        )
        if joins_left:
            low = self._starts[index - 1]
            self._stops[index - 1] = stop
            if joins_right:
                self._stops[index - 1] = high = self._stops[index]
                del self._starts[index], self._stops[index], self._lbas[index]
        elif joins_right:
            high = self._stops[index]
            self._starts[index], self._lbas[index] = first, lba
        else:
            self._starts.insert(index, first)
            self._stops.insert(index, stop)
            self._lbas.insert(index, lba)
        self.num_blocks += count
        self._note_change(low, high)

    def remove(self, first: int, stop: int) -> list[Extent]:
        """Make [first, stop) a hole; the extents that lay there."""
        low = bisect_right(self._stops, first)
        high = bisect_left(self._starts, stop)
        if low >= high:
            return []
        removed = [(lba, end - start) for start, end, lba in self.pieces(first, stop) if lba is not None]
        kept: list[Run] = []
        start, lba = self._starts[low], self._lbas[low]
        if start < first:
            kept.append((start, first - start, lba))
        last_start, last_stop = self._starts[high - 1], self._stops[high - 1]
        if last_stop > stop:
            kept.append((stop, last_stop - stop, self._lbas[high - 1] + stop - last_start))
        self._note_change(start, last_stop)
        self._starts[low:high] = [run[0] for run in kept]
        self._stops[low:high] = [run[0] + run[1] for run in kept]
        self._lbas[low:high] = [run[2] for run in kept]
        self.num_blocks -= sum(count for _, count in removed)
        self.version += 1
        return removed

    def next_data(self, block: int) -> int | None:
        """The first block at or after one that is no hole."""
        index = bisect_right(self._stops, block)
        return max(block, self._starts[index]) if index < len(self._starts) else None

    def next_hole(self, block: int) -> int:
        index = bisect_right(self._stops, block)
        while index < len(self._starts) and self._starts[index] <= block:
            block = self._stops[index]
            index += 1
        return block

    def take_changed(self) -> tuple[int, int] | None:
        """What changed since the last time."""
        changed, self.changed = self.changed, None
        return changed

    def _note_change(self, first: int, stop: int) -> None:
        if self.changed is not None:
            first, stop = min(first, self.changed[0]), max(stop, self.changed[1])
        self.changed = (first, stop)
