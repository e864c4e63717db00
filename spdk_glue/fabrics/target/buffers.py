"""Memory for the data of one connection's commands, used again and again."""

import numpy as np

from spdk_glue import dma


class Buffers:
    """Sizes are powers of two, so that what comes back fits the next. Content is whatever was there before."""

    def __init__(self, kept_bytes_max: int):
        self._kept_max = kept_bytes_max
        self._kept_bytes = 0
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, length: int) -> np.ndarray:
        """uint8, at least so long, page-aligned."""
        size = max(dma.ALIGNMENT, 1 << (length - 1).bit_length())
        free = self._free.get(size)
        if free:
            self._kept_bytes -= size
            return free.pop()
        return dma.allocate(size)

    def give_back(self, memory: np.ndarray) -> None:
        if self._kept_bytes + memory.nbytes <= self._kept_max:
            self._kept_bytes += memory.nbytes
            self._free.setdefault(memory.nbytes, []).append(memory)
