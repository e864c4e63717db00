"""The definition of attention over pages: plain NumPy in float64. Other workers are compared with it."""

import ctypes

import ml_dtypes
import numpy as np

from accel.workers import AttentionBatch, UnitRange, check_shape

name = "reference"

_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
}


def _rows(batch: AttentionBatch, addresses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64 [sum of counts, head_dim]: the rows in use of some pages."""
    dtype = _DTYPES[batch.dtype]
    pages = [np.empty((0, batch.head_dim))]
    for address, count in zip(addresses.tolist(), counts.tolist(), strict=True):
        raw = (ctypes.c_char * (count * batch.head_dim * dtype.itemsize)).from_address(address)
        pages.append(np.frombuffer(raw, dtype=dtype).reshape(count, batch.head_dim).astype(np.float64))
    return np.concatenate(pages)


def _attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float):
    """(out [heads, head_dim], lse [heads]) of queries [heads, head_dim] over all rows of keys and values."""
    if len(keys) == 0:
        return 0, -np.inf
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # infinities and NaN go where they go
        scores = scale * queries @ keys.T
        top = scores.max(axis=1, keepdims=True)
        top[np.isneginf(top)] = 0  # tokens of score -inf weigh nothing, also where there are no others
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out = np.where(total == 0, 0, weights @ values / total)
        return out, (top + np.log(total))[:, 0]


def attend_units(batch: AttentionBatch, units: UnitRange, out: np.ndarray, lse: np.ndarray) -> None:
    """See AttentionBatch. Source: softmax attention, arXiv:1706.03762; lse as in arXiv:1805.02867."""
    check_shape(batch.dtype, batch.head_dim, batch.group_size)
    for unit in units:
        pages = slice(batch.unit_first_page[unit], batch.unit_first_page[unit + 1])
        counts = batch.page_num_tokens[pages]
        keys = _rows(batch, batch.key_pages[pages], counts)
        values = _rows(batch, batch.value_pages[pages], counts)
        first_rows = np.cumsum(counts) - counts
        positions = np.repeat(batch.page_first_token[pages] - first_rows, counts) + np.arange(len(keys))
        item = batch.unit_item[unit]
        first_head = batch.unit_kv_head[unit] * batch.group_size
        for query in range(batch.queries.shape[1]):
            seen = positions >= batch.visible_start[item, query]
            seen &= positions < batch.visible_stop[item, query]
            heads = batch.queries[item, query, first_head : first_head + batch.group_size].astype(np.float64)
            out[unit, query], lse[unit, query] = _attend(heads, keys[seen], values[seen], batch.scale)


def prepare(dtype: str, head_dim: int, group_size: int) -> float:
    """Nothing to compile: 0 seconds. Raises ValueError as the other workers do."""
    check_shape(dtype, head_dim, group_size)
    return 0.0
