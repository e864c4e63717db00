"""Memory for transfers, used again: new memory costs a page fault per 4 KiB, more than copying it does.

A lease is an array that goes back by itself when nothing refers to it any more, so a reply to the kernel may
keep it for as long as it takes.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from spdk_glue import dma

SLAB_BYTES = 2 << 20  # one huge page


class BufferPool:
    def __init__(self, kept_bytes: int):
        """kept_bytes: how much idle memory of each size (a power of two) may wait; a slab at least."""
        self._kept_bytes = kept_bytes
        self._idle: dict[int, list[np.ndarray]] = defaultdict(list)  # by size
        self._leases: dict[int, weakref.ref] = {}

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes], aligned for transfers, holding anything. Slices do not keep it, memoryviews do."""
        size = max(dma.ALIGNMENT, 1 << (num_bytes - 1).bit_length())
        try:
            buffer = self._idle[size].pop()
        except IndexError:
            buffer = self._make(size)
        lease = buffer[:num_bytes]
        key = id(lease)
        self._leases[key] = weakref.ref(lease, self._returner(key, buffer))
        return lease

    def _make(self, size: int) -> np.ndarray:
        if size >= SLAB_BYTES:
            return dma.allocate(size)
        slab = dma.allocate(SLAB_BYTES)
        parts = [slab[start : start + size] for start in range(0, SLAB_BYTES, size)]
        self._idle[size] += parts[1:]
        return parts[0]

    def _returner(self, key: int, buffer: np.ndarray) -> Callable:
        def returned(_) -> None:
            del self._leases[key]
            idle = self._idle[buffer.nbytes]
            if len(idle) * buffer.nbytes < self._kept_bytes:
                idle.append(buffer)

        return returned
