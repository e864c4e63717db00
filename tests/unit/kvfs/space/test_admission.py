"""Objects that are stored when they are offered for the second time."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument
from kvfs.space.admission import SecondSight

from ..remote.owner import Served

DATA = np.full(8192, 7, np.uint8)


def test_the_second_sight_counts(store):
    """Flash worn by what nobody asks for, or a cache that never takes anything."""
    cache = store.object_cache("c", admission="second-sight")
    assert cache.put([b"a", b"b"], [DATA, DATA]) == [False, False]
    assert cache.put([b"a"], [DATA]) == [True]
    assert cache.contains([b"a", b"b"]) == [True, False]
    assert cache.put([b"a"], [DATA]) == [True]  # it is there
    (counters,) = store.counters()["objects"]["caches"]
    wanted = {"stored": 1, "present": 1, "declined": 2, "refused": 0, "bytes_spared": 2 * DATA.nbytes}
    assert wanted.items() <= counters.items()
    assert counters["bytes_written"] == DATA.nbytes


def test_it_is_whoever_asks(store):
    """Another user of the same name, or another identity, has its own rules and sights."""
    cautious = store.object_cache("c", {"model": "m"}, admission="second-sight")
    assert cautious.put([b"a"], [DATA]) == [False]
    other = store.object_cache("c", {"model": "n"}, admission="second-sight")
    assert other.put([b"a"], [DATA]) == [False]
    assert store.object_cache("c", {"model": "m"}).put([b"b"], [DATA]) == [True]
    assert cautious.put([b"a"], [DATA]) == [True]
    with pytest.raises(InvalidArgument, match="all, second-sight"):
        store.object_cache("c", admission="third")


def test_ghosts_are_bounded():
    """Keys of ever new prompts would fill the memory; the oldest sight is forgotten first."""
    sights = SecondSight(most=3)
    assert not any(sights.admits(1, b"%d" % number) for number in range(5))
    assert len(sights) == 3
    assert not sights.admits(1, b"0")  # forgotten
    assert sights.admits(1, b"4")
    assert not sights.admits(1, b"4")  # what was admitted, and evicted since, is new again


def test_in_a_mount_and_in_a_set(path, tmp_path):
    """The same option, whoever has the drive."""
    with kvfs.open(path, num_workers=1) as store, Served(store, tmp_path) as served, served.open() as client:
        cache = client.object_cache("c", admission="second-sight")
        assert [cache.put([b"a"], [DATA])[0] for _ in range(2)] == [False, True]
        assert client.object_cache("c").put([b"b"], [DATA]) == [True]
    locations = [str(tmp_path / f"{name}.kvfs") for name in "ab"]
    kvfs.format(locations, "48MiB")
    with kvfs.open(locations, num_workers=1) as drive_set:
        cache = drive_set.object_cache("c", admission="second-sight")
        keys = [b"%d" % number for number in range(8)]
        assert cache.put(keys, [DATA] * 8) == [False] * 8
        assert cache.put(keys, [DATA] * 8) == [True] * 8
        assert drive_set.counters()["objects"]["declined"] == 8
