"""Caches of objects on several drives: where they lie, one cap, and drives that are lost, late or gone."""

import logging
import os
import threading

import pytest

import kvfs
from kvfs.drive_set import missed_deletions
from kvfs.drive_set.spreading import ranked
from kvfs.errors import InvalidArgument

from ..objects.conftest import MIB, NO_MISSES, content, get, key_of, put
from .conftest import OPTIONS
from .test_drive_set import format_set, unplug

SMALL = 64 << 10
WAYS = ("deleted", "deleted before", "dropped", "replaced", "put again", "capped", "many")


@pytest.fixture
def cache(drive_set):
    return drive_set.object_cache("cache", {"model": "m"})


@pytest.fixture(autouse=True)
def quiet(caplog):
    with caplog.at_level(logging.CRITICAL + 1, "kvfs"):
        yield


def seeds_on(drive_set, count, number):
    """Seeds whose keys go to the drive of this number."""
    drives = list(drive_set.membership.drives)
    found = (seed for seed in range(10_000) if ranked(key_of(seed), drives)[0] == drives[number])
    return [next(found) for _ in range(count)]


def objects_on(drive_set):
    return [sum(usage.objects for usage in member.store.object_usage()) for member in drive_set._live]


def lose(drive_set, location):
    member = unplug(drive_set, location)
    member.lose(OSError("gone"))
    return member


def test_one_drive_each(drive_set, cache, locations):
    """Objects are dealt out, found again wherever drives are named first, and counted once."""
    seeds = range(40)
    assert put(cache, *seeds, num_bytes=SMALL) == [True] * 40
    assert put(cache, *seeds, num_bytes=SMALL) == [True] * 40
    one, other = objects_on(drive_set)
    assert one + other == 40 and min(one, other) > 8
    assert get(cache, *seeds, 99, num_bytes=SMALL) == [True] * 40 + [False]
    assert sorted(cache.keys()) == sorted(map(key_of, seeds))
    usage = cache.usage()
    assert usage[:4] == (40, 40 * SMALL, None, 40) and usage.misses == {**NO_MISSES, "absent": 1}
    counted = drive_set.counters()["objects"]
    assert (counted["hits"], counted["stored"], counted["present"]) == (40, 40, 40)
    assert [row["cache"] for row in counted["caches"]] == ["cache"]
    drive_set.close()
    with kvfs.open(locations[::-1], **OPTIONS) as drive_set:
        again = drive_set.object_cache("cache", {"model": "m"})
        assert get(again, *seeds, num_bytes=SMALL) == [True] * 40
        (usage,) = drive_set.object_usage()
        assert (usage.objects, usage.identities, usage.bytes) == (40, 1, 40 * SMALL)
        assert drive_set.drop_objects("cache") == 40
        assert drive_set.check() == []


def test_one_cap(drive_set, tmp_path):
    """Whatever comes, all drives together keep to it; it is told as it was given, and survives."""
    capacity = 10 * SMALL + 1
    cache = drive_set.object_cache("cache", capacity_bytes=capacity)
    for seed in range(60):
        put(cache, seed, num_bytes=SMALL)
        assert cache.usage().bytes <= capacity
    assert cache.usage().evictions == 50 and cache.usage().capacity == capacity
    assert cache.put([b"large"], [content(0, 6 * SMALL)]) == [False]  # more than a drive's share
    pinned = seeds_on(drive_set, 4, 0)
    put(cache, *pinned, num_bytes=SMALL)
    assert cache.pin([key_of(seed) for seed in pinned]) == [True] * 4
    with pytest.raises(InvalidArgument, match="pinned"):
        cache.set_capacity(6 * SMALL)
    assert cache.usage().capacity == capacity == cache.usage().capacity
    assert drive_set.object_usage()[0].capacity_bytes == capacity
    assert cache.unpin([key_of(seed) for seed in pinned]) == [True] * 4
    kvfs.format(tmp_path / "c.kvfs", "48MiB")
    drive_set.drives.add(str(tmp_path / "c.kvfs"))
    for seed in range(100, 160):
        put(cache, seed, num_bytes=SMALL)
        assert cache.usage().bytes <= capacity
    assert objects_on(drive_set) == [3, 3, 3]
    drive_set.close()
    with kvfs.open([str(tmp_path / f"{name}.kvfs") for name in "abc"], **OPTIONS) as drive_set:
        cache = drive_set.object_cache("cache")
        assert cache.usage()[:3] == (9, 9 * SMALL, capacity)
        cache.set_capacity("1MiB")
        assert {usage.capacity_bytes for m in drive_set._live for usage in m.store.object_usage()} == {MIB}


def test_a_lost_drive(drive_set, cache, locations):
    """Its objects are misses, with the reason; puts go to the others; it comes back with what it had."""
    seeds = [*seeds_on(drive_set, 4, 0), *seeds_on(drive_set, 4, 1)]
    put(cache, *seeds[:-1], num_bytes=SMALL)
    drive_set.flush()
    unplug(drive_set, locations[1])
    assert get(cache, *seeds[:4], num_bytes=SMALL) == [True] * 4
    cold = drive_set.object_cache("cache", {"model": "m"})
    for each in (cache, cold):
        assert not any(get(each, *seeds[4:], num_bytes=SMALL))
    misses = {**NO_MISSES, "absent": 1, "drive_lost": 7}  # one was asked for before the loss was known
    assert cache.usage().misses == misses
    assert drive_set.counters()["objects"]["miss_drive_lost"] == 7
    assert put(cache, *seeds, num_bytes=SMALL) == [True] * 8
    assert get(cache, *seeds, num_bytes=SMALL) == [True] * 8
    drive_set.flush()
    drive_set.drives.bring_back(locations[1])
    assert get(cache, *seeds, num_bytes=SMALL) == [True] * 8
    assert cache.usage().objects == 8
    assert drive_set.check() == []


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    "what", ["deleted", "deleted before", "dropped", "replaced", "put again", "capped", "many"]
)
def test_nothing_stale(drive_set, cache, locations, what, reopened, monkeypatch):
    """What was deleted or replaced while a drive was away does not come back, nor in another process."""
    seeds = seeds_on(drive_set, 6, 1)
    put(cache, *seeds, num_bytes=SMALL)
    other = drive_set.object_cache("other")
    put(other, *seeds, num_bytes=SMALL)
    drive_set.flush()
    gone, left = [key_of(seed) for seed in seeds[:2]], seeds[2:]
    if what == "deleted before":
        assert cache.delete(gone) == 2  # and not durably so
    monkeypatch.setattr(missed_deletions, "MAX_MISSED", 1 if what == "many" else 1000)
    lose(drive_set, locations[1])
    if what in ("deleted", "put again", "many"):
        cache.delete(gone)
    if what == "dropped":
        drive_set.drop_objects("cache")
    if what == "put again":  # as other bytes, which is a deletion first
        assert cache.put(gone, [content(77, SMALL), content(78, SMALL)]) == [True, True]
    if what == "replaced":
        assert cache.put(gone, [content(77, SMALL + 5), content(78, SMALL + 5)]) == [True, True]
    if what == "capped":
        cache.set_capacity(2 * SMALL)
    drive_set.flush()
    if reopened:
        drive_set.close()
        drive_set = kvfs.open(locations, **OPTIONS)
        assert drive_set.membership.behind == ()
        cache, other = drive_set.object_cache("cache", {"model": "m"}), drive_set.object_cache("other")
    else:
        drive_set.drives.bring_back(locations[1])
        assert drive_set.membership.behind == ()
    found = cache.contains(gone)
    if what == "put again":
        buffers = [bytearray(SMALL), bytearray(SMALL)]
        assert cache.get(gone, buffers) == [True, True]
        assert buffers[0] == bytes(content(77, SMALL)) and buffers[1] == bytes(content(78, SMALL))
    elif what == "replaced":
        assert {*cache.sizes(gone)} <= {None, SMALL + 5}
    elif what == "capped":
        assert cache.usage().capacity == 2 * SMALL and cache.usage().bytes <= 2 * SMALL
    else:
        assert found == [False, False]
    is_kept = not reopened and what in ("deleted", "deleted before", "put again", "replaced")
    if is_kept:
        assert get(cache, *left, num_bytes=SMALL) == [True] * 4
    if what == "dropped":
        assert get(cache, *left, num_bytes=SMALL) == [False] * 4
    if not reopened and what != "many":
        assert get(other, *seeds, num_bytes=SMALL) == [True] * 6
    assert drive_set.check() == []
    drive_set.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_what_was_elsewhere_is_gone_for_good(drive_set, cache, locations, dropped):
    """Before an object goes to its own drive: or a power cut brings back what another drive had of its key."""
    seeds = seeds_on(drive_set, 2, 0)
    lose(drive_set, locations[0])
    put(cache, *seeds, num_bytes=SMALL)
    drive_set.flush()
    drive_set.drives.bring_back(locations[0])
    elsewhere = list(drive_set.membership.drives)[1]
    missed = cache._objects.missed
    if dropped:
        drive_set.drop_objects("cache")
        cache = drive_set.object_cache("cache", {"model": "m"})
    else:
        assert cache.delete([key_of(seed) for seed in seeds]) == 2
    assert missed.of(elsewhere)
    assert put(cache, *seeds, num_bytes=SMALL) == [True, True]
    assert objects_on(drive_set) == [2, 0]
    assert not missed.of(elsewhere)


def test_degraded(drive_set, cache, locations):
    """Without one of the drives from the beginning."""
    here, there = seeds_on(drive_set, 3, 0), seeds_on(drive_set, 3, 1)
    put(cache, *here, *there, num_bytes=SMALL)
    drive_set.close()
    os.rename(locations[1], locations[1] + ".away")
    with kvfs.open(locations, degraded=True, **OPTIONS) as drive_set:
        cache = drive_set.object_cache("cache", {"model": "m"})
        assert get(cache, *here, *there, num_bytes=SMALL) == [True] * 3 + [False] * 3
        assert cache.usage().misses["drive_lost"] == 3
        assert cache.delete([key_of(there[0])]) == 0
        assert put(cache, there[1], num_bytes=SMALL) == [True]
        os.rename(locations[1] + ".away", locations[1])
        drive_set.drives.bring_back(locations[1])
        assert get(cache, *there, num_bytes=SMALL) == [False, True, True]
        assert sum(objects_on(drive_set)) == 5
        assert drive_set.check() == []


def test_drained(tmp_path):
    """A drive that leaves takes no objects along; one that has some is not empty."""
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        cache = drive_set.object_cache("cache", capacity_bytes=20 * SMALL)
        here, there = seeds_on(drive_set, 3, 0), seeds_on(drive_set, 3, 1)
        put(cache, *here, *there, num_bytes=SMALL)
        drive_set.drives.drain(locations[1])
        assert get(cache, *here, num_bytes=SMALL) == [True] * 3
        assert put(cache, *range(100, 120), num_bytes=SMALL) == [True] * 20
        assert cache.usage().bytes == 20 * SMALL
        with kvfs.open(locations[1], **OPTIONS) as store:
            assert sum(usage.objects for usage in store.object_usage()) == 0
            put(store.object_cache("own"), 1)
        with pytest.raises(kvfs.errors.NotInSet, match="not empty"):
            drive_set.drives.add(locations[1])


def test_in_use_while_a_drive_goes_and_comes(drive_set, cache, locations):
    """Right bytes or a miss, whatever happens meanwhile."""
    failures, is_over = [], threading.Event()

    def work(first):
        try:
            while not is_over.is_set():
                for seed in range(first, first + 12):
                    put(cache, seed, num_bytes=3000)
                    get(cache, seed, num_bytes=3000)
                cache.delete([key_of(first), key_of(first + 1)])
                assert cache.contains([key_of(first), key_of(first + 1)]) == [False, False]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        drive_set.flush()
        lose(drive_set, locations[1])
        drive_set.drives.bring_back(locations[1])
    is_over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    drive_set.flush()
    assert drive_set.check() == []
