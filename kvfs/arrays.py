"""Arrays as users have them, in and out: NumPy, torch, DLPack and the buffer protocol, without importing torch.

What comes in is taken as it lies, any strides; it is copied once, to where the store keeps it. What goes out
into a caller's arrays is written there: these must be in host memory, writable and C-contiguous. NumPy has no
bfloat16 that it could give or take through DLPack or a buffer: such bits come and go as uint16, too.
"""

import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvfs.errors import InvalidArgument
from kvfs.layout import NUMPY_DTYPE

BFLOAT16 = NUMPY_DTYPE["bfloat16"]
_UINT16 = np.dtype(np.uint16)
# DLDeviceType of memory that the host can read: CPU, CUDAHost, ROCMHost, CUDAManaged
_HOST_DEVICES = {1, 3, 11, 13}


@runtime_checkable
class DLPackArray(Protocol):
    """What the array API's DLPack protocol asks of an array."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


Array = npt.ArrayLike | DLPackArray  # what is taken in
Pair = tuple[Any, Any]  # of the caller's arrays to be written to: NumPy, torch, DLPack or writable buffers


def as_numpy(array: Any) -> np.ndarray:
    """A NumPy view of an array in host memory; lists of numbers become arrays.

    Raises InvalidArgument for one on a device, TypeError, ValueError or BufferError for what is no array.
    """
    if isinstance(array, np.ndarray):
        return array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_tensor(array.detach(), torch)
    if hasattr(array, "__dlpack_device__"):
        _check_on_host(*array.__dlpack_device__())
        if not hasattr(array, "__array__") and not hasattr(array, "__array_interface__"):
            return np.from_dlpack(array)
    return np.asarray(array)


def _of_tensor(tensor, torch) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"on device {tensor.device}, not in host memory: pass tensor.cpu()")
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _check_on_host(device_type: Any, device_id: int) -> None:
    if int(device_type) not in _HOST_DEVICES:
        device = f"DLPack type {int(device_type)}, number {device_id}"
        raise InvalidArgument(f"on a device ({device}), not in host memory: copy it there first")


def _named_array(array: Any, name: str) -> np.ndarray:
    """as_numpy, whose errors name the argument."""
    try:
        return as_numpy(array)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from error
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise InvalidArgument(f"{name} is not an array: {error}") from error


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def float_array(
    array: Any,
    name: str,
    shape: tuple[int | None, ...],
    meaning: str,
    storage_dtype: np.dtype | None = None,
) -> np.ndarray:
    """`array` as NumPy floats of `shape` (None: any length). Raises InvalidArgument naming `name`.

    storage_dtype: of the model; if that is bfloat16, uint16 are its bits
    """
    found = _named_array(array, name)
    if found.dtype == _UINT16 and storage_dtype == BFLOAT16:
        found = found.view(BFLOAT16)
    if not _is_float(found.dtype):
        wanted = "float16, bfloat16 or float32" + (", or bfloat16's bits" if storage_dtype == BFLOAT16 else "")
        raise InvalidArgument(f"{name} has dtype {found.dtype}, wanted {wanted}")
    if found.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(found.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InvalidArgument(f"{name} has shape {found.shape}, wanted {meaning} = [{wanted}]")
    return found


def output_array(array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A NumPy view of a caller's array, to be written to. Raises InvalidArgument naming `name`.

    dtype: that it has, or uint16 for bfloat16's bits
    """
    if getattr(array, "requires_grad", False):
        raise InvalidArgument(f"{name} requires a gradient, which writing to it would make wrong")
    found = _named_array(array, name)
    if found.dtype == _UINT16 and dtype == BFLOAT16:
        found = found.view(BFLOAT16)
    if found.flags.owndata and not isinstance(array, np.ndarray):
        raise InvalidArgument(f"{name} is not an array whose memory can be written to")
    if found.dtype != dtype:
        raise InvalidArgument(f"{name} has dtype {found.dtype}, wanted {dtype}")
    if found.shape != shape:
        raise InvalidArgument(f"{name} has shape {found.shape}, wanted {shape}")
    if not found.flags.writeable:
        raise InvalidArgument(f"{name} is read-only")
    if not found.flags.c_contiguous:
        raise InvalidArgument(f"{name} is not contiguous in memory, so it cannot be written to in place")
    return found


def output_arrays(
    out: Any, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: np.dtype
) -> list[np.ndarray]:
    """Where results go: views of the caller's arrays, or new ones if `out` is None. Raises InvalidArgument."""
    if out is None:
        return [np.empty(shape, dtype) for shape in shapes]
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise InvalidArgument(f"out is the arrays ({', '.join(names)}), not {type(out).__name__}")
    return [output_array(*facts, dtype) for facts in zip(out, names, shapes, strict=True)]


def give(state: tuple[np.ndarray, np.ndarray], out: Any) -> tuple[Any, Any]:
    """Attention's (out, lse), or the caller's arrays that they were written to. Raises InvalidArgument."""
    if out is None:
        return state
    targets = output_arrays(out, ("out", "lse"), [array.shape for array in state], np.dtype(np.float32))
    for target, array in zip(targets, state, strict=True):
        target[...] = array
    return tuple(out)


def token_id_array(token_ids: Any) -> np.ndarray:
    """uint32 [any number]: token ids of any integer type and shape. Raises InvalidArgument."""
    ids = _named_array(token_ids, "token_ids").reshape(-1)
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
