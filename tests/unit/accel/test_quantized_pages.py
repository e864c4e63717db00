"""Quantized pages: codes and scales against their definition in NumPy, and attention over them."""

import ml_dtypes
import numpy as np
import pytest

from accel.quantized_pages import LARGEST_CODE, decode_pages, encode_pages
from accel.workers import AttentionBatch, BadScales, UnitRange, reference
from accel.workers import numba as numba_worker
from spdk_glue.vendor_command import DTYPE_OF_NAME, scale_bytes, tokens_per_page
from tests.unit.accel.pages import empty_results

PAGE_SIZE = 4096
SHAPES = [("float8_e4m3", 128), ("float8_e4m3", 80), ("int8", 128), ("int8", 40), ("int4", 128), ("int4", 96)]


def float16_images(rows: np.ndarray) -> np.ndarray:
    """uint8 [num_runs, num_pages, PAGE_SIZE] of rows [num_runs, num_rows, head_dim]."""
    num_runs, num_rows, head_dim = rows.shape
    per_page = PAGE_SIZE // (2 * head_dim)
    num_pages = -(-num_rows // per_page)
    padded = np.zeros((num_runs, num_pages * per_page, head_dim), np.float16)
    padded[:, :num_rows] = rows
    images = np.zeros((num_runs, num_pages, PAGE_SIZE), np.uint8)
    images[:, :, : per_page * 2 * head_dim] = padded.view(np.uint8).reshape(num_runs, num_pages, -1)
    return images


def encoded(rows: np.ndarray, dtype: str, first_row: int = 0) -> np.ndarray:
    head_dim, kind = rows.shape[2], DTYPE_OF_NAME[dtype]
    num_rows = rows.shape[1] - first_row
    num_pages = -(-num_rows // tokens_per_page(PAGE_SIZE, head_dim, kind))
    pages = np.zeros((len(rows), num_pages, PAGE_SIZE), np.uint8)
    per_page = PAGE_SIZE // (2 * head_dim)
    encode_pages(float16_images(rows), per_page, first_row, num_rows, kind, head_dim, pages)
    return pages


def uneven_rows(num_runs: int, num_rows: int, head_dim: int, seed: int = 3) -> np.ndarray:
    """Channels of very different size, as keys have them, one of them zero."""
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.uniform(-3, 2, head_dim)
    sizes[5] = 0
    return (random.standard_normal((num_runs, num_rows, head_dim)) * sizes).astype(np.float16)


def scales_of(pages: np.ndarray, dtype: str, head_dim: int) -> np.ndarray:
    offset = PAGE_SIZE - scale_bytes(head_dim, DTYPE_OF_NAME[dtype])
    return np.ascontiguousarray(pages[..., offset:]).view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(("dtype", "head_dim"), SHAPES)
def test_codes_are_the_nearest(dtype, head_dim):
    per_page = tokens_per_page(PAGE_SIZE, head_dim, DTYPE_OF_NAME[dtype])
    rows = uneven_rows(2, 2 * per_page + 3, head_dim)
    pages = encoded(rows, dtype)
    scales = scales_of(pages, dtype, head_dim)
    limit = LARGEST_CODE[DTYPE_OF_NAME[dtype]]
    for run in range(2):
        found = decode_pages(pages[run], DTYPE_OF_NAME[dtype], head_dim).astype(np.float64)
        for page in range(pages.shape[1]):
            wanted = rows[run, page * per_page : (page + 1) * per_page].astype(np.float64)
            scale = scales[run, page]
            largest = np.abs(wanted).max(axis=0)
            assert (scale >= largest / limit).all() and (scale <= np.maximum(largest / limit * 1.01, 1)).all()
            if dtype == "float8_e4m3":
                exact = (wanted / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            else:
                exact = np.rint(wanted / scale)
            assert np.abs(exact).max() <= limit
            expected = (exact * scale).astype(np.float16).astype(np.float64)
            # a value half way between two codes may go to either: the product by 1 / scale is rounded
            step = np.abs(found[page][: len(wanted)] - wanted)
            assert (step <= np.abs(expected - wanted) * 1.001 + 1e-3 * scale + 1e-7).all()
            assert (found[page][: len(wanted)] != expected).mean() < 0.01


@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_the_largest_values(dtype):
    rows = np.full((1, 20, 64), np.finfo(np.float16).max, np.float16)
    rows[0, 3] *= -1
    found = decode_pages(encoded(rows, dtype.name.lower())[0], dtype, 64)
    np.testing.assert_allclose(found[0, :20].astype(np.float64), rows[0].astype(np.float64), rtol=0.01)


def test_rows_within_a_run():
    rows = uneven_rows(1, 100, 64)
    np.testing.assert_array_equal(encoded(rows, "int8", 40), encoded(rows[:, 40:], "int8"))


def batch_of(pages, dtype, head_dim, num_rows, group_size, num_queries=1, **options):
    """A batch over pages [2 (K, V), num_pages, PAGE_SIZE] of one head."""
    per_page = tokens_per_page(PAGE_SIZE, head_dim, DTYPE_OF_NAME[dtype])
    num_pages = pages.shape[1]
    random = np.random.default_rng(8)
    first = per_page * np.arange(num_pages)
    addresses = pages.ctypes.data + PAGE_SIZE * np.arange(2 * num_pages, dtype=np.uint64)
    visible_stop = num_rows - np.arange(num_queries)[::-1]
    return AttentionBatch(
        dtype=dtype,
        head_dim=head_dim,
        group_size=group_size,
        key_pages=addresses[:num_pages],
        value_pages=addresses[num_pages:],
        page_first_token=first,
        page_num_tokens=np.minimum(per_page, num_rows - first).astype(np.int32),
        unit_first_page=np.array([0, num_pages // 2, num_pages]),
        unit_item=np.zeros(2, np.int32),
        unit_kv_head=np.zeros(2, np.int32),
        queries=random.standard_normal((1, num_queries, group_size, head_dim)).astype(np.float32),
        visible_start=np.full((1, num_queries), 3),
        visible_stop=visible_stop[None],
        scale=head_dim**-0.5,
        scales_offset=PAGE_SIZE - scale_bytes(head_dim, DTYPE_OF_NAME[dtype]),
        **options,
    )


@pytest.mark.parametrize(("dtype", "head_dim"), SHAPES)
@pytest.mark.parametrize(("group_size", "num_queries"), [(1, 1), (8, 1), (5, 3)])
def test_attention_over_codes(dtype, head_dim, group_size, num_queries):
    rows = np.random.default_rng(4).standard_normal((2, 500, head_dim)).astype(np.float16)
    pages = encoded(rows, dtype)  # lives as long as the batch
    batch = batch_of(pages, dtype, head_dim, 500, group_size, num_queries)
    results = []
    for worker in (numba_worker, reference):
        out, lse = empty_results(batch)
        worker.attend_units(batch, UnitRange(0, 2), out, lse)
        results.append((out, lse))
    (out, lse), (expected, expected_lse) = results
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)
    assert np.abs(out - expected).max() <= 5e-6 * np.abs(expected).max()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("worker", [numba_worker, reference])
def test_bad_scales_are_named(bad, kind, worker):
    rows = np.random.default_rng(4).standard_normal((2, 200, 128)).astype(np.float16)
    pages = encoded(rows, "int8")
    batch = batch_of(pages, "int8", 128, 200, 4)
    pages[kind, 5, PAGE_SIZE - 2 * 77 :][:2] = np.array([bad], ml_dtypes.bfloat16).view(np.uint8)
    with pytest.raises(BadScales) as raised:
        worker.attend_units(batch, UnitRange(0, 2), *empty_results(batch))
    assert (raised.value.page, raised.value.of_values) == (5, bool(kind))
