"""Prefix reuse on several drives: what they have together, and what one that is away or behind makes of it."""

import logging
import os

import numpy as np
import pytest

import kvfs
from kvfs.drive_set import drive_set as drive_set_module
from kvfs.drive_set.part_record import PartPlace
from kvfs.prefix.match import Miss

from ..conftest import add_model
from ..prefix.conftest import GROUP, assert_holds, publish, tokens  # noqa: F401 - a fixture
from .conftest import OPTIONS
from .test_drive_set import format_set, unplug


@pytest.fixture
def model(drive_set):
    return add_model(drive_set)


def miss_counter(store, miss):
    return store.counters()["prefix"][f"miss_{miss}"]


def test_across_restarts(locations, tokens):  # noqa: F811
    """Groups of all drives are shared, nothing is written; so it is after the process, and for forks."""
    with kvfs.open(locations, **OPTIONS) as drive_set:
        publish(drive_set, add_model(drive_set), "a", tokens, tenant="red", settings={"rope": 1})
    with kvfs.open(locations[::-1], **OPTIONS) as drive_set:
        model, options = drive_set.model("model-float16"), {"tenant": "red", "settings": {"rope": 1}}
        free = drive_set.counters()["space"]["free_bytes"]
        match = drive_set.find_prefix(model, tokens, **options)
        restored = drive_set.restore_prefix(match, "b")
        assert len(restored._record.parts) == 2 and drive_set.counters()["space"]["free_bytes"] == free
        assert_holds(restored, tokens[: 5 * GROUP])
        assert_holds(restored.fork("c"), tokens[: 5 * GROUP])
        for other in ({"tenant": "blue", "settings": {"rope": 1}}, {"tenant": "red"}, {}):
            assert drive_set.find_prefix(model, tokens, **other).num_tokens == 0
        assert drive_set.find_prefix(model, tokens, "red").miss == Miss.OTHER_SETTINGS
        drive_set.delete_sequence("a")
        drive_set.flush()
        assert drive_set.find_prefix(model, tokens, **options).num_tokens == 5 * GROUP
        for name in "bc":
            drive_set.delete_sequence(name)
        drive_set.flush()
        assert drive_set.find_prefix(model, tokens, **options).miss == Miss.UNKNOWN
        assert drive_set.check() == []


def test_parts_of_other_heads(tmp_path, monkeypatch, tokens):  # noqa: F811
    """Two layouts put different heads of one model on a drive: one's keys are never taken for the other's."""
    with kvfs.open(format_set(tmp_path, "ab"), **OPTIONS) as drive_set:
        model = add_model(drive_set)
        a, b = drive_set.membership.drives
        for name, drives in (("x", (a, b)), ("y", (b, a))):
            places = tuple(PartPlace(head, head + 1, drive) for head, drive in enumerate(drives))
            monkeypatch.setattr(drive_set_module, "spread", lambda heads, candidates, places=places: places)
            publish(drive_set, model, name, tokens if name == "x" else tokens[: 2 * GROUP])
        assert {drive_set.sequence(name)._parts[0].store.path[-6] for name in "xy"} == {"a", "b"}
        for stop in (2 * GROUP, 5 * GROUP):
            match = drive_set.find_prefix(model, tokens[:stop])
            assert match.num_tokens == stop
            restored = drive_set.restore_prefix(match, f"restored {stop}")
            assert_holds(restored, tokens[:stop])
        drive_set.delete_sequence("x")
        drive_set.delete_sequence(f"restored {5 * GROUP}")
        match = drive_set.find_prefix(model, tokens)
        assert match.num_tokens == 2 * GROUP
        assert_holds(drive_set.restore_prefix(match, "z"), tokens[: 2 * GROUP])


def test_shortest_of_all(drive_set, model, tokens, caplog):  # noqa: F811
    """A drive that has lost some of its part: what all have is found, and right."""
    source = publish(drive_set, model, "a", tokens)
    twin = publish(drive_set, model, "twin", tokens[:GROUP])
    drive_set.flush()
    part = source._parts[1]
    lba = part._groups[3].base_lba + 1
    store = part.store
    page = int(store._drive.ftl.resolve(np.array([lba]))[0])
    with open(store.path, "r+b") as file:
        file.seek(store._drive.ftl.media.layout.data_start + page * 4096 + 99)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    restored = drive_set.restore_prefix(drive_set.find_prefix(model, tokens), "b")
    with pytest.raises(kvfs.errors.NvmeStatusError, match=os.path.basename(store.path)):
        drive_set.attend(0, np.ones((1, 1, 8, 64), np.float32), restored)
    with caplog.at_level(logging.WARNING):
        match = drive_set.find_prefix(model, tokens)
    assert (match.num_tokens, match.miss) == (3 * GROUP, Miss.DAMAGED)
    assert "is damaged: 2 groups are not found any more" in caplog.text
    assert_holds(drive_set.restore_prefix(match, "c"), tokens[: 3 * GROUP])
    assert drive_set.find_prefix(model, tokens, verify=True).num_tokens == 3 * GROUP
    assert_holds(twin, tokens[:GROUP])


def test_a_lost_drive(tmp_path, tokens, caplog):  # noqa: F811
    """A miss with its reason, whether it is known to be lost or found so by the look-up; and back with it."""
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set, caplog.at_level(logging.CRITICAL + 1):
        model = add_model(drive_set)
        publish(drive_set, model, "a", tokens)
        drive_set.flush()
        match = drive_set.find_prefix(model, tokens)
        for drive in ("known", "found"):
            member = unplug(drive_set, locations[1])
            if drive == "known":
                member.lose(OSError("gone"))
            else:
                member.store._volume.database._clean.clear()  # or the look-up needs no drive
                member.store._catalogue._db.execute("PRAGMA shrink_memory")
            restored = drive_set.restore_prefix(match, f"empty, {drive}")
            assert restored.num_tokens == 0
            missed = drive_set.find_prefix(model, tokens)
            assert (missed.num_tokens, missed.miss) == (0, Miss.DRIVE_LOST)
            assert drive_set.find_prefix(model, tokens ^ 1).miss == Miss.UNKNOWN
            drive_set.drives.bring_back(locations[1])
            match = drive_set.find_prefix(model, tokens)
            assert match.num_tokens == 5 * GROUP
            assert_holds(drive_set.restore_prefix(match, f"whole, {drive}"), tokens[: 5 * GROUP])
        assert miss_counter(drive_set, Miss.DRIVE_LOST) == 2
        assert drive_set.check() == []


def test_one_copy_lost(tmp_path, tokens, caplog):  # noqa: F811
    """A prompt that each drive has whole is found without one of them."""
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set, caplog.at_level(logging.CRITICAL + 1):
        single = add_model(drive_set, num_kv_heads=1, num_query_heads=4)
        for name, stop in (("x", 2 * GROUP), ("y", GROUP)):
            sequence = drive_set.create_sequence(single, name)
            rows = np.random.default_rng(1).standard_normal((stop, 1, 64), np.float32)
            for layer in range(2):
                sequence.append(layer, rows, rows)
            sequence.append_tokens(tokens[:stop])
            sequence.publish()
        drive_set.flush()
        assert drive_set.find_prefix(single, tokens[: 2 * GROUP]).miss is None
        unplug(drive_set, drive_set.sequence("x")._parts[0].store.path).lose(OSError("gone"))
        match = drive_set.find_prefix(single, tokens[: 2 * GROUP])
        assert (match.num_tokens, match.miss) == (GROUP, Miss.DRIVE_LOST)
        assert np.array_equal(drive_set.restore_prefix(match, "z").read(1)[0], rows.astype(np.float16))


@pytest.mark.parametrize("lost", [False, True])
def test_dropped(tmp_path, tokens, caplog, lost):  # noqa: F811
    """What may be used no more is not found, nor when a drive comes back that was away."""
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set, caplog.at_level(logging.CRITICAL + 1):
        model = add_model(drive_set)
        for tenant in ("red", "blue"):
            publish(drive_set, model, tenant, tokens, tenant=tenant)
        drive_set.flush()
        usage = drive_set.prefix_usage()
        assert [(u.tenant, u.model, u.settings, u.num_groups, u.num_sequences) for u in usage] == [
            ("blue", model.name, "{}", 5, 1),
            ("red", model.name, "{}", 5, 1),
        ]
        if lost:
            unplug(drive_set, locations[1]).lose(OSError("gone"))
        assert drive_set.drop_prefixes("red") == 5
        if lost:
            drive_set.drives.bring_back(locations[1])
        for member in drive_set._live:
            assert {usage.tenant for usage in member.store.prefix_usage()} == {"blue"}
        assert drive_set.find_prefix(model, tokens, "red").num_tokens == 0
        assert drive_set.find_prefix(model, tokens, "blue").num_tokens == 5 * GROUP


def test_drained(tmp_path, tokens):  # noqa: F811
    """What moves is found where it is then; the drive that has left knows of none, and may join again."""
    locations = format_set(tmp_path, "abc")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        model = add_model(drive_set)
        source = publish(drive_set, model, "a", tokens, tenant="red")
        gone = max(part.store.path for part in source._parts)
        drive_set.drives.drain(gone)
        match = drive_set.find_prefix(model, tokens, "red")
        assert match.num_tokens == 5 * GROUP
        assert_holds(drive_set.restore_prefix(match, "b"), tokens[: 5 * GROUP])
        assert_holds(publish(drive_set, model, "c", tokens[:GROUP] ^ 7, tenant="red"), tokens[:GROUP] ^ 7)
        assert drive_set.check() == []
    with kvfs.open(gone) as store:
        assert store.prefix_usage() == []
        publish(store, add_model(store), "own", tokens)
        store.delete_sequence("own")
    with kvfs.open([path for path in locations if path != gone], **OPTIONS) as drive_set:
        drive_set.drives.add(gone)
        model = drive_set.model("model-float16")
        assert [usage.num_groups for usage in drive_set.prefix_usage()] == [6]
        match = drive_set.find_prefix(model, tokens, "red")
        assert_holds(drive_set.restore_prefix(match, "d"), tokens[: 5 * GROUP])
