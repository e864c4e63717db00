"""How threads share a batch's units: each takes the next one as it comes to the end of its last.

One atomic addition per unit, inside the kernels: no call, no lock, and all threads end together.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic


@intrinsic
def _fetch_add(typingctx, address):
    """Add one to the int64 at an address, as one step against other threads; returns what was there."""

    def codegen(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@njit(nogil=True, cache=True)
def take_unit(next_unit):
    """The unit at next_unit[0], an int64 [1], which becomes the one behind it."""
    return _fetch_add(np.int64(next_unit.ctypes.data))


class UnitRange:
    """Units [first_unit, stop_unit) of a batch, taken one at a time by any number of threads."""

    def __init__(self, first_unit: int, stop_unit: int):
        self.next_unit = np.array([first_unit], np.int64)  # at stop_unit or beyond it when all are taken
        self.stop_unit = stop_unit

    def __len__(self) -> int:
        """Units that nobody has taken yet."""
        return max(0, self.stop_unit - int(self.next_unit[0]))

    def __iter__(self):
        """Take units until none is left."""
        while (unit := int(take_unit(self.next_unit))) < self.stop_unit:
            yield unit
