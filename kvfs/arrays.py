"""What users hand in: NumPy or torch arrays of several float types, brought to the storage dtype."""

import sys

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.layout import NUMPY_DTYPE


def as_numpy(array) -> np.ndarray:
    """A NumPy view of a NumPy or (CPU) torch array, without importing torch."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach()
        if array.device.type != "cpu":
            array = array.cpu()
        if array.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own to export to
            return array.contiguous().view(torch.int16).numpy().view(NUMPY_DTYPE["bfloat16"])
        return array.numpy()
    return np.asarray(array)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == NUMPY_DTYPE["bfloat16"]


def float_array(array, name: str, shape: tuple[int | None, ...], meaning: str) -> np.ndarray:
    """`array` as NumPy floats of `shape` (None: any length). Raises InvalidArgument naming `name`."""
    try:
        found = as_numpy(array)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is not an array: {error}") from error
    if not _is_float(found.dtype):
        raise InvalidArgument(f"{name} has dtype {found.dtype}, wanted float16, bfloat16 or float32")
    if found.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(found.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InvalidArgument(f"{name} has shape {found.shape}, wanted {meaning} = [{wanted}]")
    return found


def token_id_array(token_ids) -> np.ndarray:
    """uint32 [any number]: token ids of any integer type and shape. Raises InvalidArgument."""
    ids = np.asarray(token_ids).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 0xFFFFFFFF):
        raise InvalidArgument("token ids are integers from 0 to 2**32 - 1")
    return ids.astype(np.uint32)


def to_storage(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounded to the storage dtype, C-contiguous; no copy where it already is. NaN stays NaN."""
    if array.dtype != dtype:
        with np.errstate(over="ignore", invalid="ignore"):  # float16 overflows to infinity, as casts do
            array = array.astype(dtype)
    return np.ascontiguousarray(array)


def check_finite(array: np.ndarray, name: str, dtype: str) -> None:
    """array: float16. Raises InvalidArgument for what a quantized dtype cannot hold."""
    exponent = 0x7C00
    if ((array.view(np.uint16) & exponent) == exponent).any():
        raise InvalidArgument(f"{name} hold NaN, infinity or more than 65504, for which {dtype} has no code")


def to_query(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Queries for the wire: (C-contiguous array, dtype name); what is neither half type goes as float32."""
    for name in ("float16", "bfloat16"):
        if array.dtype == NUMPY_DTYPE[name]:
            return np.ascontiguousarray(array), name
    return np.ascontiguousarray(array, np.float32), "float32"
