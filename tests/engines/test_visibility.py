"""Masks read as ranges, and attention over ranges, against masks applied directly."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")

import torch

from kvfs.engines.errors import UnsupportedMask
from kvfs.engines.torch_attention import attend_ranges, with_sinks
from kvfs.engines.visibility import causal_ranges, ranges_of_mask

PAST, NEW = 11, 5


def mask_of(ranges):
    """bool [num_sequences, 1, num_queries, PAST + NEW]"""
    positions = np.arange(PAST + NEW)
    visible = (ranges[..., 0, None] <= positions) & (positions < ranges[..., 1, None])
    return torch.from_numpy(visible[:, None])


def windowed(window):
    """Causal ranges of two sequences, limited to a window; the first has 4 tokens of padding."""
    ranges = causal_ranges(2, NEW, PAST)
    ranges[..., 0] = np.maximum(0, ranges[..., 1] - window)
    ranges[0, :, 0] = np.maximum(ranges[0, :, 0], 4)
    return ranges


@pytest.mark.parametrize("window", [3, 8, 100])
@pytest.mark.parametrize("additive", [False, True])
def test_ranges_come_back_from_a_mask(window, additive):
    """Without it: windows and padding reach the drive shifted or cut."""
    ranges = windowed(window)
    mask = mask_of(ranges)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert np.array_equal(ranges_of_mask(mask, 2, NEW, PAST), ranges)


def test_a_mask_for_all_rows_and_heads_is_shared():
    """Without it: broadcast masks, the usual ones, are refused or applied to one row only."""
    ranges = causal_ranges(1, NEW, PAST)
    mask = mask_of(ranges).expand(1, 8, NEW, PAST + NEW)
    assert np.array_equal(ranges_of_mask(mask, 3, NEW, PAST), np.repeat(ranges, 3, axis=0))


def test_padding_queries_see_nothing():
    """Without it: padded queries, which have no range, are taken for holes."""
    mask = torch.zeros(1, 1, NEW, NEW, dtype=torch.bool)
    mask[0, 0, 2:, 2:] = torch.ones(3, 3, dtype=torch.bool).tril()
    assert ranges_of_mask(mask, 1, NEW, 0).tolist() == [[[0, 0], [0, 0], [2, 3], [2, 4], [2, 5]]]


def bias():
    return torch.randn(1, 1, NEW, PAST + NEW)


def holes():
    mask = mask_of(causal_ranges(1, NEW, PAST))
    mask[..., 6] = False
    return mask


def different_heads():
    return torch.stack([mask_of(windowed(3))[0, 0], mask_of(windowed(8))[0, 0]])[None]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (bias, "bias"),
        (holes, "holes"),
        (different_heads, "heads"),
        (lambda: mask_of(causal_ranges(1, NEW, PAST))[..., 1:], "shape"),
        (lambda: mask_of(causal_ranges(1, NEW, PAST).clip(max=PAST)), "stored"),
    ],
)
def test_other_masks_are_refused(mask, reason):
    """Without it: something that is no range is rounded to one."""
    with pytest.raises(UnsupportedMask, match=reason):
        ranges_of_mask(mask(), 1, NEW, PAST)


@pytest.mark.parametrize("scores_at_once", [1, 1 << 20])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_over_ranges(num_kv_heads, scores_at_once, monkeypatch):
    """Without it: the part of the new tokens is wrong, and every continued prompt with it."""
    monkeypatch.setattr("kvfs.engines.torch_attention._SCORES_AT_ONCE", scores_at_once)
    torch.manual_seed(0)
    queries = torch.randn(2, 4, NEW, 32)
    keys, values = torch.randn(2, 2, num_kv_heads, PAST + NEW, 32)
    ranges = windowed(6).copy()
    ranges[1, 0] = 3, 3  # sees nothing
    out, lse = attend_ranges(queries, keys, values, ranges, 0.17)
    spread = [t.repeat_interleave(4 // num_kv_heads, dim=1) for t in (keys, values)]
    scores = (queries @ spread[0].mT * 0.17).masked_fill(~mask_of(ranges), -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ spread[1]).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, scores.logsumexp(-1).transpose(1, 2), atol=1e-6)
    assert lse[1, 0].isneginf().all() and (out[1, 0] == 0).all()


def test_sinks_take_their_share_of_the_weight():
    """Without it: gpt-oss models with weights that do not add up."""
    torch.manual_seed(0)
    queries, (keys, values) = torch.randn(1, 2, 1, 32), torch.randn(2, 1, 2, 7, 32)
    sinks = torch.tensor([0.5, -2.0])
    out = with_sinks(*attend_ranges(queries, keys, values, np.array([[[0, 7]]]), 0.3), sinks)
    scores = torch.cat([queries @ keys.mT * 0.3, sinks.view(1, 2, 1, 1)], dim=-1)
    assert torch.allclose(out, (scores.softmax(-1)[..., :-1] @ values).transpose(1, 2), atol=1e-6)
