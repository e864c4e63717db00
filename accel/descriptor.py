"""Reading an attention descriptor: every field checked before anything is done with it.

A descriptor comes from outside the drive, so whatever it holds must end in a status code.
"""

from dataclasses import dataclass

import numpy as np

from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import (
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    DTYPE_NAME,
    EXPLICIT_RANGES,
    GROUP_EXTENT,
    ITEM_SIZE,
    TOKEN_RANGE,
    KvDtype,
    answer_bytes,
    pages_per_head,
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


@dataclass(frozen=True)
class AttentionWork:
    """A checked descriptor.

    items: ATTENTION_ITEM [num_items]; extents: GROUP_EXTENT [num_extents]
    queries: float32 [num_items, num_queries, num_query_heads, head_dim]
    visible_start, visible_stop: int64 [num_items, num_queries]
    """

    layer: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    dtype: KvDtype
    scale: float
    group_tokens: int
    group_lbas: int
    layer_lbas: int
    tokens_per_page: int
    pages_per_head: int
    items: np.ndarray
    extents: np.ndarray
    queries: np.ndarray
    visible_start: np.ndarray
    visible_stop: np.ndarray

    @property
    def num_queries(self) -> int:
        return self.queries.shape[1]

    @property
    def num_query_heads(self) -> int:
        return self.queries.shape[2]

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAME[self.dtype]

    @property
    def answer_bytes(self) -> int:
        return answer_bytes(len(self.items), self.num_queries, self.num_query_heads, self.head_dim)


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


def parse(data: np.ndarray, page_size: int, num_lbas: int) -> AttentionWork:
    """Check a descriptor's bytes. Raises CommandFailed(INVALID_DESCRIPTOR) naming the field at fault."""
    _demand(data.nbytes >= ATTENTION_HEADER.itemsize, "shorter than its header")
    header = data[: ATTENTION_HEADER.itemsize].view(ATTENTION_HEADER)[0]
    _demand(header["magic"] == ATTENTION_MAGIC, "magic")
    _demand(header["version"] == ATTENTION_VERSION, "version")
    _demand(int(header["flags"]) | EXPLICIT_RANGES == EXPLICIT_RANGES, "flags")
    _demand(header["dtype"] in DTYPE_NAME, "dtype")
    _demand(header["query_dtype"] in DTYPE_NAME, "query_dtype")
    dtype, query_dtype = KvDtype(header["dtype"]), KvDtype(header["query_dtype"])
    num_items, num_extents, num_queries, num_kv_heads, group_size, head_dim, num_layers, layer, group_tokens = (
        int(header[name])
        for name in (
            "num_items",
            "num_extents",
            "num_queries",
            "num_kv_heads",
            "group_size",
            "head_dim",
            "num_layers",
            "layer",
            "group_tokens",
        )
    )
    _demand(1 <= num_items <= MAX_ITEMS, "num_items")
    _demand(1 <= num_queries <= MAX_QUERIES, "num_queries")
    _demand(num_kv_heads >= 1, "num_kv_heads")
    _demand(1 <= group_size <= MAX_GROUP_SIZE, "group_size")
    _demand(HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX and head_dim % HEAD_DIM_STEP == 0, "head_dim")
    _demand(layer < num_layers, "layer")
    _demand(1 <= group_tokens <= MAX_GROUP_TOKENS and group_tokens & (group_tokens - 1) == 0, "group_tokens")
    _demand(bool(np.isfinite(header["scale"])), "scale")
    _demand(not any(header["reserved"].tobytes()) and header["reserved0"] == 0, "reserved")

    offset = ATTENTION_HEADER.itemsize
    ranges_count = num_items * num_queries if header["flags"] & EXPLICIT_RANGES else 0
    tables = num_items * ATTENTION_ITEM.itemsize + num_extents * GROUP_EXTENT.itemsize
    tables += ranges_count * TOKEN_RANGE.itemsize
    query_shape = (num_items, num_queries, num_kv_heads * group_size, head_dim)
    query_bytes = int(np.prod(query_shape)) * ITEM_SIZE[query_dtype]
    start = int(header["queries_offset"])
    _demand(start % 4 == 0 and offset + tables <= start, "queries_offset")
    _demand(start + query_bytes <= data.nbytes, "shorter than its tables and queries")

    def table(record: np.dtype, count: int) -> np.ndarray:
        nonlocal offset
        view = data[offset : offset + count * record.itemsize].view(record)
        offset += count * record.itemsize
        return view.copy()  # the host may reuse its buffer once the command completes

    items, extents, ranges = (
        table(ATTENTION_ITEM, num_items),
        table(GROUP_EXTENT, num_extents),
        table(TOKEN_RANGE, ranges_count),
    )
    per_head = pages_per_head(page_size, head_dim, dtype, group_tokens)
    layer_lbas = num_kv_heads * 2 * per_head
    group_lbas = num_layers * layer_lbas
    _check_extents(items, extents, group_tokens, group_lbas, num_lbas)
    visible_start, visible_stop = _visibility(items, ranges, num_queries)
    # a copy for the same reason as the tables
    queries = widen(data[start : start + query_bytes].copy(), query_dtype).reshape(query_shape)
    return AttentionWork(
        layer=layer,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
        scale=float(header["scale"]),
        group_tokens=group_tokens,
        group_lbas=group_lbas,
        layer_lbas=layer_lbas,
        tokens_per_page=tokens_per_page(page_size, head_dim, dtype),
        pages_per_head=per_head,
        items=items,
        extents=extents,
        queries=queries,
        visible_start=visible_start,
        visible_stop=visible_stop,
    )


def _check_extents(items, extents, group_tokens: int, group_lbas: int, num_lbas: int) -> None:
    base, groups = extents["base_lba"], extents["num_groups"].astype(np.uint64)
    _demand(bool((groups >= 1).all()), "extent num_groups")
    _demand(bool((base < num_lbas).all()), "extent base_lba")
    # base < num_lbas holds, so the right side cannot wrap
    _demand(
        bool((groups <= (np.uint64(num_lbas) - base) // np.uint64(group_lbas)).all()), "extent beyond the drive"
    )
    first, count = items["first_extent"].astype(np.int64), items["num_extents"].astype(np.int64)
    _demand(bool((first + count <= len(extents)).all()), "item extents")
    held = np.concatenate([[0], np.cumsum(extents["num_groups"], dtype=np.int64)])
    last_group = items["first_group"] + held[first + count] - held[first]
    _demand(
        bool((items["num_tokens"] <= last_group * group_tokens).all()), "item num_tokens beyond its extents"
    )
    _demand(bool((items["causal"] <= 1).all()), "item causal")


def _visibility(items, ranges, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Visible positions of every query: int64 [num_items, num_queries] start and stop."""
    limit = items["num_tokens"].astype(np.int64)[:, None]
    if len(ranges):
        ranges = ranges.reshape(len(items), num_queries)
        start, stop = ranges["start"].astype(np.int64), ranges["stop"].astype(np.int64)
    else:
        behind = np.arange(num_queries - 1, -1, -1, dtype=np.int64)
        stop = (
            items["token_stop"].astype(np.int64)[:, None] - items["causal"].astype(np.int64)[:, None] * behind
        )
        start = np.broadcast_to(items["token_start"].astype(np.int64)[:, None], stop.shape)
    window = items["window"].astype(np.int64)[:, None]
    start = np.where(window > 0, np.maximum(start, stop - window), start)
    # a group before the first extent's was not named, so it is not there to be read
    return np.maximum(start, 0), np.minimum(stop, limit)
