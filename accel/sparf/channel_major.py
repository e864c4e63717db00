"""Channel-major copies of K: a page (or several) for each channel, and one with the mean of V.

Channel c of all tokens lies in pages [c * n, (c + 1) * n), n = ceil(num_tokens * channel_bytes / page_size),
packed. The last page is MEAN_HEADER and float32 [head_dim], the mean of V over the segment's tokens.
"""

import ml_dtypes
import numpy as np

from accel.sparf import DamagedChannels
from spdk_glue.derived_layout import DerivedLayout, channel_bytes
from spdk_glue.vendor_command import KvDtype

MEAN_MAGIC = 0x4643564B  # "KVCF"
MEAN_VERSION = 1
MEAN_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("head_dim", "<u2"),
        ("num_tokens", "<u4"),
        ("page_size", "<u4"),
        ("dtype", "u1"),  # KvDtype of the channels
        ("reserved", "V15"),
    ]
)
assert MEAN_HEADER.itemsize == 32


def channel_dtype(dtype: KvDtype) -> np.dtype:
    """Of a channel-major copy of pages of `dtype`; quantized ones are copied as float16."""
    return np.dtype({KvDtype.FLOAT32: "<f4", KvDtype.BFLOAT16: ml_dtypes.bfloat16}.get(dtype, "<f2"))


def pages_per_channel(layout: DerivedLayout) -> int:
    return (layout.index_pages - 1) // layout.head_dim


def encode_channel_major(keys: np.ndarray, values: np.ndarray, layout: DerivedLayout) -> np.ndarray:
    """The pages of one head of one layer.

    keys, values: float32 [num_tokens, head_dim]
    Returns uint8 [index_pages, page_size]; slack is zero. Raises ValueError for other shapes, and for
    elements that are not finite, or not so in the copy's dtype.
    """
    expected = (layout.num_tokens, layout.head_dim)
    if keys.shape != expected or values.shape != expected:
        raise ValueError(f"keys {keys.shape} and values {values.shape} are not {expected}")
    stored = channel_dtype(layout.dtype)
    with np.errstate(over="ignore"):
        channels = np.ascontiguousarray(keys.T).astype(stored)
    if not (np.isfinite(channels.astype(np.float32)).all() and np.isfinite(values).all()):
        raise ValueError("keys or values hold an element that is not finite in the copy")
    pages = np.zeros((layout.index_pages, layout.page_size), np.uint8)
    per_channel = pages[:-1].reshape(layout.head_dim, -1)
    per_channel[:, : layout.num_tokens * channel_bytes(layout.dtype)] = channels.view(np.uint8)
    header = np.zeros((), MEAN_HEADER)
    header["magic"], header["version"], header["head_dim"] = MEAN_MAGIC, MEAN_VERSION, layout.head_dim
    header["num_tokens"], header["page_size"] = layout.num_tokens, layout.page_size
    header["dtype"] = layout.dtype
    raw = header.tobytes() + values.mean(axis=0, dtype=np.float64).astype("<f4").tobytes()
    pages[-1, : len(raw)] = np.frombuffer(raw, np.uint8)
    return pages


def mean_of_values(page: np.ndarray, layout: DerivedLayout, segment: int = 0) -> np.ndarray:
    """float32 [head_dim] of the last index page, uint8 [page_size]. Raises DamagedChannels (of `segment`)."""
    header = page[: MEAN_HEADER.itemsize].view(MEAN_HEADER)[0]
    expected = (MEAN_MAGIC, MEAN_VERSION, layout.head_dim, layout.num_tokens, layout.page_size, layout.dtype)
    for name, value in zip(MEAN_HEADER.names, expected, strict=False):
        if header[name] != value:
            raise DamagedChannels(segment, f"{name} is {header[name]}, not {value}")
    mean = page[MEAN_HEADER.itemsize :][: 4 * layout.head_dim].view("<f4").copy()
    if not np.isfinite(mean).all():
        raise DamagedChannels(segment, "the mean of the values is not finite")
    return mean
