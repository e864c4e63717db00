"""Merging by log-sum-exp: any split of the tokens gives what the whole gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.merge import ShapeMismatch, merge_states, merge_units

HEAD_DIM = 8


def partial(scores, values):
    """(out, lse) of one query over some tokens; empty is zero and -inf."""
    if not len(scores):
        return np.zeros(HEAD_DIM, np.float32), np.float32(-np.inf)
    weights = np.exp(scores - scores.max())
    out = weights @ values / weights.sum()
    return out.astype(np.float32), np.float32(scores.max() + np.log(weights.sum()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.floats(0.1, 50))
def test_any_split(lengths, seed, spread):
    """Exactness: tail and flash, several drives, several units, empty parts among them."""
    random = np.random.default_rng(seed)
    total = sum(lengths)
    scores = random.standard_normal(total) * spread
    values = random.standard_normal((total, HEAD_DIM))
    bounds = np.cumsum([0, *lengths])
    parts = [partial(scores[a:b], values[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    want_out, want_lse = partial(scores, values)
    outs = np.stack([out for out, _ in parts])[:, None, None]
    lses = np.stack([lse for _, lse in parts])[:, None, None]
    zeros = np.zeros(len(parts), np.int32)
    out, lse = merge_units(outs, lses, zeros, zeros, 1, 1)
    np.testing.assert_allclose(out[0, 0, 0], want_out, atol=2e-5)
    np.testing.assert_allclose(lse[0, 0, 0], want_lse, atol=2e-5)
    state = outs[0], lses[0]
    for next_out, next_lse in zip(outs[1:], lses[1:], strict=True):
        state = merge_states(*state, next_out, next_lse)
    np.testing.assert_allclose(state[0][0, 0], want_out, atol=2e-5)
    np.testing.assert_allclose(state[1][0, 0], want_lse, atol=2e-5)


def test_shapes_must_fit():
    """Parts of different queries merged by accident."""
    out, lse = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeMismatch):
        merge_states(out, lse, out[:1], lse[:1])
    with pytest.raises(ShapeMismatch):
        merge_states(out, lse[:, :2], out, lse[:, :2])
