"""`kvfsctl objects`, and what the other verbs say of objects, as a user runs them."""

import json

import numpy as np
import pytest

import kvfs
from kvfs.engines import shared_store
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl

MIB = 1 << 20


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        for name, count in (("lmcache", 5), ("vllm", 2)):
            cache = store.object_cache(name, {"model": "m"})
            cache.put([bytes([number]) for number in range(count)], [np.ones(MIB, np.uint8)] * count)
    return path


def test_ls_cap_and_drop(drive):
    """Which engine takes how much; a cap that evicts; the end of a cache, asked for twice."""
    found = json.loads(kvfsctl("objects", "ls", drive, "--json").stdout)
    assert found["schema"] == 1
    assert [(row["name"], row["objects"], row["bytes"]) for row in found["caches"]] == [
        ("lmcache", 5, 5 * MIB),
        ("vllm", 2, 2 * MIB),
    ]
    assert "5.0 MiB" in kvfsctl("objects", "ls", drive).stdout
    assert json.loads(kvfsctl("stats", drive, "--json").stdout)["counters"]["objects"]["hits"] == 0
    assert kvfsctl("check", drive).returncode == 0
    capped = json.loads(kvfsctl("objects", "cap", drive, "lmcache", "3MiB", "--json").stdout)
    assert (capped["capacity_bytes"], capped["num_bytes"]) == (3 * MIB, 3 * MIB)
    assert kvfsctl("objects", "cap", drive, "nothing", "3MiB").returncode == 2
    assert_asks("objects", "drop", drive, "lmcache")
    agreed = kvfsctl("objects", "drop", drive, "lmcache", stdin="y\n", terminal=True)
    assert "Drop 3 objects?" in agreed.stdout and "dropped 3 objects" in agreed.stdout
    assert json.loads(kvfsctl("objects", "drop", drive, "--yes", "--json").stdout)["num_objects"] == 2
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        space = store.counters()["space"]
        assert space["free_bytes"] == space["capacity_bytes"]
        assert store.object_cache("lmcache").usage().capacity == 3 * MIB


def test_on_a_set(tmp_path):
    """Several drives are one name here, too; of prefixes as of objects."""
    pool = tmp_path / "pool.kvfs-set"
    drives = [f"--drive={tmp_path / name}.kvfs" for name in "ab"]
    assert kvfsctl("format", pool, *drives, "--size", "48MiB").returncode == 0
    store = shared_store.acquire(pool, cache_bytes="24MiB")
    cache = store.object_cache("lmcache", {"model": "m"})
    keys, ones = [bytes([number]) for number in range(16)], [np.ones(4096, np.uint8)] * 16
    assert cache.put(keys, ones) == cache.contains(keys) == [True] * 16
    model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
    sequence = store.create_sequence(model, "s")
    sequence.append(0, *[np.ones((256, 2, 64), np.float32)] * 2)
    sequence.append_tokens(range(256))
    sequence.publish("red")
    shared_store.release(store)
    (found,) = json.loads(kvfsctl("objects", "ls", pool, "--json").stdout)["caches"]
    assert (found["objects"], found["bytes"], found["identities"]) == (16, 16 * 4096, 1)
    capped = json.loads(kvfsctl("objects", "cap", pool, "lmcache", "16KiB", "--json").stdout)
    assert (capped["capacity_bytes"], capped["num_bytes"]) == (4 * 4096, 4 * 4096)
    assert "dropped 4 objects" in kvfsctl("objects", "drop", pool, "--yes").stdout
    (found,) = json.loads(kvfsctl("prefix", "ls", pool, "--json").stdout)["prefixes"]
    assert (found["tenant"], found["model"], found["num_tokens"]) == ("red", "tiny", 256)
    assert kvfsctl("prefix", "drop", pool, "--yes").returncode == 0
    assert json.loads(kvfsctl("prefix", "ls", pool, "--json").stdout)["prefixes"] == []
    assert kvfsctl("check", pool).returncode == 0
