"""The merge by lse against NumPy in float64."""

import numpy as np
import pytest

from accel.merge import ShapeMismatch, merge_states, merge_units


def states(num_parts, *shape, seed=0):
    """Random out [num_parts, *shape, 8] and lse [num_parts, *shape], a quarter of them empty."""
    random = np.random.default_rng(seed)
    out = random.standard_normal((num_parts, *shape, 8)).astype(np.float32)
    lse = (10 * random.standard_normal((num_parts, *shape))).astype(np.float32)
    empty = random.random(lse.shape) < 0.25
    lse[empty], out[empty] = -np.inf, 0
    return out, lse


def merged(out, lse):
    """The definition, over axis 0 in float64."""
    lse = lse.astype(np.float64)
    top = lse.max(axis=0)
    base = np.where(np.isneginf(top), 0, top)
    weights = np.exp(lse - base)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        together = base + np.log(total)
    share = weights / np.where(total == 0, 1, total)
    return (share[..., None] * out).sum(axis=0), together


def assert_states(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
    assert found[0].dtype == found[1].dtype == np.float32


def test_two_states_agree_with_numpy():
    """The host's tail joined to the drive's part with wrong weights: wrong tokens."""
    out, lse = states(2, 5, 3, 4)
    assert_states(merge_states(out[0], lse[0], out[1], lse[1]), merged(out, lse))


def test_empty_states():
    """-inf minus -inf is NaN: an empty tail must leave the other part as it is, to the bit."""
    out, lse = states(1, 6, seed=2)
    nothing = np.zeros_like(out[0]), np.full_like(lse[0], -np.inf)
    for found in (merge_states(out[0], lse[0], *nothing), merge_states(*nothing, out[0], lse[0])):
        np.testing.assert_array_equal(found[0], out[0])
        np.testing.assert_array_equal(found[1], lse[0])
    found = merge_states(*nothing, *nothing)
    assert not found[0].any()
    assert np.isneginf(found[1]).all()


@pytest.mark.parametrize("other", [1.0, -np.inf, np.nan, np.inf])
def test_nan_is_not_lost(other):
    """A part spoilt by a stored NaN: an answer that looks sound would hide it."""
    parts = [(np.full((1, 8), np.nan, np.float32), np.array([np.nan], np.float32))]
    parts.append((np.full((1, 8), 0 if other == -np.inf else 1, np.float32), np.array([other], np.float32)))
    for first, second in (parts, parts[::-1]):
        one_pair = merge_states(*first, *second)
        out, lse = (np.stack(column).reshape(2, 1, 1, -1) for column in zip(first, second, strict=True))
        nowhere = np.zeros(2, np.int32)
        for found_out, found_lse in (one_pair, merge_units(out, lse[..., 0], nowhere, nowhere, 1, 1)):
            assert np.isnan(found_lse).all()
            assert np.isnan(found_out).all()


def test_far_apart_and_huge():
    """exp of an lse overflows above 88: only differences may be raised."""
    out = np.stack([np.full((2, 8), 1, np.float32), np.full((2, 8), 3, np.float32)])
    lse = np.array([[5000, -5000], [5000, -9000]], np.float32)
    found = merge_states(out[0], lse[0], out[1], lse[1])
    np.testing.assert_allclose(found[0], [[2] * 8, [1] * 8])
    np.testing.assert_allclose(found[1], [5000 + np.log(2), -5000])


@pytest.mark.parametrize(
    ("shape_a", "lse_a", "shape_b", "lse_b"),
    [((2, 8), (2,), (3, 8), (3,)), ((2, 8), (3,), (2, 8), (3,)), ((2, 8), (2,), (2, 16), (2,))],
)
def test_shapes_that_do_not_belong_together(shape_a, lse_a, shape_b, lse_b):
    """Compiled code reading behind an array instead of a clear error."""
    with pytest.raises(ShapeMismatch):
        merge_states(np.ones(shape_a), np.ones(lse_a), np.ones(shape_b), np.ones(lse_b))


def test_units_agree_with_numpy():
    """Units of one item and head, in any order and number, some heads without any: mixed-up heads."""
    num_items, num_kv_heads, group_size, num_queries, num_units = 3, 4, 2, 5, 60
    out, lse = states(num_units, num_queries, group_size, seed=3)
    random = np.random.default_rng(5)
    item = random.integers(0, num_items, num_units).astype(np.int32)
    head = random.integers(0, num_kv_heads - 1, num_units).astype(np.int32)
    found_out, found_lse = merge_units(out, lse, item, head, num_items, num_kv_heads)
    for i in range(num_items):
        for h in range(num_kv_heads):
            chosen = (item == i) & (head == h)
            heads = slice(h * group_size, (h + 1) * group_size)
            found = found_out[i, :, heads], found_lse[i, :, heads]
            if not chosen.any():
                assert not found[0].any()
                assert np.isneginf(found[1]).all()
                continue
            assert_states(found, merged(out[chosen], lse[chosen]))


def test_no_units():
    """An attention over sequences that have nothing on the drive yet."""
    out, lse = merge_units(
        np.empty((0, 2, 4, 8), np.float32), np.empty((0, 2, 4), np.float32), np.empty(0, np.int32),
        np.empty(0, np.int32), 3, 2,
    )  # fmt: skip
    assert out.shape == (3, 2, 8, 8)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("unit", [(3, 0), (-1, 0), (0, 2), (0, -1)])
def test_units_outside(unit):
    """Compiled code writing outside an array."""
    with pytest.raises(ShapeMismatch):
        merge_units(
            np.ones((1, 1, 1, 8), np.float32), np.ones((1, 1, 1), np.float32),
            np.array(unit[:1], np.int32), np.array(unit[1:], np.int32), 3, 2,
        )  # fmt: skip
