"""The definition of attention over pages: plain NumPy in float64. Other workers are compared with it."""

import ctypes

import ml_dtypes
import numpy as np

from accel.workers import AttentionBatch

name = "reference"

_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
}


def _rows(batch: AttentionBatch, address: np.uint64, num_tokens: np.int32) -> np.ndarray:
    """float64 [num_tokens, head_dim]: a page's rows."""
    dtype = _DTYPES[batch.dtype]
    size = int(num_tokens) * batch.head_dim * dtype.itemsize
    raw = np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype=dtype)
    return raw.reshape(int(num_tokens), batch.head_dim).astype(np.float64)


def attend_units(
    batch: AttentionBatch, first_unit: int, last_unit: int, out: np.ndarray, lse: np.ndarray
) -> None:
    """See AttentionBatch. Source: softmax attention, arXiv:1706.03762; lse as in arXiv:1805.02867."""
    for unit in range(first_unit, last_unit):
        pages = range(batch.unit_first_page[unit], batch.unit_first_page[unit + 1])
        counts = [batch.page_num_tokens[page] for page in pages]
        keys = np.concatenate([_rows(batch, batch.key_pages[p], n) for p, n in zip(pages, counts, strict=True)])
        values = np.concatenate(
            [_rows(batch, batch.value_pages[p], n) for p, n in zip(pages, counts, strict=True)]
        )
        positions = np.concatenate(
            [batch.page_first_token[p] + np.arange(n) for p, n in zip(pages, counts, strict=True)]
        )
        item = batch.unit_item[unit]
        first_head = batch.unit_kv_head[unit] * batch.group_size
        for query in range(batch.queries.shape[1]):
            start, stop = batch.visible_start[item, query], batch.visible_stop[item, query]
            seen = (positions >= start) & (positions < stop)
            if not seen.any():
                out[unit, query], lse[unit, query] = 0, -np.inf
                continue
            heads = batch.queries[item, query, first_head : first_head + batch.group_size].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # stored infinities and NaN go where they go
                scores = batch.scale * heads @ keys[seen].T
                top = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True)
                out[unit, query] = (weights / total) @ values[seen]
                lse[unit, query] = (top + np.log(total))[:, 0]
