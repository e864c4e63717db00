"""The definition of attention over pages: plain NumPy in float64. Other workers are compared with it."""

import ctypes

import ml_dtypes
import numpy as np

from accel.workers import QUANTIZED, AttentionBatch, BadScales, UnitRange, check_shape
from spdk_glue.vendor_command import INT4_CHANNELS

name = "reference"

_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype("i1"),
}
_HALF = INT4_CHANNELS // 2


def _memory(address: int, num_bytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * num_bytes).from_address(address), np.uint8)


def _codes(address: int, count: int, head_dim: int, dtype: str) -> np.ndarray:
    """float64 [count, head_dim]: what a page's rows hold, scales left aside."""
    if dtype != "int4":
        raw = _memory(address, count * head_dim * _DTYPES[dtype].itemsize)
        return raw.view(_DTYPES[dtype]).reshape(count, head_dim).astype(np.float64)
    raw = _memory(address, count * head_dim // 2).reshape(count, -1, _HALF)
    return np.concatenate([raw & 15, raw >> 4], axis=2).reshape(count, head_dim) - 8.0


def _rows(batch: AttentionBatch, pages: slice, counts: np.ndarray, of_values: bool) -> np.ndarray:
    """float64 [sum of counts, head_dim]: the rows in use of some pages."""
    addresses = (batch.value_pages if of_values else batch.key_pages)[pages]
    rows = [np.empty((0, batch.head_dim))]
    for place, (address, count) in enumerate(zip(addresses.tolist(), counts.tolist(), strict=True)):
        values = _codes(address, count, batch.head_dim, batch.dtype)
        if batch.dtype in QUANTIZED:
            raw = _memory(address + batch.scales_offset, batch.head_dim * _DTYPES["bfloat16"].itemsize)
            scales = raw.view(_DTYPES["bfloat16"]).astype(np.float64)
            if not ((scales > 0) & np.isfinite(scales)).all():
                raise BadScales(pages.start + place, of_values)
            values = values * scales
        rows.append(values)
    return np.concatenate(rows)


def _attend(queries, keys, values, scale, softcap, bias):
    """(out [heads, head_dim], lse [heads]) of queries [heads, head_dim] over all rows of keys and values.

    bias: [heads, num_rows], or 0
    """
    if len(keys) == 0:
        return 0, -np.inf
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # infinities and NaN go where they go
        scores = scale * queries @ keys.T
        if softcap > 0:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + bias
        top = scores.max(axis=1, keepdims=True)
        top[np.isneginf(top)] = 0  # tokens of score -inf weigh nothing, also where there are no others
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out = np.where(total == 0, 0, weights @ values / total)
        return out, (top + np.log(total))[:, 0]


def attend_units(batch: AttentionBatch, units: UnitRange, out: np.ndarray, lse: np.ndarray) -> None:
    """See AttentionBatch.

    Sources: softmax attention, arXiv:1706.03762; lse as in arXiv:1805.02867; soft caps, arXiv:2408.00118;
    linear biases (ALiBi), arXiv:2108.12409.
    """
    check_shape(batch.dtype, batch.head_dim, batch.group_size)
    for unit in units:
        pages = slice(int(batch.unit_first_page[unit]), int(batch.unit_first_page[unit + 1]))
        counts = batch.page_num_tokens[pages]
        keys = _rows(batch, pages, counts, of_values=False)
        values = _rows(batch, pages, counts, of_values=True)
        first_rows = np.cumsum(counts) - counts
        positions = np.repeat(batch.page_first_token[pages] - first_rows, counts) + np.arange(len(keys))
        in_use = np.ones(len(keys), bool)
        if len(batch.page_first_row):
            in_use = positions >= np.repeat(batch.page_first_token[pages] + batch.page_first_row[pages], counts)
        item = batch.unit_item[unit]
        first_head = batch.unit_kv_head[unit] * batch.group_size
        for query in range(batch.queries.shape[1]):
            seen = in_use & (positions >= batch.visible_start[item, query])
            seen &= positions < batch.visible_stop[item, query]
            of_group = slice(first_head, first_head + batch.group_size)
            heads = batch.queries[item, query, of_group].astype(np.float64)
            bias = 0
            if len(batch.alibi_slopes):
                distance = batch.query_position[item, query] - positions[seen]
                bias = -batch.alibi_slopes[of_group, None].astype(np.float64) * distance
            out[unit, query], lse[unit, query] = _attend(
                heads, keys[seen], values[seen], batch.scale, batch.softcap, bias
            )


def prepare(dtype: str, head_dim: int, group_size: int) -> float:
    """Nothing to compile: 0 seconds. Raises ValueError as the other workers do."""
    check_shape(dtype, head_dim, group_size)
    return 0.0
