"""The definition of a sketch: pages to rows, and attention over them, in plain NumPy."""

import ctypes

import numpy as np

from accel.sketch import DamagedSketch, SketchBatch
from accel.sketch.codebook import (
    BORDER,
    CORRECTED_DEVIATION,
    DISTORTION,
    KEY_FACTOR,
    REFINED_DISTORTION,
    SCORE_VARIANCE,
    refined_borders,
    rotate,
    table_2,
    table_6,
    unrotate,
)
from accel.sketch.format import (
    LARGEST,
    LOG_SCALE_MIN,
    LOG_SCALE_OCTAVES,
    MEAN_MAX,
    SKETCH_HEADER,
    has_token_order,
    header_fault,
    index_offsets,
    new_header,
)
from accel.sketch.token_order import like_tokens_together, pack_units, read_order
from spdk_glue.derived_layout import MEAN_TOKENS, DerivedLayout
from spdk_glue.vendor_command import Derive, KvDtype


def sketch_layout(page_size: int, head_dim: int, num_tokens: int) -> DerivedLayout:
    """Of one head of one layer."""
    return DerivedLayout(Derive.SKETCH, page_size, 1, 1, head_dim, KvDtype.FLOAT16, num_tokens)


def _code(rows: np.ndarray):
    """(means, lowest, step, scale codes, codes 2 bit, codes 4 bit) of rotated rows [num_tokens, head_dim]."""
    num_tokens = len(rows)
    firsts = np.arange(0, num_tokens, MEAN_TOKENS)
    counts = np.diff(np.append(firsts, num_tokens))
    means = np.add.reduceat(rows, firsts, axis=0) / counts[:, None].astype(np.float32)
    means = means.clip(-MEAN_MAX, MEAN_MAX).astype(np.float16)
    rest = rows - np.repeat(means.astype(np.float32), counts, axis=0)
    log_scale = np.log2(np.maximum(np.sqrt((rest * rest).mean(axis=1)), 2.0**LOG_SCALE_MIN))
    top = np.float32(log_scale.max())
    lowest = np.float32(max(log_scale.min(), top - LOG_SCALE_OCTAVES, LOG_SCALE_MIN))
    step = np.float32((top - lowest) / 255)
    scale_codes = np.zeros(num_tokens, np.uint8)
    if step > 0:
        scale_codes = np.rint((log_scale - lowest) / step).clip(0, 255).astype(np.uint8)
    unit = rest / np.exp2(lowest + step * scale_codes.astype(np.float32))[:, None]
    size = np.abs(unit)
    magnitude = np.searchsorted(refined_borders(), size.ravel(), side="right").reshape(size.shape)
    magnitude = np.where(size < BORDER, np.minimum(magnitude, 15), np.maximum(magnitude, 16)).astype(np.uint8)
    return (
        means,
        lowest,
        step,
        scale_codes,
        (np.signbit(unit) * 2 + (magnitude >> 4)).astype(np.uint8),
        magnitude & 15,
    )


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8: little endian bit strings in the order of channels."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(codes.reshape(*codes.shape[:-1], -1, per_byte) << shifts, axis=-1)


def encode(keys: np.ndarray, values: np.ndarray, layout: DerivedLayout) -> np.ndarray:
    """The pages of one head of one layer.

    keys, values: float32 [num_tokens, head_dim]
    Returns uint8 [index_pages + refinement_pages, page_size]; slack is zero. The encoder rounds in float32,
    so that elements on the border of two cells may get either's code. Raises ValueError for other shapes, and
    for elements that are not finite or above LARGEST in size.
    """
    expected = (layout.num_tokens, layout.head_dim)
    if keys.shape != expected or values.shape != expected:
        raise ValueError(f"keys {keys.shape} and values {values.shape} are not {expected}")
    for name, rows in (("keys", keys), ("values", values)):
        if not (np.abs(rows) <= LARGEST).all():
            raise ValueError(f"{name} hold an element that is not finite, or too large for a sketch")
    pages = np.zeros((layout.index_pages + layout.refinement_pages, layout.page_size), np.uint8)
    index = pages[: layout.index_pages].reshape(-1)
    refinement = pages[layout.index_pages :]
    at = index_offsets(layout.num_tokens, layout.head_dim)
    header = new_header(layout)
    half_page = layout.unit_tokens * layout.head_dim // 2
    order = np.arange(layout.num_tokens)
    if has_token_order(layout):
        order = like_tokens_together(rotate(keys), layout.unit_tokens)
        pack_units(order, layout.unit_tokens, index[at.token_order : at.end])
    for name, rows, place in (("key", keys, 0), ("value", values, half_page)):
        means, lowest, step, scale_codes, codes, finer = _code(rotate(rows)[order])
        header[f"{name}_lowest"], header[f"{name}_step"] = lowest, step
        for part, raw in (
            (f"{name}_codes", _pack(codes, 2)),
            (f"{name}_scales", scale_codes),
            (f"{name}_means", means.view(np.uint8)),
        ):
            first = getattr(at, part)
            index[first : first + raw.size] = raw.ravel()
        finer = _pack(finer, 4)
        for unit in range(layout.refinement_pages):
            raw = finer[unit * layout.unit_tokens : (unit + 1) * layout.unit_tokens].ravel()
            refinement[unit, place : place + raw.size] = raw
    index[: SKETCH_HEADER.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    return pages


def _unpack(raw: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """uint8 [rows, head_dim]"""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    return ((raw[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1, head_dim)


def _rotated_rows(index: np.ndarray, refinement: np.ndarray, layout: DerivedLayout, refined: np.ndarray):
    """((rows, token scales) of keys, those of values) by place: float32 [num_tokens, head_dim], [num_tokens].

    index: uint8 [index_pages, page_size]; refinement: uint8 [refinement_pages, page_size], read where refined
    """
    index = index.reshape(-1)
    header = index[: SKETCH_HEADER.itemsize].view(SKETCH_HEADER)[0]
    fault = header_fault(header, layout)
    if fault:
        raise DamagedSketch(0, fault)
    num_tokens, head_dim = layout.num_tokens, layout.head_dim
    at = index_offsets(num_tokens, head_dim)
    num_means = -(-num_tokens // MEAN_TOKENS)
    half_page = layout.unit_tokens * head_dim // 2
    result = []
    for name, place, factor in (("key", 0, KEY_FACTOR), ("value", half_page, np.float32(1))):
        first = getattr(at, f"{name}_codes")
        codes = _unpack(index[first : first + num_tokens * head_dim // 4], 2, head_dim)
        first = getattr(at, f"{name}_means")
        means = index[first : first + 2 * num_means * head_dim].view("<f2").reshape(num_means, head_dim)
        if not np.isfinite(means).all():
            raise DamagedSketch(0, f"a mean of the {name}s is not finite")
        first = getattr(at, f"{name}_scales")
        scale_codes = index[first : first + num_tokens].astype(np.float64)
        scales = np.exp2(header[f"{name}_lowest"] + header[f"{name}_step"] * scale_codes)
        rows = table_2()[codes] * factor
        for unit in np.flatnonzero(refined):
            tokens = slice(unit * layout.unit_tokens, min((unit + 1) * layout.unit_tokens, num_tokens))
            num_bytes = (tokens.stop - tokens.start) * head_dim // 2
            finer = _unpack(refinement[unit, place : place + num_bytes], 4, head_dim)
            rows[tokens] = table_6()[codes[tokens] * 16 + finer]
        rows = rows * scales[:, None] + np.repeat(means.astype(np.float32), MEAN_TOKENS, axis=0)[:num_tokens]
        result.append((rows, scales))
    return result


def token_order(index: np.ndarray, layout: DerivedLayout) -> np.ndarray:
    """int64 [num_tokens]: the token at each place. index: uint8, index pages. Raises DamagedSketch."""
    index = index.reshape(-1)
    header = index[: SKETCH_HEADER.itemsize].view(SKETCH_HEADER)[0]
    at = index_offsets(layout.num_tokens, layout.head_dim)
    order = np.empty(layout.num_tokens, np.int64)
    packed = index[at.token_order : at.end]
    if not read_order(int(header["version"]), packed, layout.num_tokens, layout.unit_tokens, order):
        raise DamagedSketch(0, "an order of tokens that does not fill its units")
    return order


def decode(pages: np.ndarray, layout: DerivedLayout, refined: np.ndarray):
    """(keys, values), float32 [num_tokens, head_dim], in the original space and in the order of tokens.

    pages: uint8 [index_pages + refinement_pages, page_size]; refined: bool [refinement_pages], the units whose
    refinement page is read. Keys of other units are 1 / (1 - DISTORTION) times what is nearest, so that
    their products with queries are right on average. Raises DamagedSketch.
    """
    parts = _rotated_rows(pages[: layout.index_pages], pages[layout.index_pages :], layout, refined)
    places = np.argsort(token_order(pages[: layout.index_pages], layout))
    (keys, _), (values, _) = parts
    return unrotate(keys[places]), unrotate(values[places])


def _memory(addresses: np.ndarray, page_size: int) -> np.ndarray:
    """uint8 [num_pages, page_size], a copy."""
    pages = [np.frombuffer((ctypes.c_char * page_size).from_address(int(a)), np.uint8) for a in addresses]
    return np.array(pages, np.uint8).reshape(-1, page_size)


def _correction(deviation: np.ndarray) -> np.ndarray:
    """What comes off scores of a standard deviation; see CORRECTED_DEVIATION."""
    capped = np.minimum(deviation, CORRECTED_DEVIATION)
    return capped * (deviation - capped / 2)


def _attend(batch: SketchBatch, segment: int, units, refinement, out, lse, noise) -> None:
    """Fills out, lse and noise of a segment's `units`; refined where `refinement` has a page."""
    layout = sketch_layout(batch.page_size, batch.head_dim, int(batch.segment_num_tokens[segment]))
    pages = batch.index_pages[batch.segment_first_page[segment] : batch.segment_first_page[segment + 1]]
    index = _memory(pages, batch.page_size)
    refined = np.zeros(layout.refinement_pages, bool)
    images = np.zeros((layout.refinement_pages, batch.page_size), np.uint8)
    for unit, image in refinement.items():
        refined[unit], images[unit] = True, image
    try:
        (keys, key_scales), (values, value_scales) = _rotated_rows(index, images, layout, refined)
        order = token_order(index, layout)
    except DamagedSketch as damage:
        raise DamagedSketch(segment, damage.reason) from None
    first_unit = int(batch.segment_first_unit[segment])
    item = int(batch.segment_item[segment])
    heads = slice(
        batch.segment_kv_head[segment] * batch.group_size,
        (batch.segment_kv_head[segment] + 1) * batch.group_size,
    )
    for unit in units:
        tokens = slice(unit * layout.unit_tokens, min((unit + 1) * layout.unit_tokens, layout.num_tokens))
        positions = batch.segment_first_token[segment] + order[tokens]
        variance, distortion = SCORE_VARIANCE, DISTORTION
        if refined[unit]:
            variance = distortion = REFINED_DISTORTION
        for query in range(batch.queries.shape[1]):
            q = batch.queries[item, query, heads].astype(np.float64)
            k, v = keys[tokens].astype(np.float64), values[tokens].astype(np.float64)
            scores = batch.scale * q @ k.T
            score_variance = variance * np.outer((batch.scale**2 * q * q).sum(1), key_scales[tokens] ** 2)
            if not refined[unit]:
                scores -= _correction(np.sqrt(score_variance))
            if batch.softcap > 0:
                scores = batch.softcap * np.tanh(scores / batch.softcap)
            if len(batch.alibi_slopes):
                distance = batch.query_position[item, query] - positions
                scores = scores - batch.alibi_slopes[heads, None].astype(np.float64) * distance
            seen = (positions >= batch.visible_start[item, query]) & (
                positions < batch.visible_stop[item, query]
            )
            place = (first_unit + unit, query)
            if not seen.any():
                out[place], lse[place] = 0, -np.inf
                if noise is not None:
                    noise[place] = 0
                continue
            scores, score_variance = scores[:, seen], score_variance[:, seen]
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            lse[place] = (top + np.log(total))[:, 0]
            weights /= total
            out[place] = weights @ v[seen]
            if noise is not None:
                of_weights = weights**2 * -np.expm1(-score_variance)
                of_values = weights**2 * distortion
                energy = batch.head_dim * value_scales[tokens][seen] ** 2
                noise[place][:, 0] = (of_weights + of_values) @ energy
                noise[place][:, 1] = of_weights.sum(axis=1)


def sketch_units(batch: SketchBatch, segments, out, lse, noise=None) -> None:
    """See accel.sketch.kernels.sketch_units."""
    for segment in segments:
        num_units = int(batch.segment_first_unit[segment + 1] - batch.segment_first_unit[segment])
        _attend(batch, segment, range(num_units), {}, out, lse, noise)


def refined_units(batch: SketchBatch, places, chosen, refinement_pages, out, lse, noise=None) -> None:
    """See accel.sketch.kernels.refined_units."""
    segments = batch.unit_segment(chosen)
    for place in places:
        segment = int(segments[place])
        unit = int(chosen[place] - batch.segment_first_unit[segment])
        image = _memory(refinement_pages[place : place + 1], batch.page_size)[0]
        _attend(batch, segment, [unit], {unit: image}, out, lse, noise)
