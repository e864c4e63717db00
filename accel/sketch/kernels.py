"""Attention over sketches, in rotated space: what the sparse commands of the drive compute with.

What a unit's codes need is first copied from its index pages into one piece of scratch, so that page borders
concern only the copy. Rows of 2-bit codes are then read by the micro-kernels of the dense worker, as one more
dtype; rows of 6-bit codes, of the few chosen units, are widened to float32 before. Scales of tokens are
multiplied into scores and weights, means go in by themselves. DESIGN.md of accel/workers has blocks and tiles.
"""

import math
import threading
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from accel.sketch import DamagedSketch, SketchBatch, codebook, micro_kernels, token_order
from accel.sketch.codebook import rotate as rotate
from accel.sketch.codebook import unrotate as unrotate
from accel.sketch.format import (
    LOG_SCALE_MAX,
    LOG_SCALE_MIN,
    SKETCH_MAGIC,
    SKETCH_VERSION,
    TOKEN_ORDER_VERSION,
)
from accel.sketch.micro_kernels import (
    LANES_MAX,
    add_noise,
    copy_bytes,
    finish_scores,
    refine_rows,
    scale_weights,
    token_scales,
    widen_halves,
)
from accel.sketch.token_order import read_order, sees_all
from accel.workers import check_shape, vector_ir
from accel.workers import micro_kernels as dense_micro_kernels
from accel.workers.micro_kernels import (
    add_block,
    cap_scores,
    fill_rows,
    score_block,
    score_stride,
    softmax_block,
)
from accel.workers.target import Target, host_target
from accel.workers.unit_range import UnitRange, take_unit
from accel.workers.vector_ir import FLOAT32, ITEM_BITS, SKETCH
from spdk_glue.derived_layout import MEAN_TOKENS, SKETCH_HEADER_BYTES

BLOCK_TOKENS = 96  # rows at work at once: scores and widened rows stay in the first-level caches
NO_SEGMENT = -1
PAD = 16  # tokens behind a block that whole tiles and vectors touch
LINE = 64
_EMITTERS = zlib.crc32(
    b"".join(
        Path(module.__file__).read_bytes()
        for module in (codebook, micro_kernels, token_order, dense_micro_kernels, vector_ir)
    )
)
_compiling = threading.Lock()
_HALF_EXPONENT = np.uint16(0x7C00)  # all ones: infinite or NaN


@njit(nogil=True, cache=True, boundscheck=False)
def gather(pages, first_page, page_size, offset, num_bytes, target):
    """Copies bytes of a segment's index pages, which may lie anywhere, to an address."""
    while num_bytes > 0:
        page, place = divmod(offset, page_size)
        part = min(num_bytes, page_size - place)
        copy_bytes(target, np.int64(pages[first_page + page]) + place, part)
        target += part
        offset += part
        num_bytes -= part


@njit(nogil=True, cache=True, boundscheck=False)
def header_version(header):
    return np.int64(header.view(np.uint16)[2])


@njit(nogil=True, cache=True, boundscheck=False)
def header_holds(header, head_dim, num_tokens, page_size):
    """header: uint8 [SKETCH_HEADER_BYTES]. As format.header_fault."""
    words = header.view(np.uint32)
    if words[0] != SKETCH_MAGIC or words[1] >> 16 != head_dim:
        return False
    if header_version(header) not in (SKETCH_VERSION, TOKEN_ORDER_VERSION):
        return False
    if words[2] != num_tokens or words[3] != page_size:
        return False
    floats = header.view(np.float32)
    for place in (4, 6):
        if not (
            floats[place] >= LOG_SCALE_MIN
            and floats[place + 1] >= 0
            and floats[place] + 255 * floats[place + 1] <= LOG_SCALE_MAX
        ):
            return False
    return True


@njit(nogil=True, cache=True, boundscheck=False)
def all_finite(halves):
    """halves: uint16, the bits of float16"""
    found = np.uint16(0)
    for place in range(len(halves)):
        found |= np.uint16((halves[place] & _HALF_EXPONENT) == _HALF_EXPONENT)
    return found == 0


@njit(nogil=True, cache=True, boundscheck=False)
def _lines_up(num_bytes):
    return -(-num_bytes // LINE) * LINE


@njit(nogil=True, cache=True, boundscheck=False)
def _add_distance_bias(scores, tokens, position, slopes, first_head, heads, stride):
    """scores[t, head] -= slope of the head * log2 e * distance between the query and tokens[t].

    position: of the query, from where the tokens are counted
    """
    for t in range(len(tokens)):
        distance = np.float32(position - tokens[t]) * np.float32(1.4426950408889634)
        for head in range(heads):
            scores[t * stride + head] -= slopes[first_head + head] * distance


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _score_mean(scratch, heads_from, mean_from, scores_from, heads, head_dim, stride, width):
    """What a mean scores with each head of a query, in all of the head's lanes."""
    for head in range(heads):
        score = np.float32(0.0)
        for column in range(head_dim):
            score += scratch[heads_from + head * head_dim + column] * scratch[mean_from + column]
        for lane in range(head, width, stride):
            scratch[scores_from + lane] = score


@njit(nogil=True, cache=True, boundscheck=False)
def _add_mean(scratch, weights_from, mean_from, sums_from, heads, head_dim):
    """The mean of V weighs what the block's tokens weigh."""
    for head in range(heads):
        weight = scratch[weights_from + head]
        for column in range(head_dim):
            scratch[sums_from + head * head_dim + column] += weight * scratch[mean_from + column]


@cache
def _kernel(refined: int, head_dim: int, heads: int, lanes: int, accumulators: int, converts_half: int):
    """The compiled function for one shape. The integers it closes over are its key in numba's cache."""
    emitters = _EMITTERS
    stride = score_stride(heads)
    width = max(stride, LANES_MAX)
    dtype = FLOAT32 if refined else SKETCH
    code_bytes = head_dim // 4
    row_bytes = head_dim * ITEM_BITS[dtype] // 8
    query_floats = heads * head_dim
    # of a query: its scaled heads, deviation of scores and of what is left of it, top, total, factor, what a
    # block adds to the total, noise, sums
    state_floats = 2 * query_floats + 8 * width
    log2_e = np.float32(math.log2(math.e))
    ln_2 = math.log(2)
    variance = codebook.REFINED_DISTORTION if refined else codebook.SCORE_VARIANCE
    distortion = np.float32(codebook.REFINED_DISTORTION if refined else codebook.DISTORTION)
    key_factor = np.float32(1.0 if refined else codebook.KEY_FACTOR)
    deviation_factor = np.float32(math.sqrt(variance * ln_2 / 2) / key_factor)
    one = np.float32(1.0)

    @njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
    def attend(
        index_pages, segment_first_page, segment_first_unit, segment_num_tokens, segment_first_token,
        segment_item, segment_kv_head, chosen, chosen_segment, results, refinement_pages, page_size,
        queries, visible_start, visible_stop, scale, softcap, slopes, query_position,
        next_place, stop_place, image, header, packed, order, rows, scratch, out, lse, noise,
    ):  # fmt: skip
        # image: uint8, what is copied of index pages, from a cache line on.
        # packed: uint8 [(tokens + 1) // 2], order: int64 [tokens], of a segment; filled in where queries do not
        # see it all. Else places stand for tokens.
        # rows: int64 [2, BLOCK_TOKENS + PAD].
        # scratch: float32; scores of a block, scales of its keys and values, rows of it if refined, the means
        # of K and V, what the one scores, then the states of queries.
        # Returns NO_SEGMENT, or the segment whose header or means are damaged.
        emitters  # noqa: B018 - makes it part of the key
        num_queries = queries.shape[1]
        unit_tokens = page_size // head_dim
        rows_at = np.int64(rows.ctypes.data)
        value_rows_at = rows_at + 8 * rows.shape[1]
        scratch_at = np.int64(scratch.ctypes.data)
        scores_at = scratch_at
        key_scales_at = scores_at + 4 * ((BLOCK_TOKENS + PAD) * stride + width)
        value_scales_at = key_scales_at + 4 * (BLOCK_TOKENS + PAD)
        widened_at = value_scales_at + 4 * (BLOCK_TOKENS + PAD)
        means_from = (widened_at - scratch_at) // 4
        if refined:
            means_from += 2 * (BLOCK_TOKENS + PAD) * head_dim
        mean_scores_from = means_from + 2 * head_dim
        mean_scores_at = scratch_at + 4 * mean_scores_from
        states_from = mean_scores_from + width
        while True:
            place = take_unit(next_place)
            if place >= stop_place:
                return NO_SEGMENT
            segment = chosen_segment[place] if refined else place
            first_page = segment_first_page[segment]
            num_tokens = segment_num_tokens[segment]
            unit = chosen[place] if refined else segment_first_unit[segment]
            stop_unit = unit + 1 if refined else segment_first_unit[segment + 1]
            result = results[place] if refined else unit
            first_token = (unit - segment_first_unit[segment]) * unit_tokens
            count = min(num_tokens, (stop_unit - segment_first_unit[segment]) * unit_tokens) - first_token
            first_mean = first_token // MEAN_TOKENS
            num_means = (first_token + count - 1) // MEAN_TOKENS + 1 - first_mean
            all_means = (num_tokens - 1) // MEAN_TOKENS + 1
            # key codes, value codes, key scales, value scales, key means, value means: of these tokens alone
            image_at = (np.int64(image.ctypes.data) + LINE - 1) // LINE * LINE
            keys_at = image_at
            values_at = keys_at + _lines_up((count + PAD) * code_bytes)
            key_codes_at = values_at + _lines_up((count + PAD) * code_bytes)
            value_codes_at = key_codes_at + _lines_up(count + PAD)
            key_means_at = value_codes_at + _lines_up(count + PAD)
            value_means_at = key_means_at + 2 * num_means * head_dim
            offset = np.int64(SKETCH_HEADER_BYTES)
            gather(index_pages, first_page, page_size, np.int64(0), offset, np.int64(header.ctypes.data))
            if not header_holds(header, head_dim, num_tokens, page_size):
                return segment
            gather(
                index_pages,
                first_page,
                page_size,
                offset + first_token * code_bytes,
                count * code_bytes,
                keys_at,
            )
            offset += num_tokens * code_bytes
            gather(
                index_pages,
                first_page,
                page_size,
                offset + first_token * code_bytes,
                count * code_bytes,
                values_at,
            )
            offset += num_tokens * code_bytes
            gather(index_pages, first_page, page_size, offset + first_token, count, key_codes_at)
            offset += num_tokens
            gather(index_pages, first_page, page_size, offset + first_token, count, value_codes_at)
            offset += num_tokens
            mean_bytes = 2 * head_dim
            for at in (key_means_at, value_means_at):
                gather(
                    index_pages,
                    first_page,
                    page_size,
                    offset + first_mean * mean_bytes,
                    num_means * mean_bytes,
                    at,
                )
                offset += all_means * mean_bytes
            means_begin = key_means_at - np.int64(image.ctypes.data)
            if not all_finite(image[means_begin : means_begin + 2 * num_means * mean_bytes].view(np.uint16)):
                return segment
            floats = header.view(np.float32)
            key_base, key_step = np.float32(key_factor * np.exp2(floats[4])), floats[5]
            value_base, value_step = np.float32(np.exp2(floats[6])), floats[7]

            item = segment_item[segment]
            first_position = segment_first_token[segment]
            starts, stops = visible_start[item], visible_stop[item]
            has_order = len(slopes) > 0 or not sees_all(starts, stops, first_position, num_tokens)
            if has_order:
                packed_at = np.int64(packed.ctypes.data)
                if header_version(header) == TOKEN_ORDER_VERSION:
                    packed_bytes = np.int64((num_tokens + 1) // 2)
                    if offset + packed_bytes > (segment_first_page[segment + 1] - first_page) * page_size:
                        return segment
                    gather(index_pages, first_page, page_size, offset, packed_bytes, packed_at)
                if not read_order(header_version(header), packed, num_tokens, unit_tokens, order):
                    return segment
            first_head = segment_kv_head[segment] * heads
            for query in range(num_queries):
                state = states_from + query * state_floats
                for head in range(heads):
                    square = np.float32(0.0)
                    for column in range(head_dim):
                        value = queries[item, query, first_head + head, column] * scale * log2_e
                        scratch[state + head * head_dim + column] = value
                        square += value * value
                    deviation = np.sqrt(square) * deviation_factor
                    for lane in range(head, width, stride):
                        scratch[state + query_floats + lane] = np.float32(0.0) if refined else deviation
                        scratch[state + query_floats + width + lane] = deviation
            begin = np.int64(0)  # of the unit, from first_token on
            while unit < stop_unit:
                unit_stop = min(count, begin + unit_tokens)
                for query in range(num_queries):
                    state = states_from + query * state_floats + query_floats + 2 * width
                    scratch[state : state + width] = -np.inf
                    scratch[state + width : state + 6 * width + query_floats] = 0
                while begin < unit_stop:
                    mean = (first_token + begin) // MEAN_TOKENS - first_mean
                    for part, at in enumerate((key_means_at, value_means_at)):
                        widen_halves(
                            at + mean * mean_bytes, scratch_at + 4 * (means_from + part * head_dim),
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                    mean_stop = (first_mean + mean + 1) * MEAN_TOKENS - first_token
                    stop = min(begin + BLOCK_TOKENS, unit_stop, mean_stop)
                    num = stop - begin
                    token_scales(
                        key_codes_at + begin, num, key_base, key_step, key_scales_at,
                        dtype, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    token_scales(
                        value_codes_at + begin, num, value_base, value_step, value_scales_at,
                        dtype, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    if refined:
                        page = np.int64(refinement_pages[place])
                        half_page = np.int64(unit_tokens * head_dim // 2)
                        for part in range(2):
                            refine_rows(
                                (values_at if part else keys_at) + begin * code_bytes,
                                page + part * half_page + begin * (head_dim // 2),
                                num,
                                widened_at + part * 4 * (BLOCK_TOKENS + PAD) * head_dim,
                                dtype, head_dim, heads, lanes, accumulators, converts_half,
                            )  # fmt: skip
                        fill_rows(rows_at, widened_at, np.int64(row_bytes), num + 8)
                        fill_rows(
                            value_rows_at,
                            widened_at + 4 * (BLOCK_TOKENS + PAD) * head_dim,
                            np.int64(row_bytes),
                            num + 8,
                        )
                    else:
                        fill_rows(rows_at, keys_at + begin * code_bytes, np.int64(row_bytes), num + 8)
                        fill_rows(value_rows_at, values_at + begin * code_bytes, np.int64(row_bytes), num + 8)
                    tokens = order[first_token + begin : first_token + stop]  # ascending
                    for query in range(num_queries):
                        skip, kept = np.int64(0), num
                        if has_order:
                            while skip < num and tokens[skip] < starts[query] - first_position:
                                skip += 1
                            while kept > skip and tokens[kept - 1] >= stops[query] - first_position:
                                kept -= 1
                            kept -= skip
                            if kept == 0:
                                continue
                        state = states_from + query * state_floats
                        state_at = scratch_at + 4 * state
                        deviation_at = state_at + 4 * query_floats
                        top_at = deviation_at + 8 * width
                        total = state + query_floats + 3 * width
                        factor = total + width
                        grown = factor + width
                        noise_at = scratch_at + 4 * (grown + width)
                        sums = grown + 3 * width
                        factor_at = scratch_at + 4 * factor
                        _score_mean(
                            scratch, state, means_from, mean_scores_from, heads, head_dim, stride, width
                        )
                        score_block(
                            rows_at + 8 * skip, rows_at, kept, state_at, scores_at,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        finish_scores(
                            scores_at, kept, key_scales_at + 4 * skip, mean_scores_at, deviation_at,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        if softcap > 0:
                            cap_scores(
                                scores_at, kept, softcap * log2_e,
                                dtype, head_dim, heads, lanes, accumulators, converts_half,
                            )  # fmt: skip
                        if len(slopes):
                            _add_distance_bias(
                                scratch,
                                tokens[skip : skip + kept],
                                query_position[item, query] - first_position,
                                slopes,
                                first_head,
                                heads,
                                stride,
                            )
                        scratch[grown : grown + width] = 0
                        softmax_block(
                            scores_at, kept, top_at, scratch_at + 4 * grown, factor_at,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        if len(noise):
                            add_noise(
                                scores_at, kept, key_scales_at + 4 * skip, value_scales_at + 4 * skip,
                                deviation_at + 4 * width, distortion, factor_at, noise_at,
                                dtype, head_dim, heads, lanes, accumulators, converts_half,
                            )  # fmt: skip
                        scale_weights(
                            scores_at, kept, value_scales_at + 4 * skip,
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        add_block(
                            value_rows_at + 8 * skip, rows_at, kept, scores_at, factor_at,
                            scratch_at + 4 * sums, np.int64(0),
                            dtype, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        for lane in range(width):
                            scratch[total + lane] = (
                                scratch[total + lane] * scratch[factor + lane] + scratch[grown + lane]
                            )
                        for head in range(stride):
                            for lane in range(head + stride, width, stride):
                                scratch[grown + head] += scratch[grown + lane]
                        _add_mean(scratch, grown, means_from + head_dim, sums, heads, head_dim)
                    begin = stop
                for query in range(num_queries):
                    state = states_from + query * state_floats + query_floats + 2 * width
                    for head in range(heads):
                        total_of_head = np.float32(0.0)
                        for lane in range(head, width, stride):
                            total_of_head += scratch[state + width + lane]
                        if total_of_head == 0.0:
                            lse[result, query, head] = -np.inf
                            out[result, query, head, :] = 0.0
                            if len(noise):
                                noise[result, query, head, :] = 0.0
                            continue
                        lse[result, query, head] = ln_2 * scratch[state + head] + np.log(total_of_head)
                        inverse = one / total_of_head
                        sums = state + 6 * width + head * head_dim
                        for column in range(head_dim):
                            out[result, query, head, column] = scratch[sums + column] * inverse
                        if len(noise):
                            for part in range(2):
                                added = np.float32(0.0)
                                for lane in range(head, width, stride):
                                    added += scratch[state + (4 + part) * width + lane]
                                if part == 0:
                                    added *= head_dim
                                noise[result, query, head, part] = added * inverse * inverse
                unit += 1
                result += 1

    return attend


def _kernel_for(refined: bool, head_dim: int, group_size: int, target: Target | None):
    target = target or host_target()
    lanes = target.lanes if head_dim % target.lanes == 0 else 8
    shape = (lanes, target.accumulators, int(target.converts_half))
    with _compiling:  # two threads must not build the same function
        return _kernel(int(refined), head_dim, group_size, *shape)


_NO_UNITS = np.empty(0, np.int64)
_NO_PAGES = np.empty(0, np.uint64)


def _attend(
    batch: SketchBatch, places: UnitRange, chosen, results, refinement_pages, out, lse, noise, target
) -> None:
    check_shape("float16", batch.head_dim, batch.group_size)
    refined = chosen is not None
    attend = _kernel_for(refined, batch.head_dim, batch.group_size, target)
    head_dim = batch.head_dim
    stride = score_stride(batch.group_size)
    width = max(stride, LANES_MAX)
    unit_tokens = batch.page_size // head_dim
    most_tokens = int(batch.segment_num_tokens.max(initial=0))
    tokens = unit_tokens if refined else most_tokens
    image_bytes = (tokens + PAD) * head_dim // 2 + 2 * (tokens + PAD)
    image_bytes += 4 * head_dim * (tokens // MEAN_TOKENS + 2) + 8 * LINE
    query_floats = batch.group_size * head_dim
    num_floats = (BLOCK_TOKENS + PAD) * (stride + 2 + (2 * head_dim if refined else 0))
    num_floats += 2 * width + 2 * head_dim + batch.queries.shape[1] * (2 * query_floats + 8 * width) + PAD
    damaged = attend(
        *batch.segment_arrays(),
        np.ascontiguousarray(chosen, np.int64) if refined else _NO_UNITS,
        batch.unit_segment(chosen) if refined else _NO_UNITS,
        np.ascontiguousarray(chosen if results is None else results, np.int64) if refined else _NO_UNITS,
        np.ascontiguousarray(refinement_pages, np.uint64) if refined else _NO_PAGES,
        batch.page_size,
        np.ascontiguousarray(batch.queries, np.float32),
        np.ascontiguousarray(batch.visible_start, np.int64),
        np.ascontiguousarray(batch.visible_stop, np.int64),
        np.float32(batch.scale),
        np.float32(batch.softcap),
        batch.alibi_slopes,
        batch.query_position,
        places.next_unit,
        places.stop_unit,
        np.empty(image_bytes, np.uint8),
        np.empty(SKETCH_HEADER_BYTES, np.uint8),
        np.empty((most_tokens + 1) // 2, np.uint8),
        np.empty(most_tokens, np.int64),
        np.empty((2, BLOCK_TOKENS + PAD), np.int64),
        np.zeros(num_floats, np.float32),
        out,
        lse,
        np.empty((0, 0, 0, 2), np.float32) if noise is None else noise,
    )
    if damaged != NO_SEGMENT:
        raise DamagedSketch(int(damaged), "index pages of another layout, or damaged ones")


def sketch_units(
    batch: SketchBatch,
    segments: UnitRange,
    out: np.ndarray,
    lse: np.ndarray,
    noise: np.ndarray | None = None,
    target: Target | None = None,
) -> None:
    """Attention by 2-bit codes alone, of all units of the segments taken from `segments` until none is left.

    Several threads may take segments of one range at once; the GIL is not held.

    out: float32 [num_units, num_queries, group_size, head_dim], rotated
    lse: float32 [num_units, num_queries, group_size], natural log; -inf (and out zero) where a query sees
        nothing of a unit
    noise: float32 [num_units, num_queries, group_size, 2], or None: the variance that codes are expected to
        cause, of out (summed over channels) and of lse
    target: the machine's own if None (others: for tests)

    Raises DamagedSketch for index pages that are not of the batch's layout, ValueError for a head_dim or
    group size that no kernel takes.
    """
    _attend(batch, segments, None, None, None, out, lse, noise, target)


def refined_units(
    batch: SketchBatch,
    places: UnitRange,
    chosen: np.ndarray,
    refinement_pages: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    noise: np.ndarray | None = None,
    target: Target | None = None,
    results: np.ndarray | None = None,
) -> None:
    """Attention by all 6 bits of chosen units: replaces what `sketch_units` filled in for them.

    places: range over `chosen`; chosen: int64 [num_chosen], units of the batch, ascending
    refinement_pages: uint64 [num_chosen], addresses of their refinement pages
    results: int64 [num_chosen], where in out, lse and noise they go; None: by their numbers
    The rest as of sketch_units.
    """
    _attend(batch, places, chosen, results, refinement_pages, out, lse, noise, target)


def prepare(head_dim: int, group_size: int) -> float:
    """Compile, or load from the cache, the kernels of a model. Returns the seconds; raises ValueError."""
    started = time.perf_counter()
    none = np.empty(0, np.int64)
    batch = SketchBatch(
        page_size=4096,
        head_dim=head_dim,
        group_size=group_size,
        index_pages=_NO_PAGES,
        segment_first_page=np.zeros(1, np.int64),
        segment_first_unit=np.zeros(1, np.int64),
        segment_num_tokens=none,
        segment_first_token=none,
        segment_item=np.empty(0, np.int32),
        segment_kv_head=np.empty(0, np.int32),
        queries=np.empty((0, 1, group_size, head_dim), np.float32),
        visible_start=np.empty((0, 1), np.int64),
        visible_stop=np.empty((0, 1), np.int64),
        scale=1.0,
    )
    out, lse = np.empty((0, 1, group_size, head_dim), np.float32), np.empty((0, 1, group_size), np.float32)
    sketch_units(batch, UnitRange(0, 0), out, lse)
    refined_units(batch, UnitRange(0, 0), none, _NO_PAGES, out, lse)
    return time.perf_counter() - started
