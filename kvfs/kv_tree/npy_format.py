"""Headers of NPY files, as long as a page: rows behind them begin on a page, so memory maps are aligned.

NPY has no bfloat16. As `numpy.save` of an ml_dtypes array does, its values are declared as two opaque bytes,
`<V2`; `numpy.load(...).view(ml_dtypes.bfloat16)` is the array.
"""

import numpy as np

HEADER_BYTES = 4096
_MAGIC = b"\x93NUMPY\x01\x00"


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """For a C-ordered array, little-endian."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    length = HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.encode().ljust(length - 1) + b"\n"
