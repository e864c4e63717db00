"""Where what lies in the pages of one head's segment. FORMAT.md draws it."""

from dataclasses import dataclass

import numpy as np

from spdk_glue.derived_layout import MEAN_TOKENS, SKETCH_HEADER_BYTES, DerivedLayout

SKETCH_MAGIC = 0x4B53564B  # "KVSK"
SKETCH_VERSION = 1
TOKEN_ORDER_VERSION = 2  # that of a sketch which has its tokens in an order of its own
MAX_ORDERED_UNITS = 16  # a token's is 4 bits

SKETCH_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("head_dim", "<u2"),
        ("num_tokens", "<u4"),
        ("page_size", "<u4"),
        # a token's scale is 2 ** (lowest + step * its scale code)
        ("key_lowest", "<f4"),
        ("key_step", "<f4"),
        ("value_lowest", "<f4"),
        ("value_step", "<f4"),
        ("reserved", "V96"),
    ]
)
assert SKETCH_HEADER.itemsize == SKETCH_HEADER_BYTES
LOG_SCALE_MIN, LOG_SCALE_MAX = -100.0, 60.0  # base 2; what a header may say
LOG_SCALE_OCTAVES = 24.0  # at most, from the smallest scale to the largest: what is smaller gets the smallest
LARGEST = 2.0**48  # of an element that can be sketched: its square, and sums of these, are finite
MEAN_MAX = 65504.0  # the largest float16


@dataclass(frozen=True)
class IndexOffsets:
    """Bytes from the start of a head's index pages, which are one stream."""

    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    key_means: int
    value_means: int
    token_order: int
    end: int


def index_offsets(num_tokens: int, head_dim: int) -> IndexOffsets:
    codes = num_tokens * head_dim // 4
    means = -(-num_tokens // MEAN_TOKENS) * head_dim * 2
    offsets = [SKETCH_HEADER_BYTES]
    for size in (codes, codes, num_tokens, num_tokens, means, means, (num_tokens + 1) // 2):
        offsets.append(offsets[-1] + size)
    return IndexOffsets(*offsets)


def has_token_order(layout: DerivedLayout) -> bool:
    """Whether the index pages have room for one."""
    end = index_offsets(layout.num_tokens, layout.head_dim).end
    return 1 < layout.refinement_pages <= MAX_ORDERED_UNITS and end <= layout.index_pages * layout.page_size


def new_header(layout: DerivedLayout) -> np.ndarray:
    """SKETCH_HEADER of a layout, scales yet to be filled in."""
    header = np.zeros((), SKETCH_HEADER)
    header["magic"] = SKETCH_MAGIC
    header["version"] = TOKEN_ORDER_VERSION if has_token_order(layout) else SKETCH_VERSION
    header["head_dim"], header["num_tokens"] = layout.head_dim, layout.num_tokens
    header["page_size"] = layout.page_size
    return header


def header_fault(header: np.ndarray, layout: DerivedLayout) -> str:
    """What is wrong with a SKETCH_HEADER; empty if it is of this layout."""
    expected = (SKETCH_MAGIC, layout.head_dim, layout.num_tokens, layout.page_size)
    for name, value in zip(("magic", "head_dim", "num_tokens", "page_size"), expected, strict=True):
        if header[name] != value:
            return f"{name} is {header[name]}, not {value}"
    version = header["version"]
    if version != SKETCH_VERSION and not (version == TOKEN_ORDER_VERSION and has_token_order(layout)):
        return f"version is {version}"
    for lowest, step in (("key_lowest", "key_step"), ("value_lowest", "value_step")):
        low, width = float(header[lowest]), float(header[step])
        if not (low >= LOG_SCALE_MIN and width >= 0 and low + 255 * width <= LOG_SCALE_MAX):
            return f"scales from 2**{low} in steps of 2**{width}"
    return ""
