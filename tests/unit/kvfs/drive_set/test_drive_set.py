"""Several drives as one store: where heads go, drives that are added, drained, lost, slow, or not its own."""

import logging
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import kvfs
from kvfs import errors
from kvfs.drive_set import set_attention, set_file
from kvfs.drive_set.latency import LEAST_SAMPLES, Latency
from kvfs.kv_tree.transfer import export_sequence, import_sequence, model_of_file
from spdk_glue.status import ConnectionLost

from ..conftest import add_model, plain_attention, random_kv, random_queries
from ..remote.owner import Served
from .conftest import OPTIONS, SIZE

NUM_HEADS, NUM_TOKENS = 4, 700


def model_of(store, **changes):
    return add_model(store, **{"num_kv_heads": NUM_HEADS, "num_query_heads": 2 * NUM_HEADS, **changes})


def fill(sequence, num_tokens=NUM_TOKENS, seed=0):
    keys, values = random_kv(num_tokens, seed, sequence.model.num_kv_heads)
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, keys, values)
    sequence.append_tokens(np.arange(num_tokens))
    return keys.astype(np.float16), values.astype(np.float16)


def assert_holds(sequence, keys, values):
    """It reads and attends as what was appended."""
    for layer in range(sequence.model.num_layers):
        found = sequence.read(layer)
        assert np.array_equal(found[0], keys) and np.array_equal(found[1], values)
    assert np.array_equal(sequence.tokens, np.arange(len(sequence.tokens)))
    queries = random_queries(num_heads=sequence.model.num_query_heads)
    out, lse = sequence.store.attend(0, queries, sequence)
    want_out, want_lse = plain_attention(queries[0], keys, values, [(0, len(keys))])
    np.testing.assert_allclose(out[0], want_out, atol=1e-5)
    np.testing.assert_allclose(lse[0], want_lse, atol=1e-5)


def heads_on(drive_set):
    return {os.path.basename(each["drive"])[0]: each["num_kv_heads"] for each in drive_set.drives.states()}


def format_set(tmp_path, names, **options):
    locations = [str(tmp_path / f"{name}.kvfs") for name in names]
    kvfs.format(locations, SIZE, **options)
    return locations


# where heads go


@pytest.mark.parametrize(("num_heads", "wanted"), [(8, [3, 3, 2]), (3, [1, 1, 1]), (2, [1, 1]), (1, [1])])
def test_heads_are_spread(tmp_path, num_heads, wanted):
    """One drive with all the heads would do all the work."""
    with kvfs.open(format_set(tmp_path, "abc"), **OPTIONS) as drive_set:
        model = model_of(drive_set, num_kv_heads=num_heads, num_query_heads=num_heads)
        sequence = drive_set.create_sequence(model, "s")
        assert [p.stop_head - p.first_head for p in sequence._record.parts] == wanted
        assert_holds(sequence, *fill(sequence))


def test_few_heads_spread_by_sequences(tmp_path):
    """A batch of a model with one KV head: its sequences have to be on all drives."""
    with kvfs.open(format_set(tmp_path, "abc"), **OPTIONS) as drive_set:
        model = model_of(drive_set, num_kv_heads=1, num_query_heads=4)
        sequences = [drive_set.create_sequence(model, f"s{n}") for n in range(6)]
        assert heads_on(drive_set) == {"a": 2, "b": 2, "c": 2}
        kv = [fill(sequence, 300 + n, n) for n, sequence in enumerate(sequences)]
        queries = random_queries(num_sequences=6, num_heads=4)
        out, _ = drive_set.attend(1, queries, sequences)
        for n, (keys, values) in enumerate(kv):
            want, _ = plain_attention(queries[n], keys, values, [(0, len(keys))])
            np.testing.assert_allclose(out[n], want, atol=1e-5)


def test_a_set_of_one(tmp_path):
    """Where several may come, one does."""
    locations = format_set(tmp_path, "a")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        kv = fill(drive_set.create_sequence(model_of(drive_set), "s"))
    with kvfs.open(locations, **OPTIONS) as drive_set:
        assert_holds(drive_set.sequence("s"), *kv)
        with pytest.raises(errors.InvalidArgument, match="last drive"):
            drive_set.drives.drain(locations[0])


def test_any_order_and_place(locations, tmp_path, sequence, drive_set):
    """Drives that were moved, or are named in another order, are the same set."""
    kv = fill(sequence)
    drive_set.close()
    moved = [str(tmp_path / f"moved-{name}") for name in "ba"]
    for old, new in zip(reversed(locations), moved, strict=True):
        os.rename(old, new)
    with kvfs.open(moved, **OPTIONS) as drive_set:
        assert_holds(drive_set.sequence("s"), *kv)
        assert drive_set.check() == []


def test_export_and_import(sequence, drive_set, tmp_path):
    """A sequence of a set as a file, and back."""
    kv = fill(sequence)
    with (tmp_path / "s.safetensors").open("wb") as file:
        export_sequence(sequence, file)
    with (tmp_path / "s.safetensors").open("rb") as file:
        again = import_sequence(drive_set, model_of_file(drive_set, file), "t", file)
    assert_holds(again, *kv)


def test_clients_of_a_set(sequence, drive_set, tmp_path):
    """Through another process's store: what a mount gives its clients, drives included."""
    from kvfs.drive_set.remote_drives import drives_of

    kv = fill(sequence)
    with Served(drive_set, tmp_path / "mount") as served, served.open() as client:
        assert_holds(client.sequence("s"), *kv)
        assert [each["state"] for each in drives_of(client).states()] == ["in use", "in use"]
        kvfs.format(tmp_path / "c.kvfs", SIZE)
        drives_of(client).add(str(tmp_path / "c.kvfs"))
        drives_of(client).drain(str(tmp_path / "b.kvfs"))
        assert heads_on(drive_set) == {"a": 2, "c": 2}
        assert_holds(client.sequence("s"), *kv)
        with pytest.raises(errors.InvalidArgument, match="no drive of this set"):
            drives_of(client).drain("elsewhere")


# drives that are not the right ones


def test_bad_locations(locations, tmp_path):
    """A drive that does not belong to the others must not be taken for one that does."""
    with pytest.raises(errors.NotInSet, match="named twice"):
        kvfs.open([locations[0], locations[0], locations[1]])
    with pytest.raises(errors.DriveMissing, match=r"b\.kvfs"):
        kvfs.open(locations[:1])
    shutil.copy(locations[0], tmp_path / "copy.kvfs")
    with pytest.raises(errors.NotInSet, match="copy of it"):
        kvfs.open([*locations, str(tmp_path / "copy.kvfs")])
    others = format_set(tmp_path, "xy")
    with pytest.raises(errors.NotInSet, match="another set"):
        kvfs.open([locations[0], others[1]])
    kvfs.format(tmp_path / "alone.kvfs", SIZE)
    with pytest.raises(errors.NotInSet, match="not one of a set"):
        kvfs.open([*locations, str(tmp_path / "alone.kvfs")])
    with pytest.raises(errors.DriveOfSet, match="open the set"):
        kvfs.open(locations[1])
    with pytest.raises(errors.NotInSet, match="at least one"):
        kvfs.open([])
    with pytest.raises(errors.InvalidArgument, match="degraded"):
        kvfs.open(tmp_path / "alone.kvfs", degraded=True)
    with kvfs.open(locations, **OPTIONS) as drive_set:  # none of it has harmed the set
        assert drive_set.check() == []
        with pytest.raises(errors.DriveBusy):
            kvfs.open(locations)


def test_bad_formatting(tmp_path):
    """Half a set, or one over somebody's file."""
    (tmp_path / "b.kvfs").write_text("mine")
    with pytest.raises(errors.DriveExists):
        format_set(tmp_path, "ab")
    assert os.listdir(tmp_path) == ["b.kvfs"]
    with pytest.raises(errors.NotInSet, match="named twice"):
        kvfs.format([tmp_path / "c.kvfs", tmp_path / "c.kvfs"], SIZE)
    with pytest.raises(errors.InvalidArgument):
        format_set(tmp_path, "xy", spare_percent=99)
    assert os.listdir(tmp_path) == ["b.kvfs"]


def test_bad_additions(drive_set, locations, tmp_path):
    """A drive with something on it, of another set or with other blocks."""
    format_set(tmp_path, "xy")
    with pytest.raises(errors.NotInSet, match="of a set already"):
        drive_set.drives.add(str(tmp_path / "x.kvfs"))
    with pytest.raises(errors.NotInSet, match="in this set already"):
        drive_set.drives.add(locations[0])
    kvfs.format(tmp_path / "full.kvfs", SIZE)
    with kvfs.open(tmp_path / "full.kvfs", **OPTIONS) as store:
        store.create_sequence(add_model(store), "mine")
    with pytest.raises(errors.NotInSet, match="not empty"):
        drive_set.drives.add(str(tmp_path / "full.kvfs"))
    kvfs.format(tmp_path / "large.kvfs", SIZE, page_size=16384)
    with pytest.raises(errors.NotInSet, match="blocks of 16384"):
        drive_set.drives.add(str(tmp_path / "large.kvfs"))
    with pytest.raises(errors.NotADrive):
        drive_set.drives.add(str(tmp_path / "nowhere.kvfs"))
    assert len(drive_set.drives.states()) == 2
    with kvfs.open(tmp_path / "full.kvfs", **OPTIONS) as store:
        assert store.sequence("mine").num_tokens == 0


def test_set_files(locations, tmp_path):
    """A set's name for the command line: found from anywhere, kept true by those who change the set."""
    path = tmp_path / "pool.kvfs-set"
    set_file.write(path, locations)
    assert set_file.read(path) == locations
    assert 'drives = ["a.kvfs", "b.kvfs"]' in path.read_text()
    kvfs.format(tmp_path / "c.kvfs", SIZE)
    with kvfs.open(path, **OPTIONS) as drive_set:
        with pytest.raises(errors.DriveBusy):
            kvfs.open(path)
        drive_set.drives.add(str(tmp_path / "c.kvfs"))
        drive_set.drives.drain(locations[1])
    assert 'drives = ["a.kvfs", "c.kvfs"]' in path.read_text()
    kvfs.open(path, **OPTIONS).close()
    for text in ("drives = []", "drives = 3", "no toml", 'drives = ["a", 3]', "\xff"):
        path.write_text(text, "latin-1")
        with pytest.raises(errors.NotADrive):
            kvfs.open(path)
    with pytest.raises(errors.NotADrive, match="no such file"):
        kvfs.open(tmp_path / "other.kvfs-set")


# adding and draining


def test_added_drives_are_used(drive_set, sequence, tmp_path):
    """A drive that takes no part is of no use."""
    kvfs.format(tmp_path / "c.kvfs", SIZE)
    drive_set.drives.add(str(tmp_path / "c.kvfs"))
    kv = fill(drive_set.create_sequence(sequence.model, "t"))
    assert_holds(drive_set.sequence("t"), *kv)
    assert len(drive_set.sequence("t")._record.parts) == 3
    drive_set.close()
    with kvfs.open([str(tmp_path / f"{n}.kvfs") for n in "abc"], **OPTIONS) as drive_set:
        assert_holds(drive_set.sequence("t"), *kv)


@pytest.mark.parametrize("drive", [0, 1])
def test_drain_in_use(tmp_path, drive):
    """Moving parts while they are attended over, appended to, truncated and forked: nothing may be lost."""
    locations = format_set(tmp_path, "abc")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        model = model_of(drive_set)
        kept = {name: fill(drive_set.create_sequence(model, name), 900, n) for n, name in enumerate("xyz")}
        drive_set.sequence("y").set_attribute("user.note", b"mine")
        moved = []
        thread = threading.Thread(
            target=lambda: drive_set.drives.drain(
                locations[drive], lambda done, total: moved.append((done, total))
            )
        )
        thread.start()
        grown = drive_set.create_sequence(model, "grown")
        rows = random_kv(2000, 9, NUM_HEADS)
        for start in range(0, 2000, 100):
            for layer in range(model.num_layers):
                grown.append(layer, *(array[start : start + 100] for array in rows))
            for name, (keys, values) in kept.items():
                assert_holds(drive_set.sequence(name), keys, values)
        drive_set.sequence("x").truncate(500)
        fork = drive_set.sequence("z").fork("fork")
        thread.join()
        assert moved and moved[-1][0] == moved[-1][1]
        kept["x"] = tuple(array[:500] for array in kept["x"])
        for name, kv in {**kept, "fork": kept["z"], "grown": [a.astype(np.float16) for a in rows]}.items():
            if name != "grown":
                assert_holds(drive_set.sequence(name), *kv)
            else:
                assert np.array_equal(grown.read(0)[0], kv[0])
        assert fork.num_tokens == 900
        assert drive_set.sequence("y").attributes()["user.note"] == b"mine"
        assert drive_set.check() == []
    left = [location for number, location in enumerate(locations) if number != drive]
    with kvfs.open(left, **OPTIONS) as drive_set:
        for name, kv in kept.items():
            assert_holds(drive_set.sequence(name), *kv)
        assert drive_set.sequence("y").attributes()["user.note"] == b"mine"
    with kvfs.open(locations[drive]) as store:  # and the drive is an empty one again
        assert store.sequences() == [] and not [m for m in store.models() if "/" in m.name]


@pytest.mark.parametrize("index", [0, 1])
def test_the_old_copy_goes_last(tmp_path, monkeypatch, index):
    """A drive that forgets its copy while the record that names the new one can still be lost loses both."""
    with kvfs.open(format_set(tmp_path, "abc"), **OPTIONS) as drive_set:
        model = model_of(drive_set, num_kv_heads=2, num_query_heads=4)
        sequence = drive_set.create_sequence(model, "s")
        kv = fill(sequence)
        drive_set.flush()
        old = drive_set._member(sequence._record.parts[index])
        delete, is_durable = old.store.delete_sequence, []

        def deleting(name):
            first = drive_set._member(sequence._record.parts[0])
            is_durable.append(not first.store._catalogue.has_changes)
            delete(name)

        monkeypatch.setattr(old.store, "delete_sequence", deleting)
        drive_set.drives.drain(old.location)
        assert is_durable == [True]
        assert_holds(sequence, *kv)


def test_a_drain_that_ends_early(tmp_path, monkeypatch):
    """Called off, deleted from, or without room: each part is somewhere, once."""
    monkeypatch.setattr("kvfs.drive_set.drives.STEP_SECONDS", -1)  # one copy a step
    monkeypatch.setattr("kvfs.drive_set.moving.STEP_BYTES", 1)
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        model = model_of(drive_set)
        kv = fill(drive_set.create_sequence(model, "s"), 900)
        fill(drive_set.create_sequence(model, "gone"), 900)
        drives = drive_set.drives
        assert not drives.drain_step(locations[0]).is_done
        drive_set.delete_sequence("gone")
        assert_holds(drive_set.sequence("s"), *kv)
        drives.stay(locations[0])
        assert_holds(drive_set.sequence("s"), *kv)
        assert drive_set.check() == []
        sequence = drive_set.create_sequence(model, "large")
        with pytest.raises(errors.OutOfSpace):
            while True:
                fill(sequence, 4096)
        before = sequence.num_tokens
        with pytest.raises(errors.OutOfSpace):
            drives.drain(locations[0])
        assert sequence.num_tokens == before
        assert_holds(drive_set.sequence("s"), *kv)


# lost and slow drives


def unplug(drive_set, location):
    member = next(m for m in drive_set._members.values() if m.location == location)
    namespace = member._store._namespace

    def gone(*arguments, **options):
        raise ConnectionLost("no route to the drive")

    for name in ("attention_submit", "read", "read_scattered", "write", "submit_write", "flush", "_run"):
        setattr(namespace, name, gone)
    return member


@pytest.fixture
def lost(tmp_path, caplog):
    """A set whose drive b is gone, with a sequence on both drives, and one on a alone."""
    locations = format_set(tmp_path, "ab")
    with kvfs.open(locations, **OPTIONS) as drive_set:
        both = drive_set.create_sequence(model_of(drive_set), "both")
        kv = fill(both)
        single = model_of(drive_set, name="single", num_kv_heads=1, num_query_heads=4)
        one = next(
            s
            for n in range(2)
            if (s := drive_set.create_sequence(single, f"one{n}"))._record.parts[0].drive_id
            == drive_set.membership.files
        )
        one_kv = fill(one)
        drive_set.flush()
        member = unplug(drive_set, locations[1])
        with caplog.at_level(logging.CRITICAL + 1):
            yield drive_set, member, both, kv, one, one_kv


def test_a_lost_drive(lost):
    """What it held is an error that says so; all else goes on."""
    drive_set, _, both, _, one, one_kv = lost
    queries = random_queries(num_heads=8)
    with pytest.raises(
        errors.DriveLost, match=r"b\.kvfs is lost \(no route to the drive\).*KV heads 2 to 3.*'both'"
    ):
        drive_set.attend(0, queries, both)
    assert drive_set.drives.states()[1]["state"] == "lost"
    for use in (both.flush, lambda: both.read(0), lambda: both.truncate(3), lambda: both.fork("f")):
        with pytest.raises(errors.DriveLost):
            use()
    assert_holds(one, *one_kv)
    one.append(0, *random_kv(5, num_kv_heads=1))
    drive_set.flush()
    fresh = drive_set.create_sequence(both.model, "fresh")
    assert_holds(fresh, *fill(fresh))
    assert any("lost" in line for line in drive_set.check())
    with pytest.raises(errors.DriveLost):
        drive_set.delete_sequence("both")
    drive_set.drives.forget("both")
    with pytest.raises(errors.NoSuchSequence):
        drive_set.sequence("both")


def test_a_drive_that_comes_back(lost):
    """Its parts belong to their sequences again, and whoever holds one goes on with it."""
    drive_set, member, both, kv, one, one_kv = lost
    with pytest.raises(errors.DriveLost):
        both.flush()
        both.compact()
    with pytest.raises(errors.InvalidArgument, match="not lost"):
        drive_set.drives.bring_back(drive_set._live[0].location)
    drive_set.drives.bring_back(member.location)
    assert_holds(both, *kv)
    assert_holds(one, *one_kv)
    more = random_kv(100, 5, NUM_HEADS)
    for layer in range(both.model.num_layers):
        both.append(layer, *more)
    both.flush()
    assert drive_set.check() == []


def test_what_was_forgotten_stays_gone(lost):
    """A sequence that was deleted while a drive was away must not come back with it."""
    drive_set, member, both, *_ = lost
    with pytest.raises(errors.DriveLost):
        both.compact()
    drive_set.drives.forget("both")
    drive_set.drives.bring_back(member.location)
    assert "both" not in [sequence.name for sequence in drive_set.sequences()]
    drive_set.flush()
    assert drive_set.check() == []


def test_a_failed_append_leaves_no_half(lost):
    """Tokens that one drive took and the other did not."""
    drive_set, member, both, kv, *_ = lost
    with pytest.raises(errors.DriveLost):
        for _ in range(20):
            both.append(0, *random_kv(500, 3, NUM_HEADS))
    drive_set.drives.bring_back(member.location)
    assert_holds(both, *kv)


def test_degraded(locations, sequence, drive_set):
    """A set without one of its drives: by an option, with errors for what is not there."""
    kv = fill(sequence)
    single = model_of(drive_set, name="single", num_kv_heads=1, num_query_heads=4)
    singles = {}
    for number in range(2):
        one = drive_set.create_sequence(single, f"one{number}")
        singles[one._record.parts[0].drive_id] = (one.name, fill(one))
    here = drive_set.membership.files
    drive_set.close()
    os.rename(locations[1], locations[1] + ".away")
    with pytest.raises(errors.DriveMissing, match=r"b\.kvfs"):
        kvfs.open(locations, **OPTIONS)
    with kvfs.open(locations, degraded=True, **OPTIONS) as drive_set:
        name, one_kv = singles[here]
        assert_holds(drive_set.sequence(name), *one_kv)
        with pytest.raises(errors.DriveLost, match="'s'"):
            drive_set.sequence("s").read(0)
        assert "s" in [row.name for row in drive_set.catalogue_rows()]
        assert any("'s'" in line for line in drive_set.check())
        os.rename(locations[1] + ".away", locations[1])
        drive_set.drives.bring_back(locations[1])
        assert_holds(drive_set.sequence("s"), *kv)
    with kvfs.open(locations, **OPTIONS) as drive_set:
        assert_holds(drive_set.sequence("s"), *kv)
        assert len(drive_set.sequences()) == 3


def test_lost_for_good(locations, sequence, drive_set):
    """Without a drive that never comes back: what was on it goes, the set is whole again."""
    fill(sequence)
    drive_set.close()
    os.unlink(locations[1])
    with kvfs.open(locations, degraded=True, **OPTIONS) as drive_set:
        drive_set.drives.remove_lost(locations[1])
    with kvfs.open(locations[:1], **OPTIONS) as drive_set:
        assert drive_set.sequences() == [] and drive_set.check() == []


def test_a_slow_drive_is_reported_once(drive_set, sequence, caplog, monkeypatch):
    """A drive that all others wait for: whoever looks must find which."""
    fill(sequence, 4 * 256)
    sequence.flush()
    slow = list(drive_set._members.values())[1]
    fetch = slow.store._namespace.attention_fetch

    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)  # a busy machine's own is late
    monkeypatch.setattr(set_attention, "time", clock)

    def slowly(*arguments):
        clock.now += 0.005
        return fetch(*arguments)

    slow.store._namespace.attention_fetch = slowly
    slow.store._namespace.attend_now = lambda *arguments: None  # though its pages are in the cache
    queries = random_queries(num_heads=8)
    for _ in range(3 * LEAST_SAMPLES):
        drive_set.attend(0, queries, sequence)
    states = drive_set.drives.states()
    assert [each["is_slow"] for each in states] == [0, 1]
    assert states[1]["latency_ratio"] > 2 and states[1]["attend_latency_us"] > 4000
    lines = [record for record in caplog.records if "is slow" in record.getMessage()]
    assert len(lines) == 1 and slow.location in lines[0].getMessage()
    caplog.clear()


def test_latency_forgives():
    """A drive that was slow once is not called so for ever, nor one that has more to do, nor for one hiccup."""
    one, other = Latency(), Latency()

    def note(count, seconds, num_bytes=1000) -> int:
        """How often it became slow."""
        became = 0
        for _ in range(count):
            one.note(seconds, num_bytes)
            other.note(0.001, 1000)
            became += one.becomes_slow([other])
        return became

    assert note(100, 0.010) == 1 and one.is_slow
    assert note(100, 0.001) == 0 and not one.is_slow
    assert note(1, 10.0) == 0 and note(100, 0.001) == 0
    assert note(100, 0.010, 10_000) == 0
