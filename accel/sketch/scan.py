"""Attention over sketches in two passes, for a budget: scores of all tokens, then values of those not refined.

What is kept between the passes is a byte per token and query head. Units are cut into pieces, each with one
mean: a piece's weights are bytes of the largest that it could have. Which units are refined is known before the
second pass, so nothing has to be taken back, and what is summed up needs no memory per unit.

The first pass rounds queries to 8 bits and weights to a 255th; a code's own error is fifty times as much.
"""

import math
import threading
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from accel.sketch import DamagedSketch, SketchBatch, codebook, integer_kernels, micro_kernels, token_order
from accel.sketch.format import TOKEN_ORDER_VERSION
from accel.sketch.integer_kernels import (
    BIAS,
    LANES,
    QUERY_MAX,
    SLAB,
    WEIGHT_MAX,
    score_codes,
    sum_codes,
    weigh_tokens,
)
from accel.sketch.kernels import NO_SEGMENT, PAD, all_finite, gather, header_holds, header_version
from accel.sketch.micro_kernels import copy_bytes, token_scales, widen_halves
from accel.sketch.token_order import read_order, sees_all
from accel.workers import check_shape, vector_ir
from accel.workers import micro_kernels as dense_micro_kernels
from accel.workers.micro_kernels import cap_scores
from accel.workers.target import host_target, multiplies_bytes
from accel.workers.unit_range import UnitRange, take_unit
from accel.workers.vector_ir import SKETCH
from spdk_glue.derived_layout import MEAN_TOKENS, SKETCH_HEADER_BYTES

GROUP = integer_kernels.GROUP
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_EMITTERS = zlib.crc32(
    b"".join(
        Path(module.__file__).read_bytes()
        for module in (codebook, integer_kernels, micro_kernels, token_order, dense_micro_kernels, vector_ir)
    )
)
_compiling = threading.Lock()


@dataclass
class Scan:
    """What the first pass finds and the second needs.

    lse: float32 [num_units, num_queries, group_size], natural log; -inf where a query sees nothing of a unit
    piece_lse: the same of pieces; piece_step: what a byte of weight is worth, of the piece's whole weight
    weights: uint8, of each segment from segment_weights on: [num_queries][piece][group of tokens][head][GROUP]
    """

    lse: np.ndarray
    piece_lse: np.ndarray
    piece_step: np.ndarray
    weights: np.ndarray
    segment_first_piece: np.ndarray
    segment_weights: np.ndarray

    @staticmethod
    def of(batch: SketchBatch) -> "Scan":
        """Yet to be filled."""
        num_queries, group_size = batch.queries.shape[1], batch.group_size
        num_pieces = np.diff(batch.segment_first_unit) + -(-batch.segment_num_tokens // MEAN_TOKENS)
        first_piece = np.concatenate([[0], np.cumsum(num_pieces)])
        groups = batch.segment_num_tokens // GROUP + num_pieces + LANES // GROUP
        weights = np.concatenate([[0], np.cumsum(groups * (num_queries * group_size * GROUP))])
        shape = (int(first_piece[-1]), num_queries, group_size)
        return Scan(
            np.empty((batch.num_units, num_queries, group_size), np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(int(weights[-1]), np.uint8),
            first_piece,
            weights,
        )


@dataclass(frozen=True)
class RoundedQueries:
    """All [num_items, num_queries, num_kv_heads, ...].

    codes: int8 [..., words, 4, group_size, 4], zero behind head_dim; biases: int32 [..., group_size]
    scaled: float32 [..., group_size, head_dim], times scale, to base 2; worth: float32 [..., group_size]
    """

    codes: np.ndarray
    biases: np.ndarray
    scaled: np.ndarray
    worth: np.ndarray

    @staticmethod
    def of(batch: SketchBatch) -> "RoundedQueries":
        items, num_queries, num_heads, head_dim = batch.queries.shape
        group = batch.group_size
        scaled = batch.queries.reshape(items, num_queries, num_heads // group, group, head_dim)
        scaled = scaled * np.float32(batch.scale * _LOG2_E)
        largest = np.abs(scaled).max(axis=-1)
        step = np.maximum(largest, np.float32(1e-30)) / np.float32(QUERY_MAX)
        with np.errstate(invalid="ignore"):  # NaN stays in `worth`
            rounded = np.rint(scaled / step[..., None]).astype(np.int8)
        words = -(-head_dim // 16)
        padded = np.zeros((*rounded.shape[:-1], 16 * words), np.int8)
        padded[..., :head_dim] = rounded
        codes = np.moveaxis(padded.reshape(*rounded.shape[:-1], words, 4, 4), -4, -2)
        return RoundedQueries(
            np.ascontiguousarray(codes),
            BIAS * rounded.sum(axis=-1, dtype=np.int32),
            scaled,
            step * np.float32(codebook.LEVEL_STEP),
        )


@njit(nogil=True, cache=True, boundscheck=False)
def _image(index_pages, first_page, stop_page, page_size, scratch):
    """Address of a segment's index pages as one stream: where they lie, if they are neighbours, or copied."""
    for page in range(first_page + 1, stop_page):
        if index_pages[page] != index_pages[page - 1] + np.uint64(page_size):
            size = (stop_page - first_page) * page_size
            gather(index_pages, first_page, page_size, np.int64(0), size, np.int64(scratch.ctypes.data))
            return np.int64(scratch.ctypes.data)
    return np.int64(index_pages[first_page])


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _dot(a, b):
    total = np.float32(0.0)
    for place in range(len(a)):
        total += a[place] * b[place]
    return total


@njit(nogil=True, cache=True, boundscheck=False)
def _largest(codes, first, stop):
    found = np.uint8(0)
    for place in range(first, stop):
        found = max(found, codes[place])
    return np.float32(found)


@njit(nogil=True, cache=True, boundscheck=False)
def _hide(scores, tokens, start, stop):
    """scores: float32 [heads, >= len(tokens)]; -inf for tokens outside [start, stop)."""
    for head in range(len(scores)):
        for place in range(len(tokens)):
            if not start <= tokens[place] < stop:
                scores[head, place] = -np.inf


@njit(nogil=True, cache=True, boundscheck=False)
def _add_distance_bias(scores, tokens, position, slopes):
    """As kernels._add_distance_bias; slopes: of these heads."""
    for head in range(len(scores)):
        for place in range(len(tokens)):
            distance = np.float32(position - tokens[place]) * np.float32(_LOG2_E)
            scores[head, place] -= slopes[head] * distance


@njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
def _add_logs(a, b):
    """log(exp(a) + exp(b)); NaN wins."""
    top = a if a > b else b
    if top == -np.inf and not (a != a or b != b):
        return top
    return top + np.log(np.exp(a - top) + np.exp(b - top))


@cache
def _score_kernel(head_dim: int, heads: int, native: int, lanes: int, accumulators: int, converts_half: int):
    """The compiled first pass. The integers it closes over are its key in numba's cache."""
    emitters = _EMITTERS
    code_bytes = head_dim // 4
    key_factor = np.float32(codebook.KEY_FACTOR)
    deviation_factor = np.float32(math.sqrt(codebook.SCORE_VARIANCE * _LN_2 / 2) / codebook.KEY_FACTOR)
    weight_step = np.float32(codebook.LEVEL_STEP / WEIGHT_MAX)
    ln_2 = np.float32(_LN_2)
    cap_to_base_2 = np.float32(_LOG2_E)

    @njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
    def score(
        index_pages, segment_first_page, segment_first_unit, segment_num_tokens, segment_first_token,
        segment_item, segment_kv_head, page_size, codes, biases, scaled, worth, visible_start, visible_stop,
        softcap, slopes, query_position, next_segment, stop_segment, image, copied, order, scales, scores,
        floats, lse, piece_lse, piece_step, weights, segment_first_piece, segment_weights,
    ):  # fmt: skip
        # image, copied: uint8, of a segment's index pages; order: int64 [tokens]; scales: float32
        # [2, tokens + PAD]; scores: float32 [heads, tokens + PAD]; floats: float32 [head_dim + 2 + 3 * heads]
        # Returns NO_SEGMENT, or the segment whose header or means are damaged.
        emitters  # noqa: B018 - makes it part of the key
        num_queries = codes.shape[1]
        unit_tokens = page_size // head_dim
        stride = scores.shape[1]
        scores_at = np.int64(scores.ctypes.data)
        mean, found, of_heads = floats[:head_dim], floats[head_dim : head_dim + 2], floats[head_dim + 2 :]
        copied_at = np.int64(copied.ctypes.data)
        header = copied[:SKETCH_HEADER_BYTES].view(np.float32)
        key_scales_at = np.int64(scales.ctypes.data)
        value_scales_at = key_scales_at + 4 * scales.shape[1]
        while True:
            segment = take_unit(next_segment)
            if segment >= stop_segment:
                return NO_SEGMENT
            num_tokens = segment_num_tokens[segment]
            first_page, stop_page = segment_first_page[segment], segment_first_page[segment + 1]
            at = _image(index_pages, first_page, stop_page, page_size, image)
            copy_bytes(copied_at, at, np.int64(SKETCH_HEADER_BYTES))
            if not header_holds(copied[:SKETCH_HEADER_BYTES], head_dim, num_tokens, page_size):
                return segment
            keys_at = at + SKETCH_HEADER_BYTES
            key_codes_at = keys_at + 2 * num_tokens * code_bytes
            value_codes_at = key_codes_at + num_tokens
            means_at = value_codes_at + num_tokens
            num_means = (num_tokens - 1) // MEAN_TOKENS + 1
            means_stop = SKETCH_HEADER_BYTES + 4 * num_means * head_dim
            copy_bytes(copied_at + SKETCH_HEADER_BYTES, means_at, 4 * num_means * head_dim)
            if not all_finite(copied[SKETCH_HEADER_BYTES:means_stop].view(np.uint16)):
                return segment
            copy_bytes(copied_at + means_stop, value_codes_at, num_tokens)
            value_codes = copied[means_stop : means_stop + num_tokens]
            value_base, value_step = np.exp2(header[6]), header[7]
            token_scales(
                key_codes_at, num_tokens, np.float32(key_factor * np.exp2(header[4])), header[5], key_scales_at,
                SKETCH, head_dim, heads, lanes, accumulators, converts_half,
            )  # fmt: skip
            token_scales(
                value_codes_at, num_tokens, np.float32(value_base), value_step, value_scales_at,
                SKETCH, head_dim, heads, lanes, accumulators, converts_half,
            )  # fmt: skip
            item, kv_head = segment_item[segment], segment_kv_head[segment]
            first_position = segment_first_token[segment]
            starts, stops = visible_start[item], visible_stop[item]
            sees = sees_all(starts, stops, first_position, num_tokens)
            if not sees or len(slopes):
                packed_from, packed_bytes = means_stop + num_tokens, (num_tokens + 1) // 2
                packed = copied[packed_from : packed_from + packed_bytes]
                version = header_version(copied[:SKETCH_HEADER_BYTES])
                if version == TOKEN_ORDER_VERSION:
                    order_at = means_at + 4 * num_means * head_dim
                    if order_at + packed_bytes > at + (stop_page - first_page) * page_size:
                        return segment
                    copy_bytes(copied_at + packed_from, order_at, packed_bytes)
                if not read_order(version, packed, num_tokens, unit_tokens, order):
                    return segment
            tokens = order[:num_tokens]
            weights_at = np.int64(weights.ctypes.data) + segment_weights[segment]
            for query in range(num_queries):
                for head in range(heads):
                    row = scaled[item, query, kv_head, head]
                    of_heads[head] = worth[item, query, kv_head, head]
                    of_heads[2 * heads + head] = np.sqrt(_dot(row, row)) * deviation_factor
                for number in range(num_means):
                    widen_halves(
                        means_at + 2 * number * head_dim, np.int64(mean.ctypes.data),
                        SKETCH, head_dim, heads, lanes, accumulators, converts_half,
                    )  # fmt: skip
                    for head in range(heads):
                        of_heads[heads + head] = _dot(scaled[item, query, kv_head, head], mean)
                    first = number * MEAN_TOKENS
                    score_codes(
                        keys_at + first * code_bytes, min(num_tokens - first, MEAN_TOKENS),
                        key_scales_at + 4 * first,
                        np.int64(codes[item, query, kv_head].ctypes.data),
                        np.int64(biases[item, query, kv_head].ctypes.data),
                        np.int64(of_heads.ctypes.data), scores_at + 4 * first, stride,
                        head_dim, heads, native,
                    )  # fmt: skip
                if softcap > 0:
                    for head in range(heads):
                        cap_scores(
                            scores_at + 4 * head * stride, num_tokens, softcap * cap_to_base_2,
                            SKETCH, head_dim, 1, lanes, accumulators, converts_half,
                        )  # fmt: skip
                if len(slopes):
                    its_slopes = slopes[kv_head * heads : (kv_head + 1) * heads]
                    _add_distance_bias(scores, tokens, query_position[item, query] - first_position, its_slopes)
                if not sees:
                    _hide(scores, tokens, starts[query] - first_position, stops[query] - first_position)
                piece = segment_first_piece[segment]
                for unit in range(segment_first_unit[segment], segment_first_unit[segment + 1]):
                    unit_begin = (unit - segment_first_unit[segment]) * unit_tokens
                    unit_stop = min(unit_begin + unit_tokens, num_tokens)
                    begin = unit_begin
                    while begin < unit_stop:
                        behind = min((begin // MEAN_TOKENS + 1) * MEAN_TOKENS, unit_stop)
                        largest = np.float32(
                            value_base * np.exp2(value_step * _largest(value_codes, begin, behind))
                        )
                        for head in range(heads):
                            weigh_tokens(
                                scores_at + 4 * (head * stride + begin), behind - begin,
                                value_scales_at + 4 * begin, largest, weights_at + GROUP * head,
                                np.int64(found.ctypes.data),
                                head_dim, heads, native,
                            )  # fmt: skip
                            piece_lse[piece, query, head] = ln_2 * found[0] + np.log(found[1])
                            step = largest * weight_step / found[1] if found[1] != 0 else np.float32(0.0)
                            piece_step[piece, query, head] = step
                            if begin == unit_begin:
                                lse[unit, query, head] = piece_lse[piece, query, head]
                            else:
                                lse[unit, query, head] = _add_logs(
                                    lse[unit, query, head], piece_lse[piece, query, head]
                                )
                        weights_at += -(-(behind - begin) // GROUP) * heads * GROUP
                        piece += 1
                        begin = behind

    return score


@njit(nogil=True, cache=True, boundscheck=False)
def _place_of_channel(channel):
    """Where `sum_codes` has it among a head's sums."""
    slab, within = divmod(channel, SLAB)
    word, place = divmod(within, 8)
    return slab * SLAB + place // 2 * LANES + 2 * word + place % 2


@cache
def _sum_kernel(head_dim: int, heads: int, native: int, lanes: int, accumulators: int, converts_half: int):
    """The compiled second pass."""
    emitters = _EMITTERS
    code_bytes = head_dim // 4

    @njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
    def add_up(
        index_pages, segment_first_page, segment_first_unit, segment_num_tokens, page_size, refined,
        next_segment, stop_segment, image, sums, mean_sums, floats,
        piece_lse, piece_step, weights, segment_first_piece, segment_weights, out, lse,
    ):  # fmt: skip
        # sums: float32 [heads, width]; mean_sums: float32 [heads, head_dim]; floats: [head_dim + 4 * heads]
        emitters  # noqa: B018 - makes it part of the key
        num_queries = out.shape[1]
        unit_tokens = page_size // head_dim
        mean, of_heads = floats[:head_dim], floats[head_dim:].reshape(4, heads)
        top, total, of_mean, factors = of_heads[0], of_heads[1], of_heads[2], of_heads[3]
        while True:
            segment = take_unit(next_segment)
            if segment >= stop_segment:
                return
            num_tokens = segment_num_tokens[segment]
            first_page, stop_page = segment_first_page[segment], segment_first_page[segment + 1]
            at = _image(index_pages, first_page, stop_page, page_size, image)
            values_at = at + SKETCH_HEADER_BYTES + num_tokens * code_bytes
            num_means = (num_tokens - 1) // MEAN_TOKENS + 1
            means_at = values_at + num_tokens * code_bytes + 2 * num_tokens + 2 * num_means * head_dim
            weights_at = np.int64(weights.ctypes.data) + segment_weights[segment]
            first_unit = segment_first_unit[segment]
            for query in range(num_queries):
                top[:] = -np.inf
                piece = segment_first_piece[segment]
                begin = np.int64(0)
                while begin < num_tokens:
                    unit = begin // unit_tokens
                    if not refined[first_unit + unit]:
                        for head in range(heads):
                            if not piece_lse[piece, query, head] <= top[head]:  # NaN wins
                                top[head] = piece_lse[piece, query, head]
                    begin = min((begin // MEAN_TOKENS + 1) * MEAN_TOKENS, (unit + 1) * unit_tokens)
                    piece += 1
                sums[:] = 0.0
                mean_sums[:] = 0.0
                total[:] = 0.0
                of_mean[:] = 0.0
                piece = segment_first_piece[segment]
                begin = np.int64(0)
                while begin < num_tokens:
                    unit = begin // unit_tokens
                    behind = min((begin // MEAN_TOKENS + 1) * MEAN_TOKENS, (unit + 1) * unit_tokens, num_tokens)
                    groups = -(-(behind - begin) // GROUP)
                    if not refined[first_unit + unit]:
                        for head in range(heads):
                            part = np.float32(0.0)
                            if piece_lse[piece, query, head] != -np.inf:
                                part = np.exp(piece_lse[piece, query, head] - top[head])
                            total[head] += part
                            of_mean[head] += part
                            factors[head] = part * piece_step[piece, query, head]
                        sum_codes(
                            values_at + begin * code_bytes, groups, weights_at,
                            np.int64(factors.ctypes.data), np.int64(sums.ctypes.data),
                            head_dim, heads, native,
                        )  # fmt: skip
                    if behind % MEAN_TOKENS == 0 or behind == num_tokens:
                        widen_halves(
                            means_at + 2 * (begin // MEAN_TOKENS) * head_dim, np.int64(mean.ctypes.data),
                            SKETCH, head_dim, heads, lanes, accumulators, converts_half,
                        )  # fmt: skip
                        for head in range(heads):
                            for column in range(head_dim):
                                mean_sums[head, column] += of_mean[head] * mean[column]
                        of_mean[:] = 0.0
                    weights_at += groups * heads * GROUP
                    piece += 1
                    begin = behind
                for head in range(heads):
                    if total[head] == 0.0:
                        lse[segment, query, head] = -np.inf
                        out[segment, query, head, :] = 0.0
                        continue
                    lse[segment, query, head] = top[head] + np.log(total[head])
                    inverse = np.float32(1.0) / total[head]
                    for column in range(head_dim):
                        both = sums[head, _place_of_channel(column)] + mean_sums[head, column]
                        out[segment, query, head, column] = both * inverse

    return add_up


def _kernel_for(build, batch: SketchBatch, native: bool | None):
    check_shape("float16", batch.head_dim, batch.group_size)
    target = host_target()
    lanes = target.lanes if batch.head_dim % target.lanes == 0 else 8
    native = multiplies_bytes() if native is None else native
    with _compiling:  # two threads must not build the same function
        return build(
            batch.head_dim, batch.group_size, int(native), lanes, target.accumulators, int(target.converts_half)
        )


def _image_memory(batch: SketchBatch) -> np.ndarray:
    pages = int(np.diff(batch.segment_first_page).max(initial=0))
    return np.empty(pages * batch.page_size + PAD * batch.head_dim, np.uint8)


def score_units(
    batch: SketchBatch, queries: RoundedQueries, segments: UnitRange, scan: Scan, native: bool | None = None
) -> None:
    """The first pass, over all units of the segments taken from `segments` until none is left; fills `scan`.

    Several threads may take segments of one range at once; the GIL is not held. native: False does without what
    the CPU may lack, for tests. Raises DamagedSketch and ValueError as kernels.sketch_units.
    """
    score = _kernel_for(_score_kernel, batch, native)
    head_dim, tokens = batch.head_dim, int(batch.segment_num_tokens.max(initial=0))
    copied = SKETCH_HEADER_BYTES + 4 * head_dim * (tokens // MEAN_TOKENS + 1) + tokens + (tokens + 1) // 2
    damaged = score(
        *batch.segment_arrays(),
        batch.page_size,
        queries.codes,
        queries.biases,
        queries.scaled,
        queries.worth,
        np.ascontiguousarray(batch.visible_start, np.int64),
        np.ascontiguousarray(batch.visible_stop, np.int64),
        np.float32(batch.softcap),
        batch.alibi_slopes,
        batch.query_position,
        segments.next_unit,
        segments.stop_unit,
        _image_memory(batch),
        np.empty(copied, np.uint8),
        np.empty(tokens, np.int64),
        np.empty((2, tokens + PAD), np.float32),
        np.empty((batch.group_size, tokens + PAD), np.float32),
        np.empty(head_dim + 2 + 3 * batch.group_size, np.float32),
        scan.lse,
        scan.piece_lse,
        scan.piece_step,
        scan.weights,
        scan.segment_first_piece,
        scan.segment_weights,
    )
    if damaged != NO_SEGMENT:
        raise DamagedSketch(int(damaged), "index pages of another layout, or damaged ones")


def sum_units(
    batch: SketchBatch,
    segments: UnitRange,
    scan: Scan,
    refined: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    native: bool | None = None,
) -> None:
    """The second pass: what the units that are not `refined`, bool [num_units], add up to, by segment.

    The pages are those of the first pass, and not looked at again. Threads: as score_units.

    out: float32 [num_segments, num_queries, group_size, head_dim], rotated; lse: float32 [num_segments,
    num_queries, group_size], natural log; zero and -inf where no unit is left
    """
    add_up = _kernel_for(_sum_kernel, batch, native)
    head_dim, heads = batch.head_dim, batch.group_size
    add_up(
        np.ascontiguousarray(batch.index_pages, np.uint64),
        np.ascontiguousarray(batch.segment_first_page, np.int64),
        np.ascontiguousarray(batch.segment_first_unit, np.int64),
        np.ascontiguousarray(batch.segment_num_tokens, np.int64),
        batch.page_size,
        refined,
        segments.next_unit,
        segments.stop_unit,
        _image_memory(batch),
        np.empty((heads, -(-head_dim // SLAB) * SLAB), np.float32),
        np.empty((heads, head_dim), np.float32),
        np.empty(head_dim + 4 * heads, np.float32),
        scan.piece_lse,
        scan.piece_step,
        scan.weights,
        scan.segment_first_piece,
        scan.segment_weights,
        out,
        lse,
    )
