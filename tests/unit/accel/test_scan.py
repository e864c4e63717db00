"""The two passes over sketches: what units weigh, and what those add up to that are not refined."""

import threading

import numpy as np
import pytest

from accel.merge import merge_units
from accel.sketch import DamagedSketch, reference, scan
from accel.workers import UnitRange
from accel.workers.target import multiplies_bytes
from tests.unit.accel.test_sketch import CASES, make

NATIVE = [
    pytest.param(True, marks=pytest.mark.skipif(not multiplies_bytes(), reason="the CPU multiplies no bytes")),
    False,
]


def run(sketches, refined, native=None, num_threads=1):
    """(Scan, out and lse by segment) of both passes."""
    batch = sketches.batch
    found, queries = scan.Scan.of(batch), scan.RoundedQueries.of(batch)
    shape = (batch.num_segments, batch.queries.shape[1], batch.group_size)
    out, lse = np.full((*shape, batch.head_dim), 7e7, np.float32), np.full(shape, 7e7, np.float32)
    for work in (
        lambda segments: scan.score_units(batch, queries, segments, found, native),
        lambda segments: scan.sum_units(batch, segments, found, refined, out, lse, native),
    ):
        segments = UnitRange(0, batch.num_segments)
        threads = [threading.Thread(target=work, args=(segments,)) for _ in range(num_threads - 1)]
        for thread in threads:
            thread.start()
        work(segments)
        for thread in threads:
            thread.join()
    return found, out, lse


def definition(sketches):
    """out, lse of all units, of the 2-bit codes as they are."""
    out, lse, _ = results = sketches.results()
    reference.sketch_units(sketches.batch, UnitRange(0, sketches.batch.num_segments), *results)
    return out, lse


@pytest.mark.parametrize("native", NATIVE, ids=["native", "portable"])
@pytest.mark.parametrize("case", [0, 1, 2, 3, 5, 6], ids=lambda case: "-".join(map(str, CASES[case][:7])))
def test_it_is_the_definition_but_for_rounding(case, native):
    """Rounded queries and weights may cost a hundredth of what the codes do, and no more."""
    if case not in (0, 6) and not native:
        pytest.skip("compiled for two shapes")
    sketches = make(CASES[case], amplitude=0.5)
    batch = sketches.batch
    refined = np.zeros(batch.num_units, bool)
    refined[::3] = True
    found, out, lse = run(sketches, refined, native)
    units, units_lse = definition(sketches)
    seen = np.isfinite(units_lse)
    np.testing.assert_array_equal(np.isfinite(found.lse), seen)
    assert np.abs(found.lse[seen] - units_lse[seen]).max() < 0.06
    assert np.abs(found.lse[seen] - units_lse[seen]).mean() < 0.012
    kept = np.flatnonzero(~refined)
    for segment in range(batch.num_segments):
        its = kept[batch.unit_segment(kept) == segment]
        zeros = np.zeros(len(its), np.int32)
        wanted, wanted_lse = merge_units(units[its], units_lse[its], zeros, zeros, 1, 1)
        is_seen = np.isfinite(wanted_lse[0])
        np.testing.assert_array_equal(np.isfinite(lse[segment]), is_seen)
        assert not out[segment][~is_seen].any()
        np.testing.assert_allclose(lse[segment][is_seen], wanted_lse[0][is_seen], atol=0.05)
        error = np.linalg.norm(out[segment] - wanted[0])
        assert error <= 0.012 * np.linalg.norm(wanted[0])


@pytest.mark.skipif(not multiplies_bytes(), reason="the CPU multiplies no bytes")
@pytest.mark.parametrize("case", [0, 6])
def test_products_of_bytes_are_exact(case):
    """Instructions that saturate, or take the other operand as signed, would differ from plain arithmetic."""
    sketches = make(CASES[case])
    refined = np.zeros(sketches.batch.num_units, bool)
    for native, portable in zip(run(sketches, refined, True), run(sketches, refined, False), strict=True):
        if isinstance(native, scan.Scan):
            native, portable = native.lse, portable.lse
        np.testing.assert_allclose(native, portable, rtol=2e-6, atol=2e-6)


def test_threads_share_segments():
    """A segment scored twice, or weights written over another's, would be wrong without an error."""
    sketches = make(CASES[0])
    refined = np.zeros(sketches.batch.num_units, bool)
    alone, shared = run(sketches, refined), run(sketches, refined, num_threads=3)
    np.testing.assert_array_equal(alone[0].lse, shared[0].lse)
    np.testing.assert_array_equal(alone[1], shared[1])


def test_nothing_is_left_where_all_is_refined():
    """A segment without units must not weigh anything."""
    sketches = make(CASES[0])
    _, out, lse = run(sketches, np.ones(sketches.batch.num_units, bool))
    assert np.isneginf(lse).all() and not out.any()


def test_pages_need_not_be_neighbours():
    """The cache puts a segment's pages into several lines."""
    sketches = make(CASES[0])
    batch = sketches.batch
    refined = np.zeros(batch.num_units, bool)
    wanted = run(sketches, refined)
    addresses = batch.index_pages
    kept = [sketches.pages.memory_at(int(address)).copy() for address in addresses]
    room = np.zeros((2 * len(kept) + 2, batch.page_size), np.uint8)
    for number, page in enumerate(kept):
        room[2 * number] = page
    batch.index_pages = np.array([room[2 * number].ctypes.data for number in range(len(kept))], np.uint64)
    found = run(sketches, refined)
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[2], wanted[2])


def test_a_query_that_is_no_number_gives_none():
    """A score of NaN must not pass for a small one."""
    sketches = make(CASES[0])
    sketches.batch.queries[..., 3] = np.nan
    found, out, lse = run(sketches, np.zeros(sketches.batch.num_units, bool))
    assert np.isnan(found.lse).all() and np.isnan(lse).all() and np.isnan(out).all()


def test_foreign_bytes_are_refused():
    """Index pages of anything else would be read as codes, and give an answer."""
    sketches = make(CASES[0])
    batch = sketches.batch
    page = sketches.pages.memory_at(int(batch.index_pages[batch.segment_first_page[1]]))
    at = reference.index_offsets(512, 64).value_means + 2 * 70 + 1
    other = sketches.pages.memory_at(int(batch.index_pages[batch.segment_first_page[3] + at // 4096]))
    page[0] = 0
    other[at % 4096] = 0x7E
    queries, found = scan.RoundedQueries.of(batch), scan.Scan.of(batch)
    segments = UnitRange(0, batch.num_segments)
    for damaged in (1, 3):
        with pytest.raises(DamagedSketch) as damage:
            scan.score_units(batch, queries, segments, found)
        assert damage.value.segment == damaged
