"""Attention is the same however its tokens are split: over pages, units, parts, and in any order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.merge import merge_states, merge_units
from accel.workers import UnitRange, reference
from accel.workers import numba as numba_worker
from tests.unit.accel.pages import empty_results, make_batch, token_arrays

HEAD_DIM = 64
GROUP_SIZE = 2
NUM_KV_HEADS = 2
NUM_TOKENS = 160


def close(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=2e-5, atol=3e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=3e-6)


@st.composite
def parts(draw, num_parts):
    """States of one row each: out [num_parts, 1, 4], lse [num_parts, 1]."""
    value = st.floats(-100, 100, width=32)
    lse = draw(st.lists(st.one_of(st.just(-np.inf), st.floats(-1000, 1000, width=32)), min_size=num_parts,
                        max_size=num_parts))  # fmt: skip
    out = [draw(st.lists(value, min_size=4, max_size=4)) if np.isfinite(x) else [0.0] * 4 for x in lse]
    return np.array(out, np.float32)[:, None], np.array(lse, np.float32)[:, None]


@given(parts(3))
def test_merge_is_associative_and_commutative(states):
    """Tails, drives and hosts are merged in whatever order they answer."""
    out, lse = states
    a, b, c = zip(out, lse, strict=True)
    left = merge_states(*merge_states(*a, *b), *c)
    right = merge_states(*a, *merge_states(*b, *c))
    turned = merge_states(*merge_states(*c, *a), *b)
    # lse is rounded to float32 in between: the weights' error is that of lse, which grows with its size
    for other in (right, turned):
        np.testing.assert_allclose(left[1], other[1], rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(left[0], other[0], rtol=1e-3, atol=0.05)


@given(parts(5), st.permutations(range(5)))
def test_merge_of_units_is_the_merge_of_states(states, order):
    """Two implementations of one merge: units in the drive, parts on the host."""
    out, lse = (array[list(order)] for array in states)
    together = out[0], lse[0]
    for part in zip(out[1:], lse[1:], strict=True):
        together = merge_states(*together, *part)
    item = np.zeros(5, np.int32)
    units = merge_units(out[:, :, None], lse[:, :, None], item, item, 1, 1)
    np.testing.assert_allclose(units[1][0], together[1][:, None], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(units[0][0], together[0][:, None], rtol=1e-3, atol=0.05)


def attend(worker, batch):
    out, lse = empty_results(batch)
    worker.attend_units(batch, UnitRange(0, len(batch.unit_item)), out, lse)
    return merge_units(out, lse, batch.unit_item, batch.unit_kv_head, len(batch.queries), NUM_KV_HEADS)


@st.composite
def layouts(draw):
    """Queries with their ranges, and how the tokens are cut into pages, groups and units."""
    num_tokens = draw(st.integers(1, NUM_TOKENS))
    num_queries = draw(st.integers(1, 5))
    position = st.integers(-2, num_tokens + 2)
    ranges = np.array(draw(st.lists(st.tuples(position, position), min_size=num_queries, max_size=num_queries)))
    return {
        "num_tokens": num_tokens,
        "ranges": ranges[None],
        "page_size": 128 * draw(st.integers(1, 40)),
        "group_tokens": draw(st.integers(1, 200)),
        "pages_per_unit": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 100)),
    }


@settings(deadline=None)
@given(layouts())
def test_any_split_equals_the_whole(layout):
    """Answers that depend on page size, group size or units: two drives would disagree on one sequence."""
    num_tokens, ranges = layout["num_tokens"], layout["ranges"]
    keys, values = token_arrays(NUM_KV_HEADS, num_tokens, HEAD_DIM, "float16", seed=layout["seed"])
    random = np.random.default_rng(layout["seed"])
    shape = (1, ranges.shape[1], NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)
    queries = random.standard_normal(shape).astype(np.float32)
    start, stop = ranges[..., 0], ranges[..., 1]
    whole, whole_pages = make_batch(
        keys, values, queries, start, stop, dtype="float16", page_size=128 * NUM_TOKENS
    )
    split, split_pages = make_batch(
        keys, values, queries, start, stop, dtype="float16", page_size=layout["page_size"],
        group_tokens=layout["group_tokens"], pages_per_unit=layout["pages_per_unit"],
    )  # fmt: skip
    expected = attend(reference, whole)
    for batch in (whole, split):
        close(attend(numba_worker, batch), expected)
    close(attend(reference, split), expected)
    del whole_pages, split_pages
