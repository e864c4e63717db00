"""Writes of sequences that are on their way to flash: a bounded number of bytes."""

from collections import deque

SPILLING_BYTES = 32 << 20


class SpillQueue:
    """The spills of a store, oldest first. A sequence ends its own; here the oldest are, to keep the limit."""

    def __init__(self, limit_bytes: int = SPILLING_BYTES):
        self._limit_bytes = limit_bytes
        self._spills: deque[tuple] = deque()
        self._num_bytes = 0

    def note(self, sequence, layer: int, num_bytes: int) -> None:
        self._spills.append((sequence, layer, num_bytes))
        self._num_bytes += num_bytes

    def make_room(self, num_bytes: int) -> None:
        """Wait for the oldest spills until `num_bytes` more stay within the limit."""
        while self._spills and self._num_bytes + num_bytes > self._limit_bytes:
            sequence, layer, oldest_bytes = self._spills.popleft()
            self._num_bytes -= oldest_bytes
            if not sequence._deleted:
                sequence._complete_oldest_spill(layer)
