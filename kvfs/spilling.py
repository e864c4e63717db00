"""Writes of sequences that are on their way to flash: a bounded number of bytes."""

from collections import deque

from kvfs.tail import Spill

SPILLING_BYTES = 32 << 20


class SpillQueue:
    """The spills of a store, oldest first. A sequence ends its own; here the oldest are, to keep the limit."""

    def __init__(self, limit_bytes: int = SPILLING_BYTES):
        self._limit_bytes = limit_bytes
        self._spills: deque[tuple] = deque()
        self._num_bytes = 0

    def note(self, sequence, layer: int, spill: Spill) -> None:
        """A spill of a layer has begun."""
        self._spills.append((sequence, layer, spill))
        self._num_bytes += spill.num_bytes

    def make_room(self, num_bytes: int) -> None:
        """Wait for the oldest spills until `num_bytes` more stay within the limit."""
        while self._spills:
            sequence, layer, spill = self._spills[0]
            if spill.is_under_way and self._num_bytes + num_bytes <= self._limit_bytes:
                break
            self._spills.popleft()
            self._num_bytes -= spill.num_bytes
            if spill.is_under_way:  # and all before it of its layer are not, so it is the oldest there, too
                sequence._complete_oldest_spill(layer)
