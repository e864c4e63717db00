import numpy as np
import pytest

from accel.sealing import _encoder
from tests.crash.sealing_workload import encoder

from ..conftest import add_model
from .content import check_content

GROUP = 16
HEADS, HEAD_DIM, LAYERS = 1, 256, 2
FULL = 16 * 4096 // HEAD_DIM // GROUP  # groups of a full sketch


@pytest.fixture
def fast_encoders(monkeypatch):
    """Whose pages are where is to be seen, not what sketches are."""
    monkeypatch.setattr("accel.sealing._encoder", encoder)


def small_model(store, name="small", **changes):
    shape = {"num_kv_heads": HEADS, "num_query_heads": HEADS, "head_dim": HEAD_DIM, "num_layers": LAYERS}
    return add_model(store, name=name, **{"group_tokens": GROUP, **shape, **changes})


def rows(num_tokens, seed=0, model=None):
    shape = (num_tokens, HEADS, HEAD_DIM) if model is None else (num_tokens, model.num_kv_heads, model.head_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def append(sequence, num_tokens, seed=0):
    for layer in range(sequence.model.num_layers):
        keys, values = (rows(num_tokens, (seed, layer, kind), sequence.model) for kind in (0, 1))
        sequence.append(layer, keys, values)


def spans(sequence, derive="sketch"):
    return [(one.first_group, one.num_groups) for one in sequence.derived_segments(derive)]


def check_fast(store, *sequences):
    for sequence in sequences:
        check_content(store, sequence, encoder)


def check_true(store, sequence):
    return check_content(store, sequence, _encoder)
