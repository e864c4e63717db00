"""What is evicted unasked. Rounds are called here; the thread is tested to begin and to end."""

import threading

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument
from kvfs.telemetry.events import EVENTS

from ..conftest import add_model
from .test_space import GROUP, make, names

SECOND = 1_000_000_000


@pytest.fixture
def model(store):
    return add_model(store, name="m", group_tokens=GROUP)


def later(store, seconds):
    now = store._space.clock()
    store._space.clock = lambda: now + seconds * SECOND


def fill_to(store, model, percent, name="s"):
    """Sequences until so much of the drive is in use; their names."""
    made = []
    while use(store) * 100 < percent:
        made.append(make(store, model, f"{name}{len(made):04}", 16).name)
    return made


def use(store):
    space = store.counters()["space"]
    return 1 - space["free_bytes"] / space["capacity_bytes"]


def test_nothing_by_default(store, model):
    """A drive whose owner has asked for nothing loses nothing."""
    make(store, model, "a").set_attribute("user.kvfs.ttl", b"1")
    store._evictor.look()
    assert store._evictor._thread is None
    assert names(store) == ["a"] and not store.background_eviction().is_on


def test_what_has_outlived_its_time_goes(store, model):
    """Counted from the last use, without any cap."""
    store.set_background_eviction(expired=True)
    for name, seconds in (("short", b"10"), ("used", b"10"), ("long", b"10000"), ("for ever", None)):
        sequence = make(store, model, name)
        if seconds:
            sequence.set_attribute("user.kvfs.ttl", seconds)
    pinned = make(store, model, "pinned")
    pinned.set_attribute("user.kvfs.ttl", b"10")
    pinned.set_attribute("user.kvfs.pinned", b"1")
    store.flush()
    last = EVENTS.newest()[-1]["number"] if EVENTS.newest() else 0
    later(store, 6)
    store.sequence("used").read(0)
    later(store, 6)
    store._evictor.look()
    assert names(store) == ["for ever", "long", "pinned", "used"]
    counters = store.counters()["eviction"]
    assert (counters["expired"], counters["evictions"]) == (1, 1)
    (event,) = EVENTS.newest(last)
    assert (event["kind"], event["facts"]) == ("evicted", {"cause": "expired", "sequences": 1})


def test_a_full_drive_goes_down_to_the_low_watermark(store, model):
    """Those used longest ago, never what is pinned; and their blocks are free, durably."""
    store.set_background_eviction(high_percent=60, low_percent=40)
    made = fill_to(store, model, 50)
    store._evictor.look()
    assert names(store) == made  # below the high one
    made += fill_to(store, model, 65, "t")
    store.sequence(made[0]).read(0)
    store.sequence(made[1]).set_attribute("user.kvfs.pinned", b"1")
    store._evictor.look()
    assert 0.3 < use(store) <= 0.4
    left = names(store)
    assert made[0] in left and made[1] in left and made[2] not in left and made[-1] in left
    assert left == [made[0], made[1], *made[-(len(left) - 2) :]]
    assert store.counters()["eviction"]["watermark_evictions"] == len(made) - len(left)
    assert not store._catalogue.has_changes


def test_sequences_do_not_go_for_objects(store, model, caplog):
    """A cache of objects without a cap would have all sequences deleted, and the drive stay full."""
    store.set_background_eviction(high_percent=30, low_percent=20)
    make(store, model, "a")
    cache = store.object_cache("c")
    for number in range(18):
        cache.put([b"%d" % number], [np.ones(1 << 20, np.uint8)])
    for _ in range(2):
        store._evictor.look()
    assert names(store) == ["a"]
    assert [record.message for record in caplog.records] == [
        f"{store.path}: objects and files alone take more than the low watermark of 20%: no sequence is"
        " evicted for it; give the caches of objects a cap"
    ]


def test_the_thread_begins_and_ends(path):
    """A daemon that does not end, or an administrator's word that is forgotten with the process."""
    store = kvfs.open(path, num_workers=1, evict_every_s=3600)
    store.set_background_eviction(expired=True, high_percent=90)
    thread = store._evictor._thread
    assert thread.is_alive()
    store.close()
    assert not thread.is_alive()
    looked = threading.Event()
    with kvfs.open(path, num_workers=1, evict_every_s=0.001) as store:
        assert vars(store.background_eviction()) == {"expired": True, "high_percent": 90, "low_percent": 80}
        store._evictor.look = looked.set
        assert looked.wait(60)
    with kvfs.open(path, num_workers=1, evict_every_s=None) as store:
        assert store._evictor._thread is None
        store.set_background_eviction()
    with kvfs.open(path, num_workers=1, evict_every_s=3600) as store:
        assert store._evictor._thread is None


def test_a_set_of_drives(tmp_path):
    """One drive of several that is too full: whole sequences go, those with parts there."""
    locations = [str(tmp_path / f"{name}.kvfs") for name in "ab"]
    kvfs.format(locations, "48MiB")
    with kvfs.open(locations, num_workers=1, cache_bytes="24MiB") as drive_set:
        model = add_model(drive_set, name="m", group_tokens=GROUP)
        drive_set.set_background_eviction(expired=True, high_percent=40, low_percent=20)
        made = []
        while use(drive_set) < 0.45:
            made.append(make(drive_set, model, f"s{len(made):03}", 32).name)
        drive_set._evictor.look()
        assert 0.1 < use(drive_set) <= 0.2
        left = names(drive_set)
        assert left == made[-len(left) :]
        drive_set.sequence(left[0]).set_attribute("user.kvfs.ttl", b"5")
        later(drive_set, 6)
        drive_set._evictor.look()
        assert names(drive_set) == left[1:]
    with kvfs.open(locations, num_workers=1, cache_bytes="24MiB") as drive_set:
        assert drive_set.background_eviction().high_percent == 40


@pytest.mark.parametrize(
    "bad",
    [{"high_percent": 100}, {"high_percent": 50, "low_percent": 51}, {"low_percent": 5}, {"high_percent": "9"}],
)
def test_bad_watermarks(store, bad):
    with pytest.raises(InvalidArgument):
        store.set_background_eviction(**bad)
    assert not store.background_eviction().is_on
