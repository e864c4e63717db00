"""The numba worker: one pass over K and V, several query heads at a time, no GIL.

Pages are taken in blocks that fit the first-level cache. For each block, query and set of heads: scores
by `score_tokens`, online softmax by `softmax_block`, weighted sums by `add_weighted_rows`. One function
is compiled per (dtype, head_dim, heads) on first use and kept in numba's on-disk cache.
"""

import threading
from functools import cache

import llvmlite.binding
import numpy as np
from numba import njit

from accel.workers import AttentionBatch
from accel.workers.vector_ir import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ITEM_SIZE,
    add_weighted_rows,
    prefetch,
    score_tokens,
    softmax_block,
)

name = "numba"

_DTYPE = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}
HEADS_MAX = 8  # query heads worked on together: their accumulators fill the register file
BLOCK_TOKENS = 64  # at head_dim 128, fp16: 16 KiB of K, then 16 KiB of V
VECTOR_REGISTERS = 16  # of AVX2; AVX-512 and NEON have 32
CACHE_LINE = 64
_compiling = threading.Lock()


@cache
def _lanes(head_dim: int) -> int:
    """Floats per vector: 16 where the CPU has 512-bit registers and head_dim divides, else 8."""
    features = llvmlite.binding.get_host_cpu_features()
    return 16 if features.get("avx512f") and head_dim % 16 == 0 else 8


def _chunks_together(head_dim: int, heads: int, lanes: int) -> int:
    """Vectors of head_dim accumulated together, so that accumulators and operands fit the registers."""
    num_chunks = head_dim // lanes
    limit = max(1, min(8, (VECTOR_REGISTERS - 2) // heads))
    return max(chunks for chunks in range(1, limit + 1) if num_chunks % chunks == 0)


def heads_together(group_size: int) -> int:
    """Heads per pass over a block: the whole group, or near-equal parts of at most HEADS_MAX."""
    num_sets = -(-group_size // HEADS_MAX)
    return -(-group_size // num_sets)


@cache
def _kernel(dtype: int, head_dim: int, heads: int, lanes: int):
    stride = 1 << (heads - 1).bit_length()
    tokens = lanes // stride
    chunks = _chunks_together(head_dim, heads, lanes)
    num_chunks = head_dim // lanes
    row_bytes = head_dim * ITEM_SIZE[dtype]
    item_bytes = ITEM_SIZE[dtype]

    # Everything above enters the function as a constant; numba's cache is keyed by these integers.
    @njit(nogil=True, cache=True, boundscheck=False)
    def attend(
        key_pages,
        value_pages,
        page_first_token,
        page_num_tokens,
        unit_first_page,
        unit_item,
        unit_kv_head,
        queries,
        visible_start,
        visible_stop,
        first_unit,
        last_unit,
        num_heads,
        scratch,
        block_tokens,
        out,
        lse,
    ):
        # queries: scaled, [num_items, num_queries, num_kv_heads, num_sets * heads, head_dim], padded
        # heads zero. scratch: float32, aligned, holding the state below for all queries and sets.
        num_queries = queries.shape[1]
        num_sets = queries.shape[3] // heads
        scores_at = np.int64(scratch.ctypes.data)
        states_at = scores_at + 4 * (block_tokens + tokens) * stride + 4 * lanes
        state_floats = 3 * lanes + heads * head_dim  # top, total, correction, sums
        states_offset = (states_at - scores_at) // 4
        for unit in range(first_unit, last_unit):
            item = unit_item[unit]
            kv_head = unit_kv_head[unit]
            for state in range(num_queries * num_sets):
                base = states_offset + state * state_floats
                for lane in range(lanes):
                    scratch[base + lane] = -np.inf
                for place in range(lanes, state_floats):
                    scratch[base + place] = 0.0
            first_page = unit_first_page[unit]
            stop_page = unit_first_page[unit + 1]
            page = first_page
            while page < stop_page:
                block_stop = page
                filled = 0
                while block_stop < stop_page and (
                    filled == 0 or filled + page_num_tokens[block_stop] <= block_tokens
                ):
                    filled += page_num_tokens[block_stop]
                    block_stop += 1
                for query in range(num_queries):
                    start = visible_start[item, query]
                    stop = visible_stop[item, query]
                    for head_set in range(num_sets):
                        query_at = np.int64(
                            queries[item, query, kv_head, head_set * heads :].ctypes.data
                        )
                        base = states_offset + (query * num_sets + head_set) * state_floats
                        state_at = scores_at + 4 * base
                        # scores of what this query sees of the block
                        count = 0
                        for block_page in range(page, block_stop):
                            low = max(start - page_first_token[block_page], 0)
                            high = min(
                                stop - page_first_token[block_page], np.int64(page_num_tokens[block_page])
                            )
                            row = low
                            key_at = np.int64(key_pages[block_page])
                            value_at = np.int64(value_pages[block_page])
                            while row + tokens <= high:
                                if query == 0 and head_set == 0:
                                    # V of these tokens comes while their scores are computed
                                    for line in range(
                                        row * row_bytes, (row + tokens) * row_bytes, CACHE_LINE
                                    ):
                                        prefetch(value_at + line)
                                score_tokens(
                                    key_at + row * row_bytes,
                                    query_at,
                                    scores_at + 4 * count * stride,
                                    dtype,
                                    head_dim,
                                    heads,
                                    stride,
                                    tokens,
                                    lanes,
                                )
                                row += tokens
                                count += tokens
                            while row < high:
                                score_tokens(
                                    key_at + row * row_bytes,
                                    query_at,
                                    scores_at + 4 * count * stride,
                                    dtype,
                                    head_dim,
                                    heads,
                                    stride,
                                    1,
                                    lanes,
                                )
                                row += 1
                                count += 1
                        if count == 0:
                            continue
                        num_vectors = (count * stride + lanes - 1) // lanes
                        for place in range(count * stride, num_vectors * lanes):
                            scratch[place] = -np.inf
                        softmax_block(
                            scores_at,
                            num_vectors,
                            state_at,
                            state_at + 4 * lanes,
                            state_at + 8 * lanes,
                            stride,
                            lanes,
                        )
                        for head in range(heads):
                            factor = scratch[base + 2 * lanes + head]
                            if factor != 1.0:
                                sums = base + 3 * lanes + head * head_dim
                                for column in range(head_dim):
                                    scratch[sums + column] *= factor
                        for chunk in range(0, num_chunks, chunks):
                            seen = 0
                            for block_page in range(page, block_stop):
                                low = max(start - page_first_token[block_page], 0)
                                high = min(
                                    stop - page_first_token[block_page], np.int64(page_num_tokens[block_page])
                                )
                                if low >= high:
                                    continue
                                add_weighted_rows(
                                    np.int64(value_pages[block_page])
                                    + low * row_bytes
                                    + chunk * lanes * item_bytes,
                                    scores_at + 4 * seen * stride,
                                    state_at + 12 * lanes + 4 * chunk * lanes,
                                    high - low,
                                    dtype,
                                    head_dim,
                                    heads,
                                    stride,
                                    chunks,
                                    lanes,
                                )
                                seen += high - low
                page = block_stop
            for query in range(num_queries):
                for head in range(num_heads):
                    head_set = head // heads
                    member = head - head_set * heads
                    base = states_offset + (query * num_sets + head_set) * state_floats
                    total = np.float32(0.0)
                    for lane in range(member, lanes, stride):
                        total += scratch[base + lanes + lane]
                    sums = base + 3 * lanes + member * head_dim
                    if total == 0.0:
                        lse[unit, query, head] = -np.inf
                        for column in range(head_dim):
                            out[unit, query, head, column] = 0.0
                    else:
                        lse[unit, query, head] = scratch[base + member] + np.log(total)
                        inverse = np.float32(1.0) / total
                        for column in range(head_dim):
                            out[unit, query, head, column] = scratch[sums + column] * inverse

    return attend


def _padded_queries(batch: AttentionBatch, heads: int) -> np.ndarray:
    """Scaled queries, float32 [num_items, num_queries, num_kv_heads, num_sets * heads, head_dim]."""
    num_items, num_queries, num_query_heads, head_dim = batch.queries.shape
    num_kv_heads = num_query_heads // batch.group_size
    grouped = batch.queries.reshape(num_items, num_queries, num_kv_heads, batch.group_size, head_dim)
    padded_heads = -(-batch.group_size // heads) * heads
    queries = np.zeros((num_items, num_queries, num_kv_heads, padded_heads, head_dim), np.float32)
    np.multiply(grouped, np.float32(batch.scale), out=queries[:, :, :, : batch.group_size])
    return queries


def attend_units(
    batch: AttentionBatch, first_unit: int, last_unit: int, out: np.ndarray, lse: np.ndarray
) -> None:
    """See AttentionBatch. Online softmax, arXiv:1805.02867; all arithmetic in float32."""
    lanes = _lanes(batch.head_dim)
    heads = heads_together(batch.group_size)
    with _compiling:  # two threads must not compile the same kernel
        kernel = _kernel(_DTYPE[batch.dtype], batch.head_dim, heads, lanes)
    queries = _padded_queries(batch, heads)
    stride = 1 << (heads - 1).bit_length()
    block_tokens = max(BLOCK_TOKENS, int(batch.page_num_tokens.max(initial=0)))
    num_states = batch.queries.shape[1] * (queries.shape[3] // heads)
    state_floats = 3 * lanes + heads * batch.head_dim
    scratch = np.empty(
        (block_tokens + lanes // stride) * stride + lanes + num_states * state_floats, np.float32
    )
    kernel(
        batch.key_pages,
        batch.value_pages,
        batch.page_first_token,
        batch.page_num_tokens,
        batch.unit_first_page,
        batch.unit_item,
        batch.unit_kv_head,
        queries,
        batch.visible_start,
        batch.visible_stop,
        first_unit,
        last_unit,
        batch.group_size,
        scratch,
        block_tokens,
        out,
        lse,
    )
