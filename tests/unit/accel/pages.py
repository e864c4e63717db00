"""Attention batches over pages in memory, for the tests of the workers."""

import ml_dtypes
import numpy as np

from accel.workers import AttentionBatch

NUMPY_DTYPE = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
SLACK = 0x7E  # what lies behind a page's rows: NaN in float16, 1e38 elsewhere; must never be read


def token_arrays(num_kv_heads: int, num_tokens: int, head_dim: int, dtype: str, seed: int):
    """Keys and values [num_kv_heads, num_tokens, head_dim] in storage dtype."""
    random = np.random.default_rng(seed)
    shape = (num_kv_heads, num_tokens, head_dim)
    return tuple(random.standard_normal(shape, np.float32).astype(NUMPY_DTYPE[dtype]) for _ in range(2))


class Pages:
    """Rows packed into pages at scattered aligned addresses; keeps the memory alive."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._memory: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> int:
        """Store rows [num_tokens, head_dim] in a new page; returns its address."""
        memory = np.full(self.page_size + 64, SLACK, np.uint8)
        self._memory.append(memory)
        start = -memory.ctypes.data % 64
        raw = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        memory[start : start + len(raw)] = raw
        return memory.ctypes.data + start

    def memory_at(self, address: int) -> np.ndarray:
        """uint8 [page_size]: a page of an address that `add` gave, to be changed."""
        for memory in self._memory:
            start = address - memory.ctypes.data
            if 0 <= start < 64:
                return memory[start : start + self.page_size]
        raise KeyError(address)


def make_batch(
    keys: np.ndarray,
    values: np.ndarray,
    queries: np.ndarray,
    visible_start: np.ndarray,
    visible_stop: np.ndarray,
    *,
    dtype: str,
    pages_per_unit: int = 1 << 30,
    page_size: int = 4096,
    group_tokens: int = 1 << 30,
    scale: float | None = None,
) -> tuple[AttentionBatch, Pages]:
    """A batch over the same tokens for all items; pages are part filled at the end of each token group.

    keys, values: [num_kv_heads, num_tokens, head_dim]; the rest as in AttentionBatch. The second result
    must live as long as the batch.
    """
    num_kv_heads, num_tokens, head_dim = keys.shape
    num_items, _, num_query_heads, _ = queries.shape
    per_page = page_size // (head_dim * keys.dtype.itemsize)
    pages = Pages(page_size)
    spans = []
    for group in range(0, num_tokens, group_tokens):
        stop = min(group + group_tokens, num_tokens)
        spans += [(first, min(first + per_page, stop)) for first in range(group, stop, per_page)]
    addresses = [
        [(pages.add(keys[head, a:b]), pages.add(values[head, a:b])) for a, b in spans]
        for head in range(num_kv_heads)
    ]
    key_pages, value_pages, first_token, num_rows, unit_first, unit_item, unit_head = (
        [],
        [],
        [],
        [],
        [0],
        [],
        [],
    )
    for item in range(num_items):
        for head in range(num_kv_heads):
            for start in range(0, len(spans), pages_per_unit):
                for page in range(start, min(start + pages_per_unit, len(spans))):
                    key_pages.append(addresses[head][page][0])
                    value_pages.append(addresses[head][page][1])
                    first_token.append(spans[page][0])
                    num_rows.append(spans[page][1] - spans[page][0])
                unit_first.append(len(key_pages))
                unit_item.append(item)
                unit_head.append(head)
    batch = AttentionBatch(
        dtype=dtype,
        head_dim=head_dim,
        group_size=num_query_heads // num_kv_heads,
        key_pages=np.array(key_pages, np.uint64),
        value_pages=np.array(value_pages, np.uint64),
        page_first_token=np.array(first_token, np.int64),
        page_num_tokens=np.array(num_rows, np.int32),
        unit_first_page=np.array(unit_first, np.int64),
        unit_item=np.array(unit_item, np.int32),
        unit_kv_head=np.array(unit_head, np.int32),
        queries=queries.astype(np.float32),
        visible_start=np.asarray(visible_start, np.int64),
        visible_stop=np.asarray(visible_stop, np.int64),
        scale=head_dim**-0.5 if scale is None else scale,
    )
    return batch, pages


def empty_results(batch: AttentionBatch) -> tuple[np.ndarray, np.ndarray]:
    """out and lse for all units, filled with what no test expects."""
    shape = (len(batch.unit_item), batch.queries.shape[1], batch.group_size)
    return np.full((*shape, batch.head_dim), 7e7, np.float32), np.full(shape, 7e7, np.float32)
