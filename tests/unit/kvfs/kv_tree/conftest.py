import pytest

from kvfs.kv_tree.tree import KvTree
from tests.unit.kvfs.conftest import add_model, random_kv
from tests.unit.kvfs.kv_tree.client import Client


@pytest.fixture
def client(store):
    """The tree of a store with models `m` (float16) and `bf` (bfloat16), and no sequence."""
    add_model(store, name="m")
    add_model(store, "bfloat16", name="bf")
    return Client(KvTree(store))


@pytest.fixture
def sequence(client, store):
    """Sequence `a` of model `m`: 700 tokens, of which whole groups are on flash."""
    sequence = store.create_sequence(store.model("m"), "a")
    append(sequence, 700)
    return sequence


def append(sequence, num_tokens, seed=0):
    """Random tokens for every layer, with ids."""
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, *random_kv(num_tokens, seed + layer))
    sequence.append_tokens(range(num_tokens))


def stored(sequence, layer, kind, head):
    """What keys.npy (kind 0) or values.npy of a head has to hold."""
    return sequence.read(layer)[kind][:, head]
