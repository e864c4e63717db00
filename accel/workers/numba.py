"""The numba worker: one pass over K and V for all query heads of a KV head, without the GIL.

A unit's visible rows are taken in blocks that fit the first-level cache, as lists of row addresses. For
each block and query: `score_block`, `softmax_block`, `add_block` (see micro_kernels). The scores of a block
are computed while its rows of V come from memory, the sums while the next block's rows of K do.

One function is compiled per (dtype, head_dim, group_size) on first use, and kept in numba's on-disk cache,
which also knows the CPU. Source of the online softmax: arXiv:1805.02867.
"""

import logging
import math
import threading
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from accel.workers import (
    AttentionBatch,
    BadScales,
    UnitRange,
    check_shape,
    micro_kernels,
    unit_range,
    vector_ir,
)
from accel.workers.micro_kernels import (
    add_block,
    align_frame,
    cap_scores,
    fill_rows,
    load_pairs,
    scale_queries,
    scales_hold,
    score_block,
    score_stride,
    softmax_block,
)
from accel.workers.target import Target, host_target
from accel.workers.unit_range import take_unit
from accel.workers.vector_ir import ITEM_BITS, QUANTIZED
from spdk_glue.vendor_command import DTYPE_OF_NAME

log = logging.getLogger(__name__)

name = "numba"

_DTYPE = {name: int(dtype) for name, dtype in DTYPE_OF_NAME.items()}
# Bytes of K in a block, and as many of V. Several queries find both in a first-level cache of 32 KiB; one query
# reads each once, and gains from longer runs. (tools/bench/kernel.py)
BLOCK_BYTES, BLOCK_BYTES_ONE_QUERY = 12 << 10, 24 << 10
BLOCK_TOKENS_MIN, BLOCK_TOKENS_MAX = 12, 96
LANES_MAX = 16
NO_UNIT = NO_PAGE = -1
PAD = 8  # rows and scores behind a block that whole tiles touch
# numba's cache notices changes of this file only; the emitters' sources enter each function as a constant
_EMITTERS = zlib.crc32(
    b"".join(Path(module.__file__).read_bytes() for module in (micro_kernels, unit_range, vector_ir))
)
_compiling = threading.Lock()


def block_tokens(dtype: str, head_dim: int, num_queries: int) -> int:
    """Rows per block: a multiple of 12, which tiles of 3, 4 and 6 tokens divide."""
    size = BLOCK_BYTES_ONE_QUERY if num_queries == 1 else BLOCK_BYTES
    rows = 8 * size // (head_dim * ITEM_BITS[_DTYPE[dtype]])
    return min(max(rows, BLOCK_TOKENS_MIN), BLOCK_TOKENS_MAX) // 12 * 12


@njit(nogil=True, cache=True, boundscheck=False)
def _take_rows(
    key_pages, value_pages, page_first_token, page_first_row, page_num_tokens,
    page, row, stop_page, start, stop, row_bytes, limit, lists_at, list_bytes, of_one_page,
):  # fmt: skip
    """Lists the next rows that lie in [start, stop), at most `limit`: addresses of K and V, positions.

    lists_at: address of int64 [3, limit + PAD]; what is behind the rows names the last one again.
    Returns (page, row) behind them, their number, the range of their positions, and the last row's page.
    """
    count = 0
    last_page = page
    lowest, highest = np.int64(np.iinfo(np.int64).max), np.int64(-1)
    key = value = np.int64(0)
    while page < stop_page and count < (1 if of_one_page else limit):
        origin = page_first_token[page]
        first = max(np.int64(row), start - origin)
        if len(page_first_row):
            first = max(first, np.int64(page_first_row[page]))
        behind = min(np.int64(page_num_tokens[page]), stop - origin)
        num = min(behind - first, limit - count)
        if num > 0:
            key = np.int64(key_pages[page]) + first * row_bytes
            value = np.int64(value_pages[page]) + first * row_bytes
            target = lists_at + 8 * count
            fill_rows(target, key, row_bytes, num)
            fill_rows(target + list_bytes, value, row_bytes, num)
            fill_rows(target + 2 * list_bytes, origin + first, np.int64(1), num)
            lowest = min(lowest, origin + first)
            highest = max(highest, origin + first + num - 1)
            key += (num - 1) * row_bytes
            value += (num - 1) * row_bytes
            count += num
            last_page = page
        if first + max(num, 0) >= behind:
            page += 1
            row = np.int64(0)
        else:
            row = first + num
    fill_rows(lists_at + 8 * count, key, np.int64(0), np.int64(PAD))
    fill_rows(lists_at + list_bytes + 8 * count, value, np.int64(0), np.int64(PAD))
    return page, row, count, lowest, highest, last_page


@njit(nogil=True, cache=True, boundscheck=False)
def _seen_by_any(visible_start, visible_stop, item):
    """The range that holds all ranges of an item's queries; empty if they are."""
    start, stop = np.int64(np.iinfo(np.int64).max), np.int64(0)
    for query in range(visible_start.shape[1]):
        if visible_start[item, query] < visible_stop[item, query]:
            start = min(start, visible_start[item, query])
            stop = max(stop, visible_stop[item, query])
    return start, stop


@njit(nogil=True, cache=True, boundscheck=False)
def _select_rows(source, start, stop, count, target):
    """Copy a block's lists, keeping positions in [start, stop); returns how many there are."""
    kept = 0
    for i in range(count):
        if start <= source[2, i] < stop:
            for part in range(3):
                target[part, kept] = source[part, i]
            kept += 1
    if kept:
        for i in range(kept, target.shape[1]):
            target[0, i] = target[0, kept - 1]
            target[1, i] = target[1, kept - 1]
    return kept


@njit(nogil=True, cache=True, boundscheck=False)
def _channel(column, pair, lanes):
    """The channel of K and V that stands at `column` of queries and sums; see load_pairs.

    pair: 2 * lanes or 1.
    """
    if pair == 1:
        return column
    place = column % pair
    return column - place + (2 * place if place < lanes else 2 * (place - lanes) + 1)


@njit(nogil=True, cache=True, boundscheck=False)
def _add_distance_bias(scores, positions, count, position, slopes, first_head, heads, stride):
    """scores[t, head] -= slope of the head * log2 e * distance between the query and token t."""
    for t in range(count):
        distance = np.float32(position - positions[t]) * np.float32(1.4426950408889634)
        for head in range(heads):
            scores[t * stride + head] -= slopes[first_head + head] * distance


@cache
def _kernel(dtype: int, head_dim: int, heads: int, lanes: int, accumulators: int, converts_half: int):
    """The compiled function for one Shape. The integers it closes over are its key in numba's cache."""
    row_bytes = head_dim * ITEM_BITS[dtype] // 8
    is_quantized = dtype in QUANTIZED
    width = max(score_stride(heads), lanes)
    stride = score_stride(heads)
    state_floats = 3 * width + heads * head_dim
    emitters = _EMITTERS
    pair = 2 * lanes if load_pairs(dtype, head_dim, lanes) else 1
    log2_e = np.float32(math.log2(math.e))
    ln_2 = math.log(2)

    @njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
    def attend(
        key_pages, value_pages, page_first_token, page_first_row, page_num_tokens,
        unit_first_page, unit_item, unit_kv_head, queries, visible_start, visible_stop,
        scale, softcap, slopes, query_position, scales_offset,
        next_unit, stop_unit, rows, scratch, out, lse,
    ):  # fmt: skip
        # rows: int64 [3 blocks, 3 lists, block + PAD]: the block at work, the next one, a query's selection.
        # scratch: float32; scores of a block, then per query its scaled heads and its state: top, total and
        # factor [width], sums [heads, head_dim]; then a query's heads scaled for a quantized page.
        # Returns NO_PAGE, or twice the index of the page with bad scales, plus 1 if they are of values.
        emitters  # noqa: B018 - makes it part of the key
        align_frame()
        num_queries = queries.shape[1]
        list_bytes = 8 * rows.shape[2]
        limit = rows.shape[2] - PAD
        rows_at = np.int64(rows.ctypes.data)
        scores_at = np.int64(scratch.ctypes.data)
        query_floats = heads * head_dim
        queries_from = (limit + PAD) * stride + 2 * width
        states_from = queries_from + num_queries * query_floats
        scaled_at = scores_at + 4 * (states_from + num_queries * state_floats)
        key_scales = value_scales = np.int64(0)
        taken = np.int64(0)
        page, row, count, lowest, highest = np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        block = np.int64(0)
        start, stop = np.int64(0), np.int64(0)
        unit, following = NO_UNIT, NO_UNIT
        while True:
            if unit != NO_UNIT:
                item = unit_item[unit]
                first_head = unit_kv_head[unit] * heads
                for query in range(num_queries):
                    place = queries_from + query * query_floats
                    for head in range(heads):
                        for column in range(head_dim):
                            scratch[place + head * head_dim + column] = (
                                queries[item, query, first_head + head, _channel(column, pair, lanes)]
                                * scale
                                * log2_e
                            )
                    place = states_from + query * state_floats
                    scratch[place : place + width] = -np.inf
                    scratch[place + width : place + state_floats] = 0
            ended = False
            while not ended:
                # the block after this one: of this unit, else of the next
                next_at = rows_at + 3 * list_bytes * (1 - block)
                next_count = np.int64(0)
                if count > 0:
                    page, row, next_count, next_lowest, next_highest, next_taken = _take_rows(
                        key_pages, value_pages, page_first_token, page_first_row, page_num_tokens,
                        page, row, unit_first_page[unit + 1], start, stop, np.int64(row_bytes), limit,
                        next_at, list_bytes, is_quantized,
                    )  # fmt: skip
                ended = next_count == 0
                if ended:
                    following = take_unit(next_unit)
                    if following < stop_unit:
                        start, stop = _seen_by_any(visible_start, visible_stop, unit_item[following])
                        page, row, next_count, next_lowest, next_highest, next_taken = _take_rows(
                            key_pages, value_pages, page_first_token, page_first_row, page_num_tokens,
                            unit_first_page[following], np.int64(0), unit_first_page[following + 1],
                            start, stop, np.int64(row_bytes), limit, next_at, list_bytes, is_quantized,
                        )  # fmt: skip
                block_at = rows_at + 3 * list_bytes * block
                values_ahead = block_at + list_bytes
                keys_ahead = next_at if next_count else block_at
                if is_quantized and count:
                    key_scales = np.int64(key_pages[taken]) + scales_offset
                    value_scales = np.int64(value_pages[taken]) + scales_offset
                    if not scales_hold(key_scales, dtype, head_dim, heads, lanes, accumulators, converts_half):
                        return 2 * taken
                    if not scales_hold(
                        value_scales, dtype, head_dim, heads, lanes, accumulators, converts_half
                    ):
                        return 2 * taken + 1
                for query in range(num_queries if count else 0):
                    lists_at = block_at
                    kept = count
                    low, high = visible_start[item, query], visible_stop[item, query]
                    if high <= lowest or highest < low:
                        continue
                    if lowest < low or high <= highest:
                        kept = _select_rows(rows[block], low, high, count, rows[2])
                        if kept == 0:
                            continue
                        lists_at = rows_at + 6 * list_bytes
                    state_at = scores_at + 4 * (states_from + query * state_floats)
                    query_at = scores_at + 4 * (queries_from + query * query_floats)
                    if is_quantized:
                        scale_queries(
                            query_at, key_scales, scaled_at,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        query_at = scaled_at
                    score_block(
                        lists_at, values_ahead, kept, query_at, scores_at,
                        dtype, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    if softcap > 0:
                        cap_scores(
                            scores_at, kept, softcap * log2_e,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                    if len(slopes):
                        positions = rows[2, 2] if lists_at != block_at else rows[block, 2]
                        _add_distance_bias(
                            scratch,
                            positions,
                            kept,
                            query_position[item, query],
                            slopes,
                            first_head,
                            heads,
                            stride,
                        )
                    softmax_block(
                        scores_at, kept, state_at, state_at + 4 * width, state_at + 8 * width,
                        dtype, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    add_block(
                        lists_at + list_bytes, keys_ahead, kept, scores_at, state_at + 8 * width,
                        state_at + 12 * width, value_scales,
                        dtype, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    # what is ahead has been asked for: further queries ask for what is there
                    values_ahead = block_at
                    keys_ahead = block_at
                block = 1 - block
                count, lowest, highest, taken = next_count, next_lowest, next_highest, next_taken
            for query in range(num_queries if unit != NO_UNIT else 0):
                place = states_from + query * state_floats
                for head in range(heads):
                    total = np.float32(0.0)
                    for lane in range(head, width, stride):
                        total += scratch[place + width + lane]
                    sums = place + 3 * width + head * head_dim
                    if total == 0.0:
                        lse[unit, query, head] = -np.inf
                        out[unit, query, head, :] = 0.0
                    else:
                        lse[unit, query, head] = ln_2 * scratch[place + head] + np.log(total)
                        inverse = np.float32(1.0) / total
                        for column in range(head_dim):
                            out[unit, query, head, _channel(column, pair, lanes)] = (
                                scratch[sums + column] * inverse
                            )
            if following >= stop_unit:
                return NO_PAGE
            unit = following

    return attend


def _fitting(target: Target, head_dim: int) -> Target:
    """The target with vectors that divide head_dim."""
    if head_dim % target.lanes == 0:
        return target
    return Target(8, target.accumulators, target.converts_half)


def kernel(dtype: str, head_dim: int, group_size: int, target: Target | None = None):
    """The compiled function for a model's shape, compiled or loaded on its first call."""
    fitting = _fitting(target or host_target(), head_dim)
    shape = (fitting.lanes, fitting.accumulators, int(fitting.converts_half))
    with _compiling:  # two threads must not build the same function
        return _kernel(_DTYPE[dtype], head_dim, group_size, *shape)


def attend_units(
    batch: AttentionBatch,
    units: UnitRange,
    out: np.ndarray,
    lse: np.ndarray,
    target: Target | None = None,
) -> None:
    """See AttentionBatch; all arithmetic in float32. target: the machine's own if None (others: for tests)."""
    check_shape(batch.dtype, batch.head_dim, batch.group_size)
    attend = kernel(batch.dtype, batch.head_dim, batch.group_size, target)
    is_first = not attend.overloads
    started = time.perf_counter()
    num_queries = batch.queries.shape[1]
    block = block_tokens(batch.dtype, batch.head_dim, num_queries)
    stride = score_stride(batch.group_size)
    width = max(stride, LANES_MAX)
    rows = np.empty((3, 3, block + PAD), np.int64)
    query_floats = batch.group_size * batch.head_dim
    state_floats = query_floats + 3 * width
    num_floats = (block + PAD) * stride + 2 * width + num_queries * (query_floats + state_floats) + query_floats
    bad_page = attend(
        batch.key_pages,
        batch.value_pages,
        batch.page_first_token,
        batch.page_first_row,
        batch.page_num_tokens,
        batch.unit_first_page,
        batch.unit_item,
        batch.unit_kv_head,
        np.ascontiguousarray(batch.queries),
        batch.visible_start,
        batch.visible_stop,
        np.float32(batch.scale),
        np.float32(batch.softcap),
        batch.alibi_slopes,
        batch.query_position,
        np.int64(batch.scales_offset),
        units.next_unit,
        units.stop_unit,
        rows,
        np.zeros(num_floats, np.float32),
        out,
        lse,
    )
    if is_first and attend.stats.cache_misses:
        log.info(
            "compiled the kernel for %s, head_dim %d, %d query heads a KV head in %.1f s; kept on disk",
            batch.dtype,
            batch.head_dim,
            batch.group_size,
            time.perf_counter() - started,
        )
    if bad_page != NO_PAGE:
        raise BadScales(int(bad_page) // 2, of_values=bool(bad_page % 2))


def prepare(dtype: str, head_dim: int, group_size: int) -> float:
    """Compile, or load from the cache, the kernel of a model ahead of its first command.

    Returns the seconds it took. Raises ValueError for a shape that no kernel takes.
    """
    started = time.perf_counter()
    no_unit = AttentionBatch(
        dtype=dtype,
        head_dim=head_dim,
        group_size=group_size,
        key_pages=np.empty(0, np.uint64),
        value_pages=np.empty(0, np.uint64),
        page_first_token=np.empty(0, np.int64),
        page_num_tokens=np.empty(0, np.int32),
        unit_first_page=np.zeros(1, np.int64),
        unit_item=np.empty(0, np.int32),
        unit_kv_head=np.empty(0, np.int32),
        queries=np.empty((0, 1, group_size, head_dim), np.float32),
        visible_start=np.empty((0, 1), np.int64),
        visible_stop=np.empty((0, 1), np.int64),
        scale=1.0,
    )
    out, lse = np.empty((0, 1, group_size, head_dim), np.float32), np.empty((0, 1, group_size), np.float32)
    attend_units(no_unit, UnitRange(0, 0), out, lse)
    return time.perf_counter() - started
