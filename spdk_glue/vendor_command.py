"""The vendor commands' records: attention descriptors and answers.

Both sides of the seam speak these, so they are declared here and nowhere else. An ATTENTION_SUBMIT's
data is, in order and without gaps:

    ATTENTION_HEADER
    ATTENTION_ITEM   [num_items]
    GROUP_EXTENT     [num_extents]
    DERIVED_SEGMENT  [num_segments]                  of sparse methods, by item, then by first_group
    TOKEN_RANGE      [num_items, num_queries]        when flags has EXPLICIT_RANGES
    float32          [num_query_heads]               slopes, when flags has LINEAR_BIAS
    uint32           [num_items, num_queries]        positions of the queries, when flags has LINEAR_BIAS
    zero bytes up to header.queries_offset (a multiple of 4)
    queries          query_dtype [num_items, num_queries, num_query_heads, head_dim]

An ATTENTION_FETCH's answer is ANSWER_HEADER, `out` float32 [num_items, num_queries, num_query_heads,
head_dim], `lse` float32 [num_items, num_queries, num_query_heads] (natural log; -inf where a query saw
no token). The true length of an answer comes in CDW0.

Pages of a token group lie `[layer][kv_head][K | V][page]` from the group's base LBA; a page holds
`tokens_per_page` rows of one head from byte 0 on. A quantized page ends with the scales of its channels,
bfloat16 [head_dim], each finite and above zero: an element is its code times its channel's scale. Codes are
float8 e4m3, int8 (-127 to 127), or int4 (-7 to 7, stored plus 8): byte i of 16 holds the codes of channels i
(low half) and 16 + i of 32.
"""

import struct
from enum import IntEnum, IntFlag

import numpy as np

_STRUCT_CODE = {"|u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q", "<f4": "f"}


def record_struct(record: np.dtype) -> struct.Struct:
    """A record's fields for `struct`, which takes a tenth of NumPy's time for a single one."""
    fields = (record[name] for name in record.names)
    codes = (_STRUCT_CODE.get(field.str) or f"{field.itemsize}s" for field in fields)
    return struct.Struct("<" + "".join(codes))


class KvDtype(IntEnum):
    """Storage type of keys, values and queries, little endian."""

    FLOAT16 = 0
    BFLOAT16 = 1
    FLOAT32 = 2
    FLOAT8_E4M3 = 3
    INT8 = 4
    INT4 = 5


ITEM_BITS = {
    KvDtype.FLOAT16: 16,
    KvDtype.BFLOAT16: 16,
    KvDtype.FLOAT32: 32,
    KvDtype.FLOAT8_E4M3: 8,
    KvDtype.INT8: 8,
    KvDtype.INT4: 4,
}
DTYPE_NAME = {dtype: dtype.name.lower() for dtype in KvDtype}
QUANTIZED = {KvDtype.FLOAT8_E4M3, KvDtype.INT8, KvDtype.INT4}  # with scales; queries never are
SCALE_BYTES = 2
INT4_CHANNELS = 32  # head_dim of int4 is a multiple of it
DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPE_NAME.items()}

ATTENTION_MAGIC = 0x5441564B  # "KVAT"
ATTENTION_VERSION = (
    2  # of descriptor and answer, which one host and drive share; 1: an answer's header of 32 bytes
)
EXPLICIT_RANGES = 1  # header flag: a TOKEN_RANGE per item and query follows the extents
LINEAR_BIAS = 2  # header flag: score -= slope of the head * (position of the query - position of the token)
EXACT_IF_CACHED = 4  # header flag of SKETCH: dense instead where all tokens' pages are in the drive's cache
DESCRIPTOR_FLAGS = EXPLICIT_RANGES | LINEAR_BIAS | EXACT_IF_CACHED


class SparseMethod(IntEnum):
    """How a command reads less than all pages."""

    DENSE = 0
    SPARF = 1  # InstInfer's SparF (arXiv:2409.04992), over channel-major copies of K
    SKETCH = 2  # all tokens by their 2-bit codes, those that matter by 6-bit ones


COMPRESSION_MAX = 64.0  # of SKETCH; from 9.5 on nothing but sketches is read
TARGET_ERROR_MAX = 1.0  # of SKETCH: as large as the output

ATTENTION_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("flags", "<u2"),
        ("num_items", "<u4"),
        ("num_extents", "<u4"),
        ("queries_offset", "<u4"),
        ("group_tokens", "<u4"),
        ("num_layers", "<u2"),
        ("layer", "<u2"),
        ("num_kv_heads", "<u2"),
        ("group_size", "<u2"),  # query heads per KV head
        ("head_dim", "<u2"),
        ("num_queries", "<u2"),
        ("dtype", "u1"),  # KvDtype of keys and values
        ("query_dtype", "u1"),  # KvDtype of queries
        ("num_segments", "<u2"),  # of derived data; 0 with the dense method
        ("scale", "<f4"),  # score = scale * q . k
        ("softcap", "<f4"),  # above zero: score = softcap * tanh(score / softcap), before any bias
        ("sparse_method", "u1"),  # SparseMethod; the fields behind it are zero unless it uses them
        ("reserved", "u1"),
        ("channels", "<u2"),  # SPARF: r, channels per query head
        ("tokens", "<u4"),  # SPARF: k, tokens per query head
        ("compression", "<f4"),  # SKETCH: reads at most 4 / (3 * compression) of the dense pages; or 0 and
        ("target_error", "<f4"),  # SKETCH: relative error of the output to be met by reading more; or 0
    ]
)
assert ATTENTION_HEADER.itemsize == 64

ATTENTION_ITEM = np.dtype(
    [
        ("first_extent", "<u4"),
        ("num_extents", "<u4"),
        ("first_group", "<u4"),  # token group that the first extent begins with
        ("num_tokens", "<u4"),  # tokens on flash: what is visible ends there
        ("token_start", "<u4"),  # first visible token
        ("token_stop", "<u4"),  # one past the last token visible to the last query
        ("window", "<u4"),  # a query sees at most so many tokens; 0: no limit
        ("causal", "<u4"),  # 1: query i of n sees n - 1 - i tokens fewer than the last
    ]
)
assert ATTENTION_ITEM.itemsize == 32

GROUP_EXTENT = np.dtype([("base_lba", "<u8"), ("num_groups", "<u4"), ("reserved", "<u4")])
assert GROUP_EXTENT.itemsize == 16

# Derived data of the groups [first_group, first_group + num_groups) of an item; see derived_layout.py
DERIVED_SEGMENT = np.dtype(
    [
        ("base_lba", "<u8"),
        ("item", "<u4"),
        ("first_group", "<u4"),
        ("num_groups", "<u4"),
        ("reserved", "<u4"),
    ]
)
assert DERIVED_SEGMENT.itemsize == 24

TOKEN_RANGE = np.dtype([("start", "<u4"), ("stop", "<u4")])

ANSWER_HEADER = np.dtype(
    [
        ("version", "<u4"),
        ("first_damaged", "<u4"),  # the first damaged segment's place in the descriptor's table; 0 if none is
        ("pages_from_flash", "<u4"),
        ("pages_from_cache", "<u4"),
        ("kernel_ns", "<u8"),  # summed over workers
        ("command_ns", "<u8"),  # from submit to done
        # of a sparse command, pages by what they are, whether they came from flash or from the cache
        ("index_pages", "<u4"),  # channel-major keys, sketches
        ("chosen_pages", "<u4"),  # of chosen tokens: token-major pages, refinements
        ("dense_pages", "<u4"),  # of tokens without derived data, or with damaged one; all by EXACT_IF_CACHED
        ("damaged_segments", "<u4"),  # read dense because their derived data is damaged
    ]
)
assert ANSWER_HEADER.itemsize == 48


# SEAL_GROUPS data: SEAL_HEADER, then GROUP_EXTENT records naming groups that no longer change, then, for what
# is written elsewhere (version SEAL_VERSION), DERIVE_HEADER and uint64 target LBAs, one for each segment. A
# command may name some layers only: bases and targets are then those layers'.
class Derive(IntFlag):
    """What SEAL_GROUPS is to do: one of these."""

    COMPACT = 1  # rewrite the groups' pages so that each layer's are physical neighbours
    CHANNEL_MAJOR_KEYS = 2  # for SparseMethod.SPARF
    SKETCH = 4  # for SparseMethod.SKETCH


COMPACT = Derive.COMPACT
DERIVE_HEADER = np.dtype(
    [
        ("num_kv_heads", "<u4"),
        ("head_dim", "<u2"),
        ("dtype", "u1"),  # KvDtype of the groups' rows
        ("reserved", "u1"),
        ("group_tokens", "<u4"),
        ("groups_per_segment", "<u4"),  # the groups, in their order, cut into segments; the last may be shorter
    ]
)
assert DERIVE_HEADER.itemsize == 16
SEAL_MAGIC = 0x4C53564B  # "KVSL"
SEAL_VERSION_IN_PLACE = 1  # of COMPACT, as it has always been
SEAL_VERSION = 2  # of what is written elsewhere
SEAL_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("derive", "<u2"),  # what to derive; an unknown bit is refused
        ("num_extents", "<u4"),
        ("num_layers", "<u4"),
        ("layer_lbas", "<u4"),  # blocks of one layer within one group
        ("placement_id", "<u4"),
        ("reserved", "V8"),
    ]
)
assert SEAL_HEADER.itemsize == 32


def row_bytes(head_dim: int, dtype: KvDtype) -> int:
    return head_dim * ITEM_BITS[dtype] // 8


def scale_bytes(head_dim: int, dtype: KvDtype) -> int:
    """Of a page's scales, which are its last bytes."""
    return head_dim * SCALE_BYTES if dtype in QUANTIZED else 0


def tokens_per_page(page_size: int, head_dim: int, dtype: KvDtype) -> int:
    return (page_size - scale_bytes(head_dim, dtype)) // row_bytes(head_dim, dtype)


def pages_per_head(page_size: int, head_dim: int, dtype: KvDtype, group_tokens: int) -> int:
    """Pages of one head's K (or V) in one token group."""
    return -(-group_tokens // tokens_per_page(page_size, head_dim, dtype))


def answer_bytes(num_items: int, num_queries: int, num_query_heads: int, head_dim: int) -> int:
    return ANSWER_HEADER.itemsize + 4 * num_items * num_queries * num_query_heads * (head_dim + 1)
