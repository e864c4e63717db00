"""What the attention core computes, bit by bit, in NumPy integers. The RTL has to give the same words.

Source of the method: online softmax (arXiv:1805.02867), with the running maximum rounded up to a whole power of
two, so that what was summed before is corrected by a shift.
"""

from dataclasses import dataclass

import numpy as np

from accel.fpga.arithmetic import (
    ALIGNED_SHIFT,
    BFLOAT16,
    CHANNEL_SCORE_BITS,
    CHANNEL_SCORE_CUT,
    CHANNEL_WEIGHT_BITS,
    EXPONENT_MIN,
    LEFT_LIMIT,
    NO_MAX,
    NOT_FINITE,
    PRODUCT_CUT,
    SATURATED,
    SCORE_FRACTION,
    SCORE_LIMIT,
    SHIFT_LIMIT,
    SUM_BITS,
    TABLE_BITS,
    WEIGHT_FRACTION,
    Shape,
    exp2_table,
)

_TABLE, _SLOPE = (np.array(column, np.int64) for column in zip(*exp2_table(), strict=True))
_FRACTION = (1 << SCORE_FRACTION) - 1


@dataclass
class Command:
    """One unit. queries: int32 [rows, head_dim], 24 bits; exponents: int [rows], of the queries with the scale
    and log2(e) in them; visible_start, visible_stop: int [rows]; dtype: FLOAT16 or BFLOAT16."""

    queries: np.ndarray
    exponents: np.ndarray
    visible_start: np.ndarray
    visible_stop: np.ndarray
    dtype: int


@dataclass
class Result:
    """maxima: int64 [rows], NO_MAX where nothing was visible; sums: int64 [rows]; exponents: int64 [beats];
    totals: int64 [rows, beats, lanes], or scores over channels; status: sticky bits"""

    maxima: np.ndarray
    sums: np.ndarray
    exponents: np.ndarray
    totals: np.ndarray
    status: int


def split(bits: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(signed mantissa, exponent, is finite) of elements as uint16."""
    bits = bits.astype(np.int64)
    negative = bits >> 15
    field_bits, exponent_mask, bias = (7, 255, 127) if dtype == BFLOAT16 else (10, 31, 15)
    field = bits >> field_bits & exponent_mask
    mantissa = (bits & ((1 << field_bits) - 1)) | ((field != 0).astype(np.int64) << field_bits)
    mantissa <<= 10 - field_bits
    exponent = np.maximum(field, 1) - bias
    exponent = np.where(mantissa == 0, EXPONENT_MIN, exponent)
    return np.where(negative == 1, -mantissa, mantissa), exponent, field != exponent_mask


def align(mantissa: np.ndarray, exponent: np.ndarray, common: np.ndarray) -> np.ndarray:
    """18-bit integers of one exponent, cut towards zero."""
    shift = np.minimum(common - exponent, 31)
    return np.sign(mantissa) * ((np.abs(mantissa) << ALIGNED_SHIFT) >> shift)


def scores_of(command: Command, keys: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, int]:
    """(scores int64 [tokens, rows], which do not fit, status) of elements uint16 [tokens, head_dim]."""
    tokens = len(keys)
    mantissa, exponent, finite = (part.reshape(tokens, -1, shape.lanes) for part in split(keys, command.dtype))
    common = exponent.max(axis=2, keepdims=True)
    aligned = align(mantissa, exponent, common)
    queries = command.queries.astype(np.int64).reshape(len(command.queries), -1, shape.lanes)
    products = np.einsum("tbl,rbl->trb", aligned, queries)  # 18 + 24 + 5 bits
    # a product is worth 2**(common - 16 + exponent of the row); scores have 16 bits behind the point
    right = -(common[..., 0][:, None, :] - 16 + np.asarray(command.exponents)[None, :, None] + SCORE_FRACTION)
    left = np.clip(-right, 0, LEFT_LIMIT)
    shifted = np.where(right >= 0, products >> np.clip(right, 0, SHIFT_LIMIT), products << left)
    scores, too_far = shifted.sum(axis=2), (right < -LEFT_LIMIT).any(axis=2)
    return scores, too_far | (np.abs(scores) > SCORE_LIMIT), NOT_FINITE * (not finite.all())


def weights_of(difference: np.ndarray) -> np.ndarray:
    """2**difference in units of 2**-24; difference: int64, at most 0, 16 bits behind the point."""
    fraction = difference & _FRACTION
    index, rest = fraction >> (SCORE_FRACTION - TABLE_BITS), fraction & ((1 << TABLE_BITS) - 1)
    mantissa = _TABLE[index] + (_SLOPE[index] * rest >> TABLE_BITS)
    right = np.minimum(-(difference >> SCORE_FRACTION), WEIGHT_FRACTION + 2)
    return (mantissa + np.where(right > 0, 1 << np.maximum(right - 1, 0), 0)) >> right


def attend(command: Command, blocks, shape: Shape) -> Result:
    """blocks: of (first position, token mask or None, keys, values), the latter uint16 [tokens, head_dim]."""
    rows, head_dim = command.queries.shape
    beats = head_dim // shape.lanes
    maxima = np.full(rows, NO_MAX, np.int64)
    sums = np.zeros(rows, np.int64)
    exponents = np.full(beats, EXPONENT_MIN, np.int64)
    totals = np.zeros((rows, beats, shape.lanes), np.int64)
    status = 0
    for first, mask, keys, values in blocks:
        tokens = len(keys)
        scores, too_large, of_keys = scores_of(command, keys, shape)
        position = first + np.arange(tokens)[:, None]
        visible = (position >= command.visible_start) & (position < command.visible_stop)
        visible &= _bits(mask, tokens)[:, None]
        status |= of_keys
        if (visible & too_large).any():
            status |= SATURATED
        scores = np.clip(scores, -SCORE_LIMIT, SCORE_LIMIT)
        above = -(-np.where(visible, scores, NO_MAX << SCORE_FRACTION) >> SCORE_FRACTION)
        before, maxima = maxima, np.maximum(maxima, above.max(axis=0))
        down = np.where(before == NO_MAX, 0, np.minimum(maxima - before, SHIFT_LIMIT))
        difference = np.minimum(scores - (maxima << SCORE_FRACTION), 0)
        weights = np.where(visible, weights_of(difference), 0)
        sums = (sums >> np.minimum(down, SHIFT_LIMIT)) + weights.sum(axis=0)
        exponents, of_values = add_weighted(totals, exponents, down, weights, values, command.dtype)
        status |= of_values
    return Result(maxima, sums, exponents, totals, status)


def add_weighted(totals, exponents, down, weights, elements, dtype: int) -> tuple[np.ndarray, int]:
    """Adds to totals, in place; (their new exponents, status).

    totals: int64 [rows, beats, lanes]; exponents: int64 [beats]; down: int64 [rows], powers of two by which the
    first token finds a larger maximum; weights: int64 [tokens, rows]; elements: uint16 [tokens, beats * lanes]
    """
    shape = (len(elements), *totals.shape[1:])
    mantissa, exponent, finite = (part.reshape(shape) for part in split(elements, dtype))
    for token in range(len(elements)):
        common = np.maximum(exponents, exponent[token].max(axis=1))
        right = (common - exponents)[None, :] + (down[:, None] if token == 0 else 0)
        aligned = align(mantissa[token], exponent[token], common[:, None])
        product = weights[token][:, None, None] * aligned[None]
        totals >>= np.minimum(right, SHIFT_LIMIT)[..., None]
        totals += (product + (1 << (PRODUCT_CUT - 1))) >> PRODUCT_CUT
        exponents = common
    return exponents, NOT_FINITE * (not finite.all())


def weigh_channels(dtype: int, blocks, shape: Shape) -> Result:
    """blocks: of (channel mask or None, weights, elements): int32 [channels, rows], 24 bits, and uint16
    [channels, beats * lanes]: a row of tokens for each channel."""
    beats = blocks[0][2].shape[1] // shape.lanes
    exponents, status = np.full(beats, EXPONENT_MIN, np.int64), 0
    totals = np.zeros((shape.rows, beats, shape.lanes), np.int64)
    sums = np.zeros(shape.rows, np.int64)
    for mask, weights, elements in blocks:
        counts = _bits(mask, len(elements))[:, None]
        weights = np.where(counts, weights.astype(np.int64), 0)
        exponents, of_block = add_weighted(totals, exponents, 0 * sums, weights, elements, dtype)
        status |= of_block
        sums += weights.sum(axis=0)
    scores = ((totals >> CHANNEL_SCORE_CUT) + (1 << 31)) % (1 << CHANNEL_SCORE_BITS) - (1 << 31)
    return Result(np.full(shape.rows, NO_MAX, np.int64), sums % (1 << SUM_BITS), exponents, scores, status)


def channel_scores(result: Result, exponents: np.ndarray) -> np.ndarray:
    """float32 [rows, tokens]; exponents: int [rows], of the weights"""
    power = result.exponents[None, :] - 16 + PRODUCT_CUT + CHANNEL_SCORE_CUT + np.asarray(exponents)[:, None]
    return (
        np.ldexp(result.totals.astype(np.float64), power[..., None]).reshape(len(power), -1).astype(np.float32)
    )


def outputs(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """(out float32 [rows, head_dim], lse float32 [rows], natural log) of a result's words."""
    seen = result.sums > 0
    unit = np.exp2((result.exponents - 16 + PRODUCT_CUT).astype(np.float64))[None, :, None]
    out = result.totals * unit / np.where(seen, result.sums, 1)[:, None, None]
    with np.errstate(divide="ignore"):
        lse = (result.maxima + np.log2(result.sums) - WEIGHT_FRACTION) * np.log(2)
    return (
        np.where(seen[:, None], out.reshape(len(seen), -1), 0).astype(np.float32),
        np.where(seen, lse, -np.inf).astype(np.float32),
    )


def quantised_queries(queries: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [rows, head_dim] of 24 bits, exponents [rows]) of queries with scale and log2(e)."""
    return quantised(np.asarray(queries, np.float64) * (scale / np.log(2)))


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32 of 24 bits, exponents [rows]): rows are close to integers * 2**exponent."""
    largest = np.abs(rows).max(axis=1, initial=0)
    lost = CHANNEL_WEIGHT_BITS - 2
    exponents = np.where(largest > 0, np.ceil(np.log2(np.maximum(largest, 1e-300))) - lost, 0).astype(np.int64)
    return np.rint(np.ldexp(rows, -exponents[:, None])).astype(np.int32), exponents


def _bits(mask, count: int) -> np.ndarray:
    """bool [count]: the lowest bits of a mask; all of them without one."""
    if mask is None:
        return np.ones(count, bool)
    return (np.uint64(mask) >> np.arange(count, dtype=np.uint64) & np.uint64(1)).astype(bool)
