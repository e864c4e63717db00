"""Reading an attention descriptor: every field checked before anything is done with it.

A descriptor comes from outside the drive, so whatever it holds must end in a status code. What it holds but for
its layer and its queries is checked apart: layer after layer, and often token after token, it is the same.
"""

import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from accel.sparse_request import SparseRequest, check_parameters, sparse_request
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import (
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    DERIVED_SEGMENT,
    DESCRIPTOR_FLAGS,
    DTYPE_NAME,
    EXPLICIT_RANGES,
    GROUP_EXTENT,
    INT4_CHANNELS,
    LINEAR_BIAS,
    QUANTIZED,
    TOKEN_RANGE,
    KvDtype,
    answer_bytes,
    pages_per_head,
    record_struct,
    row_bytes,
    scale_bytes,
    tokens_per_page,
)

MAX_ITEMS = 4096
MAX_QUERIES = 4096
MAX_GROUP_SIZE = 16
HEAD_DIM_MIN = 32
HEAD_DIM_MAX = 256
HEAD_DIM_STEP = 8
MAX_GROUP_TOKENS = 1 << 16
MAX_TRANSFER_BYTES = 256 << 20
_SLOPE, _POSITION = np.dtype("<f4"), np.dtype("<u4")
_HEADER = record_struct(ATTENTION_HEADER)
_LAYER_AT, _QUERIES_OFFSET_AT = (ATTENTION_HEADER.fields[name][1] for name in ("layer", "queries_offset"))
_LAYER, _QUERIES_OFFSET = struct.Struct("<H"), struct.Struct("<I")
_NO_LAYER = bytes(_LAYER.size)


@dataclass(frozen=True)
class AttentionTables:
    """A checked descriptor but for its layer and queries.

    items: ATTENTION_ITEM [num_items]; extents: GROUP_EXTENT [num_extents]
    visible_start, visible_stop: int64 [num_items, num_queries]
    alibi_slopes: float32 [num_query_heads], query_position: int64 [num_items, num_queries]; empty: no bias
    sparse: how less than all pages are read; None: all are
    """

    num_layers: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    dtype: KvDtype
    query_dtype: KvDtype
    scale: float
    softcap: float
    group_tokens: int
    group_lbas: int
    layer_lbas: int
    tokens_per_page: int
    pages_per_head: int
    scales_offset: int  # in a quantized page
    items: np.ndarray
    extents: np.ndarray
    visible_start: np.ndarray
    visible_stop: np.ndarray
    alibi_slopes: np.ndarray
    query_position: np.ndarray
    sparse: SparseRequest | None

    @cached_property
    def query_shape(self) -> tuple[int, int, int, int]:
        """[num_items, num_queries, num_query_heads, head_dim]"""
        return *self.visible_start.shape, self.num_kv_heads * self.group_size, self.head_dim

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAME[self.dtype]

    @cached_property
    def query_bytes(self) -> int:
        return math.prod(self.query_shape[:3]) * row_bytes(self.head_dim, self.query_dtype)

    @cached_property
    def answer_bytes(self) -> int:
        return answer_bytes(*self.query_shape)


def _demand(condition: bool, detail: str) -> None:
    if not condition:
        raise CommandFailed(Status.INVALID_DESCRIPTOR, detail=detail)


def widen(raw: np.ndarray, dtype: KvDtype) -> np.ndarray:
    """uint8 bytes of `dtype` values as float32."""
    if dtype == KvDtype.FLOAT32:
        return raw.view("<f4")
    if dtype == KvDtype.FLOAT16:
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def split(data: np.ndarray) -> tuple[bytes, int, np.ndarray]:
    """(header and tables with layer 0, the layer, the rest with the queries) of a descriptor's bytes.

    The first is a copy: the host may reuse its buffer. Raises CommandFailed(INVALID_DESCRIPTOR).
    """
    size, raw = data.nbytes, memoryview(data)
    _demand(size >= _HEADER.size, "shorter than its header")
    (start,), (layer,) = (
        _QUERIES_OFFSET.unpack_from(raw, _QUERIES_OFFSET_AT),
        _LAYER.unpack_from(raw, _LAYER_AT),
    )
    _demand(start % 4 == 0 and _HEADER.size <= start <= size, "queries_offset")
    tables = bytearray(raw[:start])
    tables[_LAYER_AT : _LAYER_AT + len(_NO_LAYER)] = _NO_LAYER
    return bytes(tables), layer, data[start:]


def _fields(data) -> dict:
    return dict(zip(ATTENTION_HEADER.names, _HEADER.unpack_from(data), strict=True))


def read_queries(tables: AttentionTables, raw: np.ndarray) -> np.ndarray:
    """float32 [num_items, num_queries, num_query_heads, head_dim], a copy. Raises as `split`."""
    num_bytes = tables.query_bytes
    _demand(num_bytes <= raw.nbytes, "shorter than its queries")
    return widen(raw[:num_bytes].copy(), tables.query_dtype).reshape(tables.query_shape)


def check_tables(data: bytes, page_size: int, num_lbas: int) -> AttentionTables:
    """Check what `split` gives. Raises CommandFailed(INVALID_DESCRIPTOR) naming the field at fault."""
    header, raw = _fields(data), np.frombuffer(data, np.uint8)
    _demand(header["magic"] == ATTENTION_MAGIC, "magic")
    _demand(header["version"] == ATTENTION_VERSION, f"version {header['version']}, not {ATTENTION_VERSION}")
    _demand(not header["flags"] & ~DESCRIPTOR_FLAGS, "flags")
    _demand(header["dtype"] in DTYPE_NAME, "dtype")
    _demand(header["query_dtype"] in DTYPE_NAME, "query_dtype")
    dtype, query_dtype = KvDtype(header["dtype"]), KvDtype(header["query_dtype"])
    _demand(query_dtype not in QUANTIZED, "query_dtype")
    num_items, num_extents, num_queries = header["num_items"], header["num_extents"], header["num_queries"]
    num_kv_heads, group_size, head_dim = header["num_kv_heads"], header["group_size"], header["head_dim"]
    num_layers, group_tokens = header["num_layers"], header["group_tokens"]
    _demand(1 <= num_items <= MAX_ITEMS, "num_items")
    _demand(1 <= num_queries <= MAX_QUERIES, "num_queries")
    _demand(num_layers >= 1, "num_layers")
    _demand(num_kv_heads >= 1, "num_kv_heads")
    _demand(1 <= group_size <= MAX_GROUP_SIZE, "group_size")
    _demand(HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX and head_dim % HEAD_DIM_STEP == 0, "head_dim")
    _demand(dtype != KvDtype.INT4 or head_dim % INT4_CHANNELS == 0, "head_dim of int4")
    _demand(1 <= group_tokens <= MAX_GROUP_TOKENS, "group_tokens")
    _demand(math.isfinite(header["scale"]), "scale")
    _demand(math.isfinite(header["softcap"]) and header["softcap"] >= 0, "softcap")
    check_parameters(header)

    offset = ATTENTION_HEADER.itemsize
    ranges_count = num_items * num_queries if header["flags"] & EXPLICIT_RANGES else 0
    num_segments = header["num_segments"]
    tables = num_items * ATTENTION_ITEM.itemsize + num_extents * GROUP_EXTENT.itemsize
    tables += num_segments * DERIVED_SEGMENT.itemsize
    tables += ranges_count * TOKEN_RANGE.itemsize
    num_heads = num_kv_heads * group_size
    has_bias = bool(header["flags"] & LINEAR_BIAS)
    num_slopes, num_positions = (num_heads, num_items * num_queries) if has_bias else (0, 0)
    tables += num_slopes * _SLOPE.itemsize + num_positions * _POSITION.itemsize
    _demand(offset + tables <= len(data), "queries_offset")

    def table(record: np.dtype, count: int) -> np.ndarray:
        nonlocal offset
        found = raw[offset : offset + count * record.itemsize].view(record)
        offset += count * record.itemsize
        return found

    items, extents = table(ATTENTION_ITEM, num_items), table(GROUP_EXTENT, num_extents)
    segments, ranges = table(DERIVED_SEGMENT, num_segments), table(TOKEN_RANGE, ranges_count)
    slopes, positions = table(_SLOPE, num_slopes), table(_POSITION, num_positions)
    _demand(bool(np.isfinite(slopes).all()), "slopes")
    per_head = pages_per_head(page_size, head_dim, dtype, group_tokens)
    layer_lbas = num_kv_heads * 2 * per_head
    group_lbas = num_layers * layer_lbas
    item_words, range_words = items.view(np.uint32), ranges.view(np.uint32)
    fault = _fault(item_words, extents.view(np.uint64), group_tokens, group_lbas, num_lbas)
    _demand(fault == NO_FAULT, _FAULTS[fault])
    sparse = sparse_request(header, segments, items, extents, page_size, num_lbas)
    visible_start, visible_stop = (np.empty((num_items, num_queries), np.int64) for _ in range(2))
    _visibility(item_words, range_words, visible_start, visible_stop)
    return AttentionTables(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
        query_dtype=query_dtype,
        scale=header["scale"],
        softcap=header["softcap"],
        group_tokens=group_tokens,
        group_lbas=group_lbas,
        layer_lbas=layer_lbas,
        tokens_per_page=tokens_per_page(page_size, head_dim, dtype),
        pages_per_head=per_head,
        scales_offset=page_size - scale_bytes(head_dim, dtype),
        items=items,
        extents=extents,
        visible_start=visible_start,
        visible_stop=visible_stop,
        alibi_slopes=slopes.copy(),  # a read-only array is another type to a kernel, compiled anew
        query_position=positions.astype(np.int64).reshape(-1, num_queries),
        sparse=sparse,
    )


# Records as words, which numba takes at less cost than records: the columns of ATTENTION_ITEM.
_FIRST_EXTENT, _NUM_EXTENTS, _FIRST_GROUP, _NUM_TOKENS, _TOKEN_START, _TOKEN_STOP, _WINDOW, _CAUSAL = range(8)
_ITEM_WORDS = len(ATTENTION_ITEM)

NO_FAULT = 0
_FAULTS = (
    "",
    "extent num_groups",
    "extent base_lba",
    "extent beyond the drive",
    "item extents",
    "item num_tokens beyond its extents",
    "item causal",
)


@njit(cache=True)
def _fault(items, extents, group_tokens, group_lbas, num_lbas):
    """Which of _FAULTS the tables have. items: uint32, _ITEM_WORDS each; extents: uint64, two each."""
    num_extents = len(extents) // 2
    for extent in range(num_extents):
        base, num_groups = extents[2 * extent], np.int64(extents[2 * extent + 1] & np.uint64(0xFFFFFFFF))
        if num_groups < 1:
            return 1
        if base >= np.uint64(num_lbas):
            return 2
        if num_groups > (num_lbas - np.int64(base)) // group_lbas:
            return 3
    for first in range(0, len(items), _ITEM_WORDS):
        item = items[first : first + _ITEM_WORDS]
        first_extent = np.int64(item[_FIRST_EXTENT])
        stop_extent = first_extent + np.int64(item[_NUM_EXTENTS])
        if stop_extent > num_extents:
            return 4
        last_group = np.int64(item[_FIRST_GROUP])
        for extent in range(first_extent, stop_extent):
            last_group += np.int64(extents[2 * extent + 1] & np.uint64(0xFFFFFFFF))
        if np.int64(item[_NUM_TOKENS]) > last_group * group_tokens:
            return 5
        if item[_CAUSAL] > 1:
            return 6
    return NO_FAULT


@njit(cache=True)
def _visibility(items, ranges, starts, stops):
    """Fill the visible positions of every query. ranges: uint32, two per item and query, or empty."""
    num_items, num_queries = starts.shape
    for index in range(num_items):
        item = items[index * _ITEM_WORDS : (index + 1) * _ITEM_WORDS]
        window, limit = np.int64(item[_WINDOW]), np.int64(item[_NUM_TOKENS])
        for query in range(num_queries):
            if len(ranges):
                place = 2 * (index * num_queries + query)
                start, stop = np.int64(ranges[place]), np.int64(ranges[place + 1])
            else:
                start, stop = np.int64(item[_TOKEN_START]), np.int64(item[_TOKEN_STOP])
                if item[_CAUSAL]:
                    stop -= num_queries - 1 - query
            if window > 0:
                start = max(start, stop - window)
            starts[index, query] = start
            stops[index, query] = min(stop, limit)
