import json
import urllib.error
import urllib.request

import pytest

from tests.unit.kvfs.conftest import add_model, random_kv, random_queries
from tests.unit.kvfs.drive_set.conftest import drive_set, locations  # noqa: F401
from tests.unit.kvfs.remote.conftest import served  # noqa: F401


def fill(store, num_tokens=700, name="a", **shape):
    """A sequence on flash, attended over once in each layer."""
    model = add_model(store, name="m", **shape)
    sequence = store.create_sequence(model, name)
    geometry = model.geometry
    for layer in range(geometry.num_layers):
        sequence.append(layer, *random_kv(num_tokens, layer, geometry.num_kv_heads))
    sequence.flush()
    attend(store, sequence)
    return sequence


def attend(store, sequence):
    geometry = sequence.model.geometry
    for layer in range(geometry.num_layers):
        store.attend(layer, random_queries(num_heads=geometry.num_query_heads), sequence)


@pytest.fixture
def sequence(store):
    return fill(store)


def ask(url, path="", **headers):
    """(status, body, headers)"""
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def ask_json(url, path, **headers):
    status, body, _ = ask(url, path, **headers)
    assert status == 200, body
    return json.loads(body)
