"""The memory that a client shares with the drive's owner: arrays cross in it by reference.

The owner makes it, sealed against a change of size, so that neither can make the other fault. Behind the arrays
lies the number of the last request that was posted.
"""

import fcntl
import math
import mmap
import os
import stat

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.remote.protocol import ARRAY_ALIGNMENT

_POSTED_BYTES = ARRAY_ALIGNMENT
_KEPT_ARRAYS = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(num_bytes: int) -> int:
    """A descriptor of new shared memory, with room for arrays. Pages that are never touched take no memory."""
    descriptor = os.memfd_create("kvfs-client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes + _POSTED_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class SharedMemory:
    """A mapping of it. Does not keep the descriptor. Raises ValueError for a descriptor of something else."""

    def __init__(self, descriptor: int):
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("the shared memory is not sealed")
        self.num_bytes = facts.st_size - _POSTED_BYTES
        self._mapping = mmap.mmap(descriptor, facts.st_size)
        # making one takes longer than all that is done with it
        self._arrays: dict[tuple, np.ndarray] = {}
        self._posted = memoryview(self._mapping)[self.num_bytes :].cast("Q")

    @property
    def posted(self) -> int:
        """The number of the last posted request: in the owner's socket, says the client, or served already."""
        return self._posted[0]

    @posted.setter
    def posted(self, number: int) -> None:
        self._posted[0] = number

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view, the same one for the same place. Raises InvalidArgument where it is not aligned or not wholly
        inside."""
        found = self._arrays.get((offset, shape, dtype))
        return self._new_array(offset, shape, dtype) if found is None else found

    def _new_array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        is_inside = 0 <= offset <= self.num_bytes - size and min(shape, default=0) >= 0
        if offset % ARRAY_ALIGNMENT or not is_inside:
            raise InvalidArgument(
                f"an array of {size} bytes at {offset} of the {self.num_bytes} bytes of shared memory"
            )
        if len(self._arrays) >= _KEPT_ARRAYS:
            self._arrays.clear()
        self._arrays[offset, shape, dtype] = array = np.ndarray(shape, dtype, self._mapping, offset)
        return array
