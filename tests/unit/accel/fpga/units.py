"""Units of work for the attention core, and what a float64 computation says of them."""

import ml_dtypes
import numpy as np

from accel.fpga.arithmetic import BFLOAT16, FLOAT16, Shape
from accel.fpga.model import Command, quantised_queries

NUMPY = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


def unit(shape: Shape, num_tokens: int, head_dim: int, dtype: int = FLOAT16, seed: int = 0, size: float = 1.0):
    """(command, keys, values, queries float64) of random numbers; all rows see all tokens."""
    random = np.random.default_rng(seed)
    keys, values = (size * random.standard_normal((2, num_tokens, head_dim))).astype(NUMPY[dtype])
    queries = random.standard_normal((shape.rows, head_dim))
    quantised, exponents = quantised_queries(queries, head_dim**-0.5)
    everything = np.zeros(shape.rows, np.int64), np.full(shape.rows, num_tokens)
    return Command(quantised, exponents, *everything, dtype), keys, values, queries


def blocks_of(keys, values, tokens_a_block: int, first: int = 0, masks=None):
    """As model.attend takes them."""
    found = []
    for number, start in enumerate(range(0, len(keys), tokens_a_block)):
        rows = slice(start, start + tokens_a_block)
        mask = None if masks is None else int(masks[number])
        found.append((first + start, mask, keys[rows].view(np.uint16), values[rows].view(np.uint16)))
    return found


def channel_blocks(shape: Shape, num_channels: int, num_beats: int, dtype: int = FLOAT16, seed: int = 0):
    """As model.weigh_channels takes them: random numbers; the last block's first channel is left out."""
    random = np.random.default_rng(seed)
    weights = random.integers(-(1 << 22), 1 << 22, (num_channels, shape.rows), dtype=np.int32)
    elements = random.standard_normal((num_channels, num_beats * shape.lanes)).astype(NUMPY[dtype])
    cuts = [slice(first, first + 7) for first in range(0, num_channels, 7)]
    blocks = [(None, weights[cut], elements[cut].view(np.uint16)) for cut in cuts]
    blocks[-1] = (2**64 - 2, *blocks[-1][1:])
    return blocks


def assert_same(found, wanted):
    assert found.status == wanted.status
    np.testing.assert_array_equal(found.maxima, wanted.maxima)
    np.testing.assert_array_equal(found.sums, wanted.sums)
    np.testing.assert_array_equal(found.exponents, wanted.exponents)
    np.testing.assert_array_equal(found.totals, wanted.totals)


def exact(command: Command, keys, values, queries, counts=None):
    """(out, lse) in float64 over tokens that rows see and that count."""
    position = np.arange(len(keys))
    seen = (position >= command.visible_start[:, None]) & (position < command.visible_stop[:, None])
    if counts is not None:
        seen &= counts
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(seen, queries @ keys.astype(np.float64).T * keys.shape[1] ** -0.5, -np.inf)
        top = scores.max(axis=1, keepdims=True)
        weights = np.where(seen, np.exp(scores - top), 0)
        total = weights.sum(axis=1, keepdims=True)
        out = np.where(total > 0, weights @ values.astype(np.float64) / total, 0)
        return out, (top + np.log(total))[:, 0]
