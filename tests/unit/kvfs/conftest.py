import os

import numpy as np
import pytest

import kvfs

NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 2, 2, 4, 64


@pytest.fixture
def path(tmp_path):
    """A formatted, empty drive: in a file, or at KVFS_TEST_LOCATION, a namespace whose content is lost."""
    path = os.environ.get("KVFS_TEST_LOCATION") or tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB", overwrite=True)
    return path


@pytest.fixture
def store(path):
    with kvfs.open(path, cache_bytes="8MiB", num_workers=2) as store:
        yield store


@pytest.fixture
def model(store):
    return add_model(store)


@pytest.fixture
def lose(store):
    """Flip a bit of a block on flash."""

    def flip(lba):
        store.flush()
        page = int(store._drive.ftl.resolve(np.array([lba]))[0])
        with open(store.path, "r+b") as file:
            file.seek(store._drive.ftl.media.layout.data_start + page * 4096 + 99)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))

    return flip


def add_model(store, dtype="float16", name=None, **changes):
    shape = {
        "num_layers": NUM_LAYERS,
        "num_query_heads": NUM_KV_HEADS * GROUP_SIZE,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": dtype,
    }
    return store.add_model(name or f"model-{dtype}", **{**shape, **changes})


def random_kv(num_tokens, seed=0, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM):
    """float32 keys and values [num_tokens, num_kv_heads, head_dim]."""
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((num_tokens, num_kv_heads, head_dim), np.float32) for _ in range(2))


def random_queries(num_sequences=1, num_queries=1, seed=1, num_heads=8, head_dim=HEAD_DIM):
    shape = (num_sequences, num_queries, num_heads, head_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def plain_attention(queries, keys, values, ranges):
    """The textbook, float64. queries [num_queries, num_heads, head_dim]; ranges: (start, stop) per query."""
    num_queries, num_heads, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    out = np.zeros(queries.shape)
    lse = np.full((num_queries, num_heads), -np.inf)
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    for query, (start, stop) in enumerate(ranges):
        if start >= stop:
            continue
        for head in range(num_heads):
            scores = keys[start:stop, head // group] @ queries[query, head].astype(np.float64) * head_dim**-0.5
            weights = np.exp(scores - scores.max())
            out[query, head] = weights @ values[start:stop, head // group] / weights.sum()
            lse[query, head] = scores.max() + np.log(weights.sum())
    return out, lse
