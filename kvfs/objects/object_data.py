"""The bytes of objects: from whatever memory they lie in to whole blocks, and back.

A drive transfers whole blocks to and from memory that is aligned to 4 KiB. What lies so crosses without a copy;
of the rest, the last part block of an object at least, memory of our own holds what crosses.
"""

from collections.abc import Sequence

import numpy as np

from kvfs.allocator import Extent
from kvfs.errors import InvalidArgument
from kvfs.files.buffer_pool import BufferPool
from spdk_glue import dma

POOL_BYTES = 32 << 20  # idle transfer memory of each size


def byte_array(buffer, writable: bool = False) -> np.ndarray:
    """uint8 view of contiguous memory: an array of any type, or a buffer. Raises InvalidArgument."""
    try:
        if isinstance(buffer, np.ndarray):
            if not buffer.flags.c_contiguous:
                raise BufferError("it has gaps")
            found = buffer.reshape(-1).view(np.uint8)
        else:
            view = memoryview(buffer)
            if not view.c_contiguous:
                raise BufferError("it has gaps")
            found = np.frombuffer(view.cast("B") if view.nbytes else bytearray(), np.uint8)
        if writable and not found.flags.writeable:
            raise BufferError("it cannot be written to")
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidArgument(
            f"an object is a contiguous buffer of bytes, not {type(buffer)}: {error}"
        ) from error
    return found


class Transfers:
    """Objects that cross in one batch. (first LBA, memory) pairs are in `pieces`."""

    def __init__(self, pool: BufferPool, block_bytes: int):
        self.pieces: list[tuple[int, np.ndarray]] = []
        self._pool = pool
        self._block_bytes = block_bytes
        self._lent: list[tuple[np.ndarray, np.ndarray]] = []  # (the object's part, the lease it crosses in)

    def add(self, data: np.ndarray, extents: Sequence[Extent], copy_all: bool = False) -> None:
        """data: uint8, an object's; copy_all: it may change while it crosses."""
        is_aligned = data.nbytes and dma.address_of(data) % dma.ALIGNMENT == 0 and not copy_all
        num_direct = data.nbytes // self._block_bytes if is_aligned else 0
        cut = num_direct * self._block_bytes
        rest = None
        if cut < data.nbytes:
            num_bytes = -(-(data.nbytes - cut) // self._block_bytes) * self._block_bytes
            rest = self._pool.take(num_bytes)
            self._lent.append((data[cut:], rest))
        done = 0
        for first_lba, count in extents:
            direct = min(count, max(0, num_direct - done))
            if direct:
                start = done * self._block_bytes
                self.pieces.append((first_lba, data[start : start + direct * self._block_bytes]))
            if count > direct:
                start = (done + direct - num_direct) * self._block_bytes
                part = rest[start : start + (count - direct) * self._block_bytes]
                self.pieces.append((first_lba + direct, part))
            done += count

    def fill(self) -> None:
        """Before writing: copy what does not cross from where it lies."""
        for part, lease in self._lent:
            lease[: part.nbytes] = part
            lease[part.nbytes :] = 0

    def empty(self) -> None:
        """After reading."""
        for part, lease in self._lent:
            part[:] = lease[: part.nbytes]
