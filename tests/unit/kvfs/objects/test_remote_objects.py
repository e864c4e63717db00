"""Caches of objects through the process that owns the drive: two engines on one mount."""

import os

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, ReadOnly
from kvfs.remote.rights import Client
from kvfs.telemetry.metrics import metrics_text

from ..remote.owner import Served
from .conftest import MIB, NO_MISSES, content, get, key_of, put


@pytest.fixture
def served(path, tmp_path):
    with (
        kvfs.open(path, cache_bytes="8MiB") as store,
        Served(store, tmp_path / "mount", memory_bytes=4 * MIB) as served,
    ):
        yield served


def test_as_in_process(served):
    """More than the shared memory holds, any size, all that a cache can be asked."""
    with served.open() as client:
        cache = client.object_cache("cache", {"model": "m"}, "16MiB")
        seeds = range(10)
        assert put(cache, *seeds, num_bytes=MIB - 5) == [True] * 10
        assert get(cache, 3, 99, *seeds, num_bytes=MIB - 5) == [True, False] + [True] * 10
        assert get(client.object_cache("cache", {"model": "n"}), 1, num_bytes=MIB - 5) == [False]
        assert cache.put([b"empty"], [b""]) == cache.get([b"empty"], [bytearray()]) == [True]
        assert cache.sizes([b"empty", key_of(1), b"no"]) == [0, MIB - 5, None]
        assert cache.contains([b"empty", b"no"]) == [True, False]
        assert sorted(cache.keys()) == sorted([b"empty", *map(key_of, seeds)])
        assert cache.delete([b"empty", b"no"]) == 1
        mine = served.store.object_cache("cache", {"model": "m"})
        assert get(mine, *seeds, num_bytes=MIB - 5) == [True] * 10
        assert cache.usage() == mine.usage()
        assert cache.usage().misses == {**NO_MISSES, "absent": 1, "identity": 1}
        assert cache.look_up([key_of(1), b"no"]) == [None, "absent"]
        cache.count_request("t", "m", 300, 0, "absent")
        with pytest.raises(InvalidArgument):
            cache.count_request("t", "m", 300, 301, None)
        assert client.counters()["objects"]["tenants"] == served.store.counters()["objects"]["tenants"]
        assert client.counters()["objects"]["tenants"][0]["miss_absent"] == 1
        assert client.object_usage() == served.store.object_usage()
        cache.set_capacity("2MiB")
        assert mine.usage().capacity == 2 * MIB and mine.usage().objects == 2
        with pytest.raises(InvalidArgument, match="shared"):
            cache.put([b"large"], [np.zeros(4 * MIB, np.uint8)])
        assert put(cache, 20) == [True]
        client.flush()
        assert client.drop_objects("cache") == 2
        assert client.check() == []


def test_pins_go_with_the_client(served):
    """An engine that is killed must not hold the cap for ever; nobody ends another's pins."""
    mine = served.store.object_cache("cache", capacity_bytes=2 * MIB)
    put(mine, 1, 2)
    with served.open() as client, served.open() as other:
        cache = client.object_cache("cache")
        assert cache.pin([key_of(1), key_of(2), key_of(2), b"no"]) == [True, True, True, False]
        assert other.object_cache("cache").unpin([key_of(1)]) == [False]
        assert put(mine, 3) == [False]
        assert cache.unpin([key_of(2), b"no"]) == [True, False]
        assert put(mine, 3) == [False]
        assert cache.unpin([key_of(2)]) == [True]
        assert put(mine, 3) == [True] and mine.contains([key_of(1)]) == [True]
    while any(found.pins for found in mine._index.all()):
        pass  # until the owner has noticed; the test's time limit ends it
    assert put(mine, 4, 5) == [True, True]


def test_users_are_apart(served, monkeypatch):
    """Another user's cache of the same name: nothing of it is found, counted or dropped."""
    store = served.store
    put(store.object_cache("cache"), 1)
    store.object_cache("cache").count_request("", "m", 10, 10, None)
    monkeypatch.setattr(Client, "is_administrator", property(lambda client: False))
    with served.open() as client:
        cache = client.object_cache("cache")
        assert get(cache, 1) == [False] and put(cache, 2) == [True]
        assert [(usage.name, usage.objects) for usage in client.object_usage()] == [("cache", 1)]
        assert [row["cache"] for row in client.counters()["objects"]["caches"]] == ["cache"]
        assert client.counters()["objects"]["stored"] == 1
        assert client.counters()["objects"]["tenants"] == []
        cache.count_request("", "m", 10, 10, None)
        assert [row["cache"] for row in client.counters()["objects"]["tenants"]] == ["cache"]
        assert client.drop_objects() == 1
    assert get(store.object_cache("cache"), 1) == [True]
    name = f"user {os.getuid()}: cache"
    found = metrics_text(store.telemetry()).decode()
    assert f'kvfs_object_lookups_total{{cache="{name}",result="hit"}} 0.0' in found


def test_a_mount_for_reading(path, tmp_path):
    """Objects can be read; nothing is stored, capped or deleted."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        put(store.object_cache("cache"), 1)
        with Served(store, tmp_path / "mount", read_only=True) as served, served.open() as client:
            cache = client.object_cache("cache")
            assert get(cache, 1) == [True]
            for change in (
                lambda: put(cache, 2),
                lambda: cache.delete([key_of(1)]),
                lambda: cache.set_capacity(MIB),
                lambda: client.object_cache("new"),
                client.drop_objects,
            ):
                with pytest.raises(ReadOnly):
                    change()


def test_what_no_client_of_ours_sends(served):
    """Places outside the shared memory, numbers of no cache, texts that are no keys."""
    with served.open() as client:
        client.object_cache("cache")
        good = {"number": 0, "keys": ["00"], "sizes": [10], "offset": 0}
        for bad in (
            {"offset": 4 * MIB},
            {"offset": -64},
            {"sizes": [1 << 40]},
            {"sizes": [-1]},
            {"sizes": [10, 10]},
            {"sizes": "x"},
            {"keys": ["zz"]},
            {"keys": [7]},
            {"number": 5},
            {"number": "a"},
        ):
            for call in ("get_objects", "put_objects"):
                with pytest.raises(InvalidArgument):
                    client._call(call, **{**good, **bad})
        assert client._call("put_objects", **good) == [True]


def test_a_client_that_scribbles(served, monkeypatch):
    """What is stored is what was checked: the owner copies before the drive takes it."""
    with served.open() as client:
        cache = client.object_cache("cache")
        write = served.store._namespace.write_scattered

        def scribble(extents, *arguments):
            client._connection.memory.array(0, (MIB,), np.dtype(np.uint8))[:] = 7
            write(extents, *arguments)

        monkeypatch.setattr(served.store._namespace, "write_scattered", scribble)
        assert put(cache, 1) == [True]
        monkeypatch.undo()
        buffer = np.empty(MIB, np.uint8)
        assert cache.get([key_of(1)], [buffer]) == [True] and np.array_equal(buffer, content(1))
