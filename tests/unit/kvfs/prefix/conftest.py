import numpy as np
import pytest

from ..conftest import random_kv

GROUP = 256


@pytest.fixture
def tokens():
    return np.random.default_rng(7).integers(0, 1 << 32, 5 * GROUP + 40, dtype=np.uint32)


def kv_of(tokens):
    """Keys and values that tokens have, the same for the same ones: float16 [num_tokens, heads, head_dim]."""
    scale = (np.asarray(tokens)[:, None, None] % 1009 / 1009).astype(np.float16)
    keys, values = (rows.astype(np.float16) for rows in random_kv(1))
    return scale * keys, scale + values


def fill(sequence, tokens):
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, *kv_of(tokens))
    sequence.append_tokens(tokens)
    return sequence


def publish(store, model, name, tokens, **options):
    sequence = fill(store.create_sequence(model, name), tokens)
    sequence.publish(**options)
    return sequence


def assert_holds(sequence, tokens):
    """All of it: token ids, and keys and values of every layer."""
    assert np.array_equal(sequence.tokens, tokens)
    assert sequence.num_tokens == len(tokens)
    for layer in range(sequence.model.num_layers):
        for found, wanted in zip(sequence.read(layer), kv_of(tokens), strict=True):
            assert np.array_equal(found, wanted)
