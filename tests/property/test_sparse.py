"""Sketches and SparF over any sizes, cuts and ranges, against their definitions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.merge import merge_units
from accel.sketch import kernels, reference
from accel.sketch.encoder import encode
from accel.sketch.reference import decode, sketch_layout
from accel.sparf import reference as sparf_reference
from accel.workers import UnitRange
from tests.unit.accel.sketches import Sketches

SHAPES = [(64, 4), (40, 3)]  # a compiled kernel each, of those that the unit tests use


@st.composite
def sketch_cases(draw):
    head_dim, group_size = draw(st.sampled_from(SHAPES))
    num_tokens = draw(st.integers(1, 700))
    num_queries = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    size = 10.0 ** draw(st.integers(-3, 3))
    keys = size * random.standard_normal((1, num_tokens, head_dim)) + draw(st.sampled_from([0, 5]))
    values = random.standard_normal((1, num_tokens, head_dim)) * 10.0 ** draw(st.integers(-3, 3))
    values[:, random.random(num_tokens) < draw(st.sampled_from([0, 0.5, 1]))] = draw(st.sampled_from([0, 2]))
    queries = random.standard_normal((1, num_queries, group_size, head_dim)) / size
    bounds = np.sort(random.integers(-3, num_tokens + 4, (2, 1, num_queries)), axis=0)
    options = {"softcap": draw(st.sampled_from([0.0, 4.0]))}
    if draw(st.booleans()):
        options["alibi_slopes"] = random.random(group_size).astype(np.float32) / 10
        options["query_position"] = num_tokens + random.integers(0, 9, (1, num_queries))
    return Sketches(
        keys.astype(np.float32),
        values.astype(np.float32),
        queries.astype(np.float32),
        bounds[0].clip(0),
        bounds[1].clip(0),
        page_size=draw(st.sampled_from([4096, 8192, 16384, 65536])),
        segment_tokens=draw(st.integers(1, num_tokens)) if draw(st.booleans()) else None,
        **options,
    )


@settings(max_examples=60, deadline=None)
@given(sketch_cases(), st.randoms(use_true_random=False))
def test_kernels_agree_with_the_definition(sketches, random):
    """Whatever the cuts: elsewhere a row taken from the wrong place shows as no more than noise."""
    batch = sketches.batch
    refined = np.array([unit for unit in range(batch.num_units) if random.random() < 0.4], np.int64)
    results = []
    for module in (kernels, reference):
        out, lse, noise = sketches.results()
        module.sketch_units(batch, UnitRange(0, batch.num_segments), out, lse, noise)
        pages = sketches.refinement_pages[refined]
        module.refined_units(batch, UnitRange(0, len(refined)), refined, pages, out, lse, noise)
        results.append((out, lse))
    (out, lse), (expected, expected_lse) = results
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    seen = np.isfinite(expected_lse)
    # float32: of large terms a small score may be left, whose error is theirs, and one of weights, too
    largest = max(1.0, np.abs(expected_lse[seen]).max(initial=0))
    np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=5e-6, atol=max(5e-6, 2e-7 * largest))
    limit = 1e-5 * largest
    assert np.abs(out - expected).max() <= limit * max(np.abs(expected).max(), 1e-30)


@settings(max_examples=40, deadline=None)
@given(sketch_cases())
def test_cuts_do_not_matter_when_merged(sketches):
    """A command's result must not depend on how its tokens were cut into units."""
    batch = sketches.batch
    out, lse, _ = sketches.results()
    kernels.sketch_units(batch, UnitRange(0, batch.num_segments), out, lse)
    ends = np.zeros(len(lse), np.int32)
    merged, merged_lse = merge_units(out, lse, ends, ends, 1, 1)
    halves = [
        merge_units(out[part], lse[part], ends[part], ends[part], 1, 1)
        for part in (slice(0, len(lse) // 2), slice(len(lse) // 2, None))
    ]
    again, again_lse = merge_units(
        np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves]),
        np.zeros(2, np.int32), np.zeros(2, np.int32), 1, 1,
    )  # fmt: skip
    seen = np.isfinite(merged_lse)
    np.testing.assert_allclose(again_lse[seen], merged_lse[seen], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again, merged, atol=1e-4 * max(np.abs(merged).max(), 1e-30))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([32, 40, 64, 96, 256]), st.integers(1, 600), st.sampled_from([4096, 65536]),
    st.integers(0, 99)
)  # fmt: skip
def test_codes_hold_rows_of_any_size(head_dim, num_tokens, page_size, seed):
    """Packed into the wrong cells, codes are wrong by more than their levels."""
    random = np.random.default_rng(seed)
    sizes = 2.0 ** random.integers(-12, 12, (num_tokens, 1))
    rows = (sizes * random.standard_normal((num_tokens, head_dim))).astype(np.float32)
    layout = sketch_layout(page_size, head_dim, num_tokens)
    pages = encode(rows, rows, layout)
    expected = reference.encode(rows, rows, layout)
    refined = np.ones(layout.refinement_pages, bool)
    for found, right in zip(decode(pages, layout, refined), decode(expected, layout, refined), strict=True):
        assert np.linalg.norm(found - right) <= 1e-3 * np.linalg.norm(rows)
        assert np.linalg.norm(found - rows) <= 0.05 * np.linalg.norm(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 99))
def test_sparf_with_everything_chosen_is_dense(num_tokens, num_rows, seed):
    """The one setting of the published method whose result is known."""
    random = np.random.default_rng(seed)
    queries = random.standard_normal((num_rows, 32))
    keys, values = random.standard_normal((2, num_tokens, 32))
    start, stop = np.sort(random.integers(0, num_tokens + 1, (2, num_rows)), axis=0)
    out, lse = sparf_reference.sparf(queries, keys, values, 32, num_tokens, 0.2, start, stop)
    for row in range(num_rows):
        seen = slice(start[row], stop[row])
        if start[row] == stop[row]:
            assert np.isneginf(lse[row])
            continue
        weights = np.exp(0.2 * keys[seen] @ queries[row])
        np.testing.assert_allclose(out[row], weights @ values[seen] / weights.sum(), atol=1e-12)
        np.testing.assert_allclose(lse[row], np.log(weights.sum()), atol=1e-12)
