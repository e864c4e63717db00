"""The summary of free space: there after a clean end, gone with the first change, never wrong."""

import numpy as np
import pytest

import kvfs
from kvfs import free_space

from .conftest import add_model, random_kv


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """Also for a small catalogue."""
    monkeypatch.setattr(free_space, "LEAST_PAGES", 0)


def use(store):
    sequence = store.create_sequence(add_model(store), "s")
    for layer in range(2):
        sequence.append(layer, *random_kv(700))
    store.object_cache("cache").put([b"a", b"b"], [bytes(9000), bytes(5)])
    store.flush()


def append(store):
    for layer in range(2):
        store.sequence("s").append(layer, *random_kv(300))


CHANGES = {
    "sequence": append,
    "tail": lambda store: [store.sequence("s").append(layer, *random_kv(1)) for layer in range(2)],
    "truncation": lambda store: store.sequence("s").truncate(10),
    "deletion": lambda store: store.delete_sequence("s"),
    "object": lambda store: store.object_cache("cache").put([b"c"], [bytes(7000)]),
    "object deleted": lambda store: store.object_cache("cache").delete([b"a"]),
}


def test_after_a_clean_end(path):
    """Opening reads no row that names blocks, and knows the same as when it reads them all."""
    with kvfs.open(path) as store:
        use(store)
        free = store._allocator.free_extents
    for _ in range(2):
        with kvfs.open(path) as store:
            assert store._catalogue.free_space.load() == store._allocator.free_extents == free
            assert store.check() == []


@pytest.mark.parametrize("change", CHANGES)
def test_gone_with_the_first_change(path, change):
    """A crash after it: what was free is not any more, or more is."""
    with kvfs.open(path) as store:
        use(store)
    store = kvfs.open(path)
    assert store._catalogue.free_space.load() is not None
    CHANGES[change](store)
    store.flush()
    assert store._catalogue.free_space.load() is None
    expected = store._allocator.free_extents
    store._abandon()
    with kvfs.open(path) as store:
        assert store._allocator.free_extents == expected
        assert store.check() == []


def test_without_its_triggers(path):
    """A catalogue whose tables were made anew: the summary says nothing of them."""
    with kvfs.open(path) as store:
        use(store)
    with kvfs.open(path) as store:
        store._catalogue._db.execute("DROP TRIGGER free_space_0")
        assert store._catalogue.free_space.load() is None


def test_what_is_only_in_memory(path):
    """Groups taken in advance are named by no row: a summary without them would lose them for good."""
    with kvfs.open(path) as store:
        use(store)
        capacity = store.counters()["space"]["capacity_bytes"]
        store.sequence("s")._reserve(0, 3000)
    with kvfs.open(path) as store:
        store.delete_sequence("s")
        store.drop_objects()
        store.flush()
        assert store.counters()["space"]["free_bytes"] == capacity
        assert np.sum(store._allocator.free_extents, 0)[1] * 4096 == capacity
