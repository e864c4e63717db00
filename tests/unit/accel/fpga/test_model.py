"""The bit-accurate model against float64: the arithmetic is good enough, whatever it is built of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.fpga.arithmetic import BFLOAT16, FLOAT16, NOT_FINITE, SATURATED, WEIGHT_FRACTION, Shape, exp2_table
from accel.fpga.model import attend, outputs, quantised_queries, weights_of
from tests.unit.accel.fpga.units import blocks_of, exact, unit

SHAPE = Shape(lanes=32, rows=4)
TOLERANCE = 1e-4  # of the largest output; the core's stated one is 2e-3


@settings(max_examples=40)
@given(
    num_tokens=st.integers(1, 300),
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    dtype=st.sampled_from([FLOAT16, BFLOAT16]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
    block=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(num_tokens, head_dim, dtype, size, block, seed):
    """Wrong attention for some size of numbers, length or split: tiny ones are denormal in float16."""
    command, keys, values, queries = unit(SHAPE, num_tokens, head_dim, dtype, seed, size)
    result = attend(command, blocks_of(keys, values, block), SHAPE)
    out, lse = outputs(result)
    expected, expected_lse = exact(command, keys, values, queries)
    assert result.status == 0
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(lse - expected_lse).max() <= 1e-4 * max(1, np.abs(expected_lse).max())


def test_exp2_is_as_good_as_it_says():
    """The bound in `exp2_table`'s docstring."""
    difference = -np.arange(0, 20 << 16, 37)
    found = weights_of(difference) / 2**WEIGHT_FRACTION
    wanted = np.exp2(difference / 65536)
    assert np.abs(found - wanted).max() < 2.5 * 2**-WEIGHT_FRACTION + 9.2e-7
    assert weights_of(np.zeros(1, np.int64))[0] == 1 << WEIGHT_FRACTION
    assert len(exp2_table()) == 256


def test_growing_scores():
    """Each token is larger than all before: every block corrects what was summed."""
    command, keys, values, queries = unit(SHAPE, 128, 64)
    keys[:] = (np.arange(128)[:, None] / 16 * np.sign(queries[0])).astype(np.float16)
    out, _ = outputs(attend(command, blocks_of(keys, values, 8), SHAPE))
    expected, _ = exact(command, keys, values, queries)
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_values_that_grow_by_powers():
    """Sums follow the exponent of what comes: a million times larger values at the end count."""
    command, keys, values, queries = unit(SHAPE, 100, 64)
    values[:] = (np.exp2(np.arange(100) / 5 - 8)[:, None]).astype(np.float16)
    out, _ = outputs(attend(command, blocks_of(keys, values, 32), SHAPE))
    expected, _ = exact(command, keys, values, queries)
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_nothing_visible():
    command, keys, values, _ = unit(SHAPE, 50, 64)
    command.visible_stop[:2] = 0
    out, lse = outputs(attend(command, blocks_of(keys, values, 32), SHAPE))
    assert np.isneginf(lse[:2]).all() and np.isfinite(lse[2:]).all()
    assert not out[:2].any() and out[2:].any()


def test_equal_scores_are_a_mean():
    command, keys, values, _ = unit(SHAPE, 640, 64)
    keys[:] = 0
    out, lse = outputs(attend(command, blocks_of(keys, values, 32), SHAPE))
    np.testing.assert_allclose(lse, np.log(640), atol=1e-6)
    np.testing.assert_allclose(
        out, np.broadcast_to(values.astype(np.float64).mean(axis=0), out.shape), atol=1e-5
    )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_is_not_finite_is_said(bad, which):
    command, keys, values, _ = unit(SHAPE, 50, 64)
    (keys if which == "keys" else values)[17, 3] = bad
    assert attend(command, blocks_of(keys, values, 32), SHAPE).status == NOT_FINITE


def test_scores_without_a_place_are_said():
    command, keys, values, _ = unit(SHAPE, 50, 64)
    keys[:] = 60000
    command.queries[:] = (1 << 23) - 1
    command.exponents[:] = 0
    assert attend(command, blocks_of(keys, values, 32), SHAPE).status == SATURATED
    command.visible_stop[:] = 0
    assert attend(command, blocks_of(keys, values, 32), SHAPE).status == 0


def test_queries_of_zeros():
    quantised, exponents = quantised_queries(np.zeros((2, 64)), 0.125)
    assert not quantised.any() and not exponents.any()


@pytest.mark.parametrize("field", ["lanes", "rows", "max_beats", "block_tokens"])
@pytest.mark.parametrize("value", [0, 3, -8])
def test_shapes_that_cannot_be_built(field, value):
    with pytest.raises(ValueError, match=field):
        Shape(**{field: value})
