"""Rows of K and V to a sketch's pages: as reference.encode, at the speed of the background."""

from functools import cache

import numpy as np
from numba import njit

from accel.sketch.codebook import refined_borders, rotate
from accel.sketch.format import (
    LARGEST,
    LOG_SCALE_MIN,
    LOG_SCALE_OCTAVES,
    MEAN_MAX,
    SKETCH_HEADER,
    has_token_order,
    index_offsets,
    new_header,
)
from accel.sketch.token_order import like_tokens_together, pack_units
from spdk_glue.derived_layout import MEAN_TOKENS, DerivedLayout

_BORDERS = refined_borders()
_SMALLEST = np.float32(2.0**LOG_SCALE_MIN)


@njit(nogil=True, cache=True, boundscheck=False)
def _scale_codes(log_scales, codes):
    """Codes of the tokens' scales; returns (lowest, step). log_scales: float32 [num_tokens], base 2."""
    top = log_scales.max()
    lowest = np.float32(max(log_scales.min(), top - np.float32(LOG_SCALE_OCTAVES), np.float32(LOG_SCALE_MIN)))
    step = np.float32((top - lowest) / np.float32(255))
    for token in range(len(log_scales)):
        code = np.float32(0)
        if step > 0:
            code = np.rint((log_scales[token] - lowest) / step)
        codes[token] = np.uint8(min(max(code, np.float32(0)), np.float32(255)))
    return lowest, step


@cache
def _coder(head_dim: int):
    num_borders = len(_BORDERS)

    @njit(nogil=True, cache=True, boundscheck=False)
    def code(rows, lowest, step, scale_codes, borders, codes, refinement, unit_tokens):
        # rows: float32 [num_tokens, head_dim], rotated, without their means
        # codes: uint8 [num_tokens, head_dim // 4]
        # refinement: uint8 [num_units, >= unit_tokens * head_dim // 2], from where this tensor's codes begin
        size = np.empty(head_dim, np.float32)
        magnitude = np.empty(head_dim, np.int32)
        for token in range(len(rows)):
            inverse = np.float32(np.exp2(-(lowest + step * np.float32(scale_codes[token]))))
            for channel in range(head_dim):
                size[channel] = abs(rows[token, channel]) * inverse
                magnitude[channel] = 0
            for border in range(num_borders):
                limit = borders[border]
                for channel in range(head_dim):
                    magnitude[channel] += np.int32(size[channel] >= limit)
            for channel in range(head_dim):
                magnitude[channel] |= np.int32(rows[token, channel] < 0) << 5
            for place in range(head_dim // 4):
                bits = 0
                for part in range(4):
                    bits |= (magnitude[4 * place + part] >> 4) << (2 * part)
                codes[token, place] = bits
            unit = token // unit_tokens
            first = (token - unit * unit_tokens) * (head_dim // 2)
            for place in range(head_dim // 2):
                refinement[unit, first + place] = (magnitude[2 * place] & 15) | (
                    (magnitude[2 * place + 1] & 15) << 4
                )

    return code


@njit(nogil=True, cache=True, boundscheck=False)
def _subtract(rows, firsts, means, log_scales):
    """Takes the means off rows, float32 [num_tokens, head_dim], in place; fills in their log2 of rms.

    firsts: int64 [num_means + 1]; means: float32 [num_means, head_dim]
    """
    head_dim = rows.shape[1]
    for mean in range(len(means)):
        for token in range(firsts[mean], firsts[mean + 1]):
            for channel in range(head_dim):
                rows[token, channel] -= means[mean, channel]
            square = np.float32(0)
            for channel in range(head_dim):
                square += rows[token, channel] * rows[token, channel]
            log_scales[token] = np.log2(max(np.sqrt(square / np.float32(head_dim)), _SMALLEST))


def encode(keys: np.ndarray, values: np.ndarray, layout: DerivedLayout) -> np.ndarray:
    """The pages of one head of one layer.

    keys, values: float32 [num_tokens, head_dim]
    Returns uint8 [index_pages + refinement_pages, page_size]; slack is zero. Does not hold the GIL for long.
    Raises ValueError for other shapes, and for elements that are not finite or above LARGEST in size.
    """
    expected = (layout.num_tokens, layout.head_dim)
    if keys.shape != expected or values.shape != expected:
        raise ValueError(f"keys {keys.shape} and values {values.shape} are not {expected}")
    for name, rows in (("keys", keys), ("values", values)):
        if not max(rows.max(), -rows.min()) <= LARGEST:  # NaN is neither
            raise ValueError(f"{name} hold an element that is not finite, or too large for a sketch")
    num_tokens, head_dim = expected
    pages = np.zeros((layout.index_pages + layout.refinement_pages, layout.page_size), np.uint8)
    index = pages[: layout.index_pages].reshape(-1)
    at = index_offsets(num_tokens, head_dim)
    header = new_header(layout)
    firsts = np.append(np.arange(0, num_tokens, MEAN_TOKENS), num_tokens)
    half_page = layout.unit_tokens * head_dim // 2
    rotated = rotate(keys), rotate(values)
    if has_token_order(layout):
        order = like_tokens_together(rotated[0], layout.unit_tokens)
        pack_units(order, layout.unit_tokens, index[at.token_order : at.end])
        rotated = tuple(rows[order] for rows in rotated)
    for name, rows, place in zip(("key", "value"), rotated, (0, half_page), strict=True):
        means = np.add.reduceat(rows, firsts[:-1], axis=0) / np.diff(firsts)[:, None].astype(np.float32)
        means = means.clip(-MEAN_MAX, MEAN_MAX).astype("<f2")
        log_scales = np.empty(num_tokens, np.float32)
        _subtract(rows, firsts, means.astype(np.float32), log_scales)
        codes, scale_codes, stored_means = (
            index[getattr(at, f"{name}_{part}") :][:size]
            for part, size in (
                ("codes", num_tokens * head_dim // 4),
                ("scales", num_tokens),
                ("means", means.nbytes),
            )
        )
        stored_means[:] = means.reshape(-1).view(np.uint8)
        lowest, step = _scale_codes(log_scales, scale_codes)
        header[f"{name}_lowest"], header[f"{name}_step"] = lowest, step
        _coder(head_dim)(
            rows,
            lowest,
            step,
            scale_codes,
            _BORDERS,
            codes.reshape(num_tokens, -1),
            pages[layout.index_pages :, place:],
            layout.unit_tokens,
        )
    index[: SKETCH_HEADER.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    return pages
