"""The numba worker against the reference, which is the definition."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from accel.workers import AttentionBatch, load_worker
from spdk_glue import dma

PAGE_SIZE = 4096
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# relative to the largest output: all arithmetic is float32, the storage type is read exactly
TOLERANCE = 5e-6


def make_batch(dtype, head_dim, group_size, num_tokens=300, num_queries=1, num_items=2, num_kv_heads=2, seed=0):
    """(batch, memory): pages of random rows, ragged at the end of each 256-token group."""
    random = np.random.default_rng(seed)
    rows_per_page = PAGE_SIZE // (head_dim * np.dtype(DTYPES[dtype]).itemsize)
    starts = [
        (token, min(rows_per_page, 256 - token % 256, num_tokens - token))
        for group in range(0, num_tokens, 256)
        for token in range(group, min(group + 256, num_tokens), rows_per_page)
    ]
    memory = dma.allocate(num_items * num_kv_heads * 2 * len(starts) * PAGE_SIZE)
    memory[:] = 0xFF  # slack reads as NaN: nothing may look at it
    pages = memory.reshape(num_items, num_kv_heads, 2, len(starts), PAGE_SIZE)
    addresses = dma.page_addresses(memory, PAGE_SIZE).reshape(pages.shape[:-1])
    for index in np.ndindex(pages.shape[:-1]):
        rows = random.standard_normal((starts[index[-1]][1], head_dim)).astype(DTYPES[dtype])
        pages[index][: rows.nbytes] = rows.reshape(-1).view(np.uint8)
    units = [(i, h, part) for i in range(num_items) for part in (0, 1) for h in range(num_kv_heads)]
    cut = [0, len(starts) // 2, len(starts)]
    spans = [slice(cut[part], cut[part + 1]) for _, _, part in units]
    lengths = [span.stop - span.start for span in spans]
    batch = AttentionBatch(
        dtype=dtype,
        head_dim=head_dim,
        group_size=group_size,
        key_pages=np.concatenate([addresses[i, h, 0, s] for (i, h, _), s in zip(units, spans, strict=True)]),
        value_pages=np.concatenate([addresses[i, h, 1, s] for (i, h, _), s in zip(units, spans, strict=True)]),
        page_first_token=np.concatenate([np.array([t for t, _ in starts[s]], np.int64) for s in spans]),
        page_num_tokens=np.concatenate([np.array([n for _, n in starts[s]], np.int32) for s in spans]),
        unit_first_page=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        unit_item=np.array([i for i, _, _ in units], np.int32),
        unit_kv_head=np.array([h for _, h, _ in units], np.int32),
        queries=random.standard_normal(
            (num_items, num_queries, num_kv_heads * group_size, head_dim), np.float32
        ),
        visible_start=np.zeros((num_items, num_queries), np.int64),
        visible_stop=np.full((num_items, num_queries), num_tokens, np.int64),
        scale=head_dim**-0.5,
    )
    return batch, memory


def attend(name, batch):
    num_units = len(batch.unit_item)
    shape = (num_units, batch.queries.shape[1], batch.group_size)
    out, lse = np.full((*shape, batch.head_dim), np.nan, np.float32), np.full(shape, np.nan, np.float32)
    load_worker(name).attend_units(batch, 0, num_units, out, lse)
    return out, lse


def assert_same(batch):
    out, lse = attend("numba", batch)
    want_out, want_lse = attend("reference", batch)
    assert np.abs(out - want_out).max() <= TOLERANCE * np.abs(want_out).max()
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group_size"),
    [
        ("float16", 32, 1),
        ("float16", 64, 4),
        ("float16", 128, 8),
        ("float16", 96, 3),
        ("bfloat16", 80, 16),
        ("bfloat16", 128, 5),
        ("float32", 256, 2),
        ("float32", 192, 7),
        ("float32", 64, 11),
    ],
)
def test_shapes(dtype, head_dim, group_size):
    """Wrong numbers for a storage type, head_dim or group size."""
    batch, _memory = make_batch(dtype, head_dim, group_size)
    assert_same(batch)


def test_visible_ranges():
    """Causal offsets and windows: a query must see its tokens and no others, and may see none."""
    batch, _memory = make_batch("float16", 64, 4, num_queries=7)
    batch.visible_start[0] = [0, 5, 31, 32, 299, 300, 100]
    batch.visible_stop[0] = [1, 300, 33, 64, 300, 300, 40]
    batch.visible_start[1] = 290
    assert_same(batch)


def test_values_that_are_not_finite():
    """NaN and infinity in the cache: seen by the heads that read them, as the reference has it, by no other."""
    batch, memory = make_batch("float16", 64, 4)
    rows = memory.view(np.float16)
    rows[:64] = np.nan  # first row of the first page of K: item 0, head 0
    out, lse = attend("numba", batch)
    want_out, want_lse = attend("reference", batch)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want_out))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(want_lse))
    assert np.isnan(out).any()


def test_large_scores():
    """Scores far apart: the running maximum must keep exp from overflowing."""
    batch, _memory = make_batch("float32", 64, 4)
    batch.queries *= 300
    assert_same(batch)


def test_threads_on_disjoint_units():
    """Workers share a batch: each writes its own units and nothing else."""
    batch, _memory = make_batch("float16", 64, 4, num_items=5)
    want_out, want_lse = attend("numba", batch)
    out, lse = np.full_like(want_out, np.nan), np.full_like(want_lse, np.nan)
    worker = load_worker("numba")
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(batch.unit_item), 3):
            stop = min(start + 3, len(batch.unit_item))
            pool.submit(worker.attend_units, batch, start, stop, out, lse)
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(lse, want_lse)


def test_unknown_worker():
    """A typing error in a worker's name."""
    with pytest.raises(KeyError, match="choose one of"):
        load_worker("gpu")
