"""Sealing as users have it: what is made, shared, cut, replaced, given up, and what is left of it."""

import threading

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, NoSuchModel, OutOfSpace
from kvfs.inspection import Inspection
from kvfs.repair import repair
from kvfs.sealing import background
from kvfs.sealing.policy import DERIVES
from kvfs.sealing.sealing import Outcome
from spdk_glue.status import NvmeStatusError

from ..conftest import random_queries
from ..test_check import flip, sql
from .conftest import FULL, GROUP, LAYERS, append, check_fast, check_true, rows, small_model, spans

OPTIONS = {"cache_bytes": "8MiB", "num_workers": 1, "worker": "reference"}


@pytest.fixture
def store(path):
    with kvfs.open(path, **OPTIONS) as store:
        yield store


@pytest.fixture
def sequence(store):
    return store.create_sequence(small_model(store), "s")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3", "int8", "int4"])
def test_what_is_derived(store, dtype):
    """Pages of every storage dtype: what the encoders make of what the sequence reads as."""
    shape = {"num_kv_heads": 2, "num_query_heads": 2, "head_dim": 64, "num_layers": LAYERS}
    model = small_model(store, dtype=dtype, **{**shape, "group_tokens": 40})
    sequence = store.create_sequence(model, "s")
    append(sequence, 3 * 40 + 7)
    for name in DERIVES:
        assert sequence.seal(name) == 3 * 40
        assert spans(sequence, name) == [(0, 3)]
    assert check_true(store, sequence) == 3 * 40
    assert store.check() == []


@pytest.mark.usefixtures("fast_encoders")
class TestSegments:
    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    def test_in_several_commands(self, store, monkeypatch, num_layers):
        """Of some layers each, the last of fewer: from these layers' groups, to their share of the blocks."""
        sequence = store.create_sequence(small_model(store, num_layers=5), "s")
        append(sequence, 2 * GROUP)
        command_bytes = num_layers * 2 * sequence.model.layout.image_bytes
        monkeypatch.setattr("kvfs.sealing.commands.COMMAND_BYTES", command_bytes)
        for name in DERIVES:
            assert sequence.seal(name) == 2 * GROUP
        check_fast(store, sequence)
        assert store.check() == []

    def test_before_and_after_a_flush(self, store, sequence):
        """Groups need no row to be sealed; their segments get rows with them, and outlive the process."""
        append(sequence, (FULL + 3) * GROUP + 5)
        assert sequence.seal() == (FULL + 3) * GROUP
        assert [one.id for one in sequence.derived_segments("sketch")] == [None, None]
        check_fast(store, sequence)
        assert store.check() == []  # which flushes
        assert spans(sequence) == [(0, FULL), (FULL, 3)]
        assert all(one.id is not None for one in sequence.derived_segments("sketch"))
        path = store.path
        store.close()
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.sequence("s")
            assert spans(sequence) == [(0, FULL), (FULL, 3)]
            check_fast(store, sequence)
            assert store.check() == []

    def test_longer_ones_replace_shorter_ones(self, store, sequence):
        """Nothing is there twice, named or not."""
        for num_groups in range(1, FULL + 1):
            append(sequence, GROUP, num_groups)
            if num_groups % 2:
                sequence.flush()
            assert sequence.seal() == num_groups * GROUP
            assert spans(sequence) == [(0, num_groups)]
        sequence.flush()
        [usage] = store.derived_usage()
        assert (usage.num_segments, usage.num_tokens, usage.is_wanted) == (1, FULL * GROUP, False)
        assert store.counters()["sealing"]["replaced"] == FULL - 1
        assert store.counters()["sealing"]["sketch_bytes"] == usage.num_bytes
        assert 0 < usage.share < 1
        check_fast(store, sequence)
        assert store.check() == []

    def test_forks_share(self, store, sequence):
        """Of what they have in common there is one; cutting one of them takes nothing from the other."""
        append(sequence, 2 * FULL * GROUP)
        sequence.seal()
        fork = sequence.fork("fork")
        assert fork.derived_segments("sketch") == sequence.derived_segments("sketch")
        sequence.truncate(FULL * GROUP + 1)
        assert spans(sequence) == [(0, FULL)] and spans(fork) == [(0, FULL), (FULL, FULL)]
        append(sequence, FULL * GROUP, seed=7)
        sequence.seal()
        assert spans(sequence) == [(0, FULL), (FULL, FULL)]
        check_fast(store, sequence, fork)
        [usage] = store.derived_usage()
        assert usage.num_segments == 3
        store.delete_sequence("s")
        assert store.derived_usage()[0].num_segments == 2
        check_fast(store, fork)
        store.delete_sequence("fork")
        store.flush()
        assert store.derived_usage() == []
        space = store.counters()["space"]
        assert space["free_bytes"] == space["capacity_bytes"]
        assert store.check() == []

    def test_a_short_one_stays_for_whom_it_is_all(self, store, sequence):
        """A fork that ends where a short segment does keeps it when the other's grows."""
        append(sequence, 2 * GROUP)
        sequence.seal()
        fork = sequence.fork("fork")
        append(sequence, 2 * GROUP, seed=3)
        sequence.flush()
        sequence.seal()
        assert spans(sequence) == [(0, 4)] and spans(fork) == [(0, 2)]
        check_fast(store, sequence, fork)
        store.delete_sequence("fork")
        append(sequence, GROUP, seed=4)
        sequence.flush()
        sequence.seal()
        assert store.derived_usage()[0].num_segments == 1
        assert store.check() == []

    def test_prefixes_bring_their_segments(self, store, sequence):
        """Restored by tokens: what was derived is there at once."""
        tokens = np.arange(FULL * GROUP)
        append(sequence, len(tokens))
        sequence.append_tokens(tokens)
        sequence.seal()
        sequence.publish()
        restored = store.restore_prefix(store.find_prefix(sequence.model, tokens), "r")
        assert restored.derived_segments("sketch") == sequence.derived_segments("sketch")

    def test_policy(self, store, sequence, path):
        """Persistent, of each model; in the background what a policy wants is made without being asked for."""
        model = sequence.model
        assert store.sealing(model) == ()
        assert store.add_model("other", **_shape(model), seal=("channel_major_keys", "sketch")).name == "other"
        assert store.sealing(store.model("other")) == ("channel_major_keys", "sketch")
        append(sequence, 5 * GROUP)
        store.set_sealing(model, ["sketch"])
        assert store.add_model("small", **_shape(model)) is model and store.sealing(model) == ("sketch",)
        _wait(lambda: spans(sequence) == [(0, 4)])
        append(sequence, (FULL - 5) * GROUP, seed=1)
        _wait(lambda: spans(sequence) == [(0, FULL)])
        check_fast(store, sequence)
        for wrong in (["sketchy"], [1], "compact"):
            with pytest.raises(InvalidArgument):
                store.set_sealing(model, wrong)
        store.close()
        with pytest.raises(kvfs.errors.StoreClosed):
            sequence.derived_segments("sketch")

    def test_resumes_after_opening(self, path, monkeypatch):
        """What was not sealed when a drive was closed is, once it is open again."""
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.create_sequence(small_model(store), "s")
            append(sequence, 9 * GROUP)
            store._sealer.close()
            store.set_sealing(sequence.model, ["sketch"])
        with kvfs.open(path, **OPTIONS) as store:
            _wait(lambda: spans(store.sequence("s")) == [(0, 8)])
            check_fast(store, store.sequence("s"))

    def test_full_drive_gives_way(self, store, sequence):
        """Sealing takes no room that is not there, and what it has taken is given up before anything is
        refused."""
        append(sequence, 2 * FULL * GROUP)
        sequence.seal()
        model, block_bytes = sequence.model, store._namespace.block_bytes
        other = store.create_sequence(model, "other")
        free = store.counters()["space"]["free_bytes"]
        groups = free // (model.layout.group_lbas * block_bytes)
        append(other, groups * GROUP, seed=2)
        assert store.counters()["sealing"]["made_room"] == 0
        assert other.seal() < groups * GROUP
        assert store.counters()["sealing"]["gave_way"] > 0
        append(other, GROUP, seed=3)  # which there is no room for without giving up
        assert store.counters()["sealing"]["made_room"] > 0
        assert spans(sequence) == []
        with pytest.raises(OutOfSpace):
            append(other, 1000 * GROUP, seed=4)
        assert store.check() == []

    def test_objects_are_evicted_later(self, store, sequence):
        """What can be made again goes before what cannot."""
        append(sequence, 2 * FULL * GROUP)
        sequence.seal()
        store.flush()
        cache = store.object_cache("c")
        num_bytes = store._namespace.block_bytes * 8
        data = np.zeros(num_bytes, np.uint8)
        count = store.counters()["space"]["free_bytes"] // num_bytes + 1
        keys = [b"%d" % number for number in range(count)]
        assert all(cache.put([key], [data])[0] for key in keys)
        assert cache.contains(keys) == [True] * count
        assert store.counters()["sealing"]["made_room"] > 0 and spans(sequence) == []
        assert store.check() == []

    def test_in_the_background_some_room_is_left(self, store, sequence):
        """A sixteenth of the drive is nothing that sealing takes by itself."""
        append(sequence, 2 * FULL * GROUP)
        sequence._wait_for_spills()
        free = store._allocator.free_lbas
        taken = store._allocator.allocate(free - store._num_data_lbas // 16)
        assert store._sealing.seal_next(sequence, DERIVES["sketch"], False) is Outcome.NO_ROOM
        assert sequence.seal() == 2 * FULL * GROUP
        store._allocator.give_back(taken, free - store._num_data_lbas // 16)

    def test_drop(self, store, sequence):
        """By model and layout; tokens stay."""
        append(sequence, 4 * GROUP)
        for name in DERIVES:
            sequence.seal(name)
        store.flush()
        append(sequence, 4 * GROUP, seed=1)
        for name in DERIVES:
            sequence.seal(name)
        with store._catalogue.transaction():  # which might be taken back
            assert not store._sealing.make_room(1)
        assert store.drop_derived(derive="sketch") == 2 and spans(sequence) == []
        with pytest.raises(NoSuchModel):
            store.drop_derived("nobody")
        assert store.drop_derived("small") == 2 and store.derived_usage() == []
        assert sequence.num_tokens == 8 * GROUP and store.check() == []

    def test_overtaken(self, store, sequence, monkeypatch):
        """Groups that are given up while they are sealed: what was made of them is thrown away."""
        append(sequence, 4 * GROUP)
        seal = store._namespace.seal_groups
        for change in (
            lambda: sequence.truncate(GROUP),
            lambda: store.delete_sequence("s"),
        ):

            def seal_and_change(payload, change=change):
                seal(payload)
                change()
                monkeypatch.setattr(store._namespace, "seal_groups", seal)

            sequence._wait_for_spills()
            monkeypatch.setattr(store._namespace, "seal_groups", seal_and_change)
            assert store._sealing.seal_next(sequence, DERIVES["sketch"], True) is Outcome.OVERTAKEN
            if not sequence.is_deleted:
                append(sequence, 3 * GROUP, seed=5)
        assert store.counters()["sealing"]["overtaken"] == 2
        assert store.check() == [] and store.derived_usage() == []

    def test_used_meanwhile(self, store, sequence):
        """Appends, attention, truncations and forks beside the thread that seals: all are right."""
        model = sequence.model
        store.set_sealing(model, DERIVES)
        sealing = threading.Thread(target=lambda: [sequence.seal(name) for _ in range(10) for name in DERIVES])
        sealing.start()
        random = np.random.default_rng(0)
        for turn in range(30):
            append(sequence, int(random.integers(1, 3 * GROUP)), seed=turn)
            store.attend(1, random_queries(num_heads=1, head_dim=model.head_dim), sequence)
            if turn % 7 == 3:
                sequence.truncate(int(random.integers(0, sequence.num_tokens)))
            if turn % 9 == 4:
                check_fast(store, sequence.fork(f"f{turn}"))
            if turn % 10 == 9:
                sequence.flush()
        sealing.join()
        sequence.seal()
        check_fast(store, *store.sequences())
        assert store.check() == []

    def test_property(self, store):
        """Random use against a model of what may be sealed: each list is in order, complete, and of its
        tokens."""
        random, model = np.random.default_rng(5), small_model(store)
        lengths: dict[str, int] = {}
        for turn in range(150):
            name = f"s{random.integers(4)}"
            if name not in lengths:
                store.create_sequence(model, name)
                lengths[name] = 0
            sequence, kind = store.sequence(name), random.integers(7)
            if kind <= 1:
                count = int(random.integers(1, 6 * GROUP))
                append(sequence, count, seed=turn)
                lengths[name] += count
            elif kind == 2:
                lengths[name] = int(random.integers(0, lengths[name] + 1))
                sequence.truncate(lengths[name])
            elif kind == 3 and random.random() < 0.5:
                store.delete_sequence(name)
                del lengths[name]
                continue
            elif kind == 4 and "fork" not in lengths:
                sequence.fork("fork")
                lengths["fork"] = lengths[name]
            elif kind == 5:
                sequence.flush()
            at_once = bool(random.integers(2))
            if kind == 6 and at_once:
                whole = lengths[name] // GROUP * GROUP
                assert sequence.seal() == whole
                expected = [
                    (first, min(FULL, whole // GROUP - first)) for first in range(0, whole // GROUP, FULL)
                ]
                assert spans(sequence) == expected
            elif kind == 6:
                store._sealing.seal_next(sequence, DERIVES["sketch"], False)
            for found, length in lengths.items():
                ends = [first + count for first, count in spans(store.sequence(found))]
                assert max(ends, default=0) * GROUP <= length
        check_fast(store, *store.sequences())
        assert store.check() == []

    def test_damage(self, path):
        """Damaged derived data cost no token: they are found, dropped, and made again."""
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.create_sequence(small_model(store), "s")
            append(sequence, (FULL + 2) * GROUP)
            sequence.seal()
        flip(path, lambda store: [store.sequence("s").derived_segments("sketch")[1].base_lba + 2])
        with kvfs.open(path, **OPTIONS) as store:
            assert any("sketch" in line and "lost" in line for line in store.check())
            sequence = store.sequence("s")
            assert sequence.num_tokens == (FULL + 2) * GROUP
            assert sequence.reseal() == 1 and sequence.reseal("sketch") == 0
            check_fast(store, sequence)
            assert spans(sequence) == [(0, FULL), (FULL, 2)]
            assert store.counters()["sealing"]["damaged"] == 1
            store.flush()
            assert store.check() == []

    def test_the_sealer_is_told_of_damage(self, path):
        """In the background, too: verified, dropped, made anew."""
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.create_sequence(small_model(store), "s")
            append(sequence, FULL * GROUP)
            store.set_sealing(sequence.model, ["sketch"])
            _wait(lambda: spans(sequence) == [(0, FULL)])
        flip(path, lambda store: [store.sequence("s").derived_segments("sketch")[0].base_lba])
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.sequence("s")
            store._sealer.notice(sequence, verify=True)
            _wait(lambda: store.counters()["sealing"]["damaged"] == 1 and spans(sequence) == [(0, FULL)])
            check_fast(store, sequence)

    def test_repair(self, path):
        """Segments that lead nowhere, or are cut into, or damaged, are dropped; tokens up to there stay."""
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.create_sequence(small_model(store), "s")
            append(sequence, 3 * FULL * GROUP)
            sequence.seal()
            bases = [one.base_lba for one in sequence.derived_segments("sketch")]
            cut = sequence._groups[2 * FULL - 1].base_lba  # first page of the last group of the second
        flip(path, lambda store: [bases[0], cut])
        sql(path, f"UPDATE derived_segment SET num_lbas = num_lbas - 1 WHERE base_lba = {bases[2]}")
        with Inspection(path, read_only=False) as inspection:
            report = inspection.check()
            kinds = {problem.kind for problem in report.problems}
            assert {"lost", "derived"} <= kinds
            assert any("dropped" in line for line in repair(inspection, report))
        with Inspection(path) as inspection:
            assert not inspection.check().problems
        with kvfs.open(path, **OPTIONS) as store:
            sequence = store.sequence("s")
            assert sequence.num_tokens == (2 * FULL - 1) * GROUP
            assert spans(sequence) == []
            append(sequence, 3 * GROUP, seed=9)
            assert sequence.seal() == (2 * FULL + 2) * GROUP
            check_fast(store, sequence)

    def test_owners(self, store, sequence):
        """Whose a block is, in words."""
        from kvfs.block_owners import BlockOwners

        append(sequence, FULL * GROUP)
        sequence.seal()
        store.flush()
        [segment] = sequence.derived_segments("sketch")
        owners = BlockOwners(store._volume, store._catalogue, store._namespace.block_bytes)
        first = owners.owner(segment.base_lba).as_dict()
        assert (first["area"], first["sequences"], first["layer"]) == ("derived", ("s",), 0)
        assert (first["token_start"], first["token_stop"]) == (0, FULL * GROUP)
        assert "index page of KV head 0" in first["text"]
        last = owners.owner(segment.base_lba + store._sealing.num_lbas(sequence, segment) - 1)
        assert "refinement page" in last.text and last.layer == LAYERS - 1

    def test_an_older_catalogue_opens(self, path):
        """A drive of before there was sealing is brought up to date, alone and in a set's hands."""
        from kvfs.sealing.derived_catalogue import DERIVED_TABLES, DERIVED_TRIGGERS

        with kvfs.open(path, **OPTIONS) as store:
            append(store.create_sequence(small_model(store), "s"), 2 * GROUP)
        drops = [f"DROP TRIGGER {name}" for name in DERIVED_TRIGGERS]
        drops += [f"DROP TABLE {name}" for name in DERIVED_TABLES]
        sql(path, *drops, "PRAGMA user_version = 4")
        with kvfs.open(path, **OPTIONS) as store:
            assert store.sequence("s").seal() == 2 * GROUP
            assert store.check() == []


def test_not_finite_stays_dense(store, sequence):
    """Infinity in one layer: that segment is refused, said once, and the others are made."""
    append(sequence, FULL * GROUP)
    bad = rows(GROUP)
    bad[3, 0, 5] = np.inf
    for layer in range(LAYERS):
        sequence.append(layer, rows(GROUP), bad if layer == 1 else rows(GROUP))
    append(sequence, (FULL - 1) * GROUP, seed=2)
    append(sequence, GROUP, seed=3)
    assert sequence.seal() == (FULL + 1) * GROUP
    assert spans(sequence) == [(0, FULL), (2 * FULL, 1)]
    assert sequence.seal() == (FULL + 1) * GROUP
    assert store.counters()["sealing"]["refused"] == 1
    check_true(store, sequence)
    sequence.truncate(FULL * GROUP)  # other tokens may come in their place
    append(sequence, FULL * GROUP, seed=4)
    assert sequence.seal() == 2 * FULL * GROUP
    assert store.check() == []


def test_a_drive_that_does_not_know_it(store, sequence, monkeypatch, caplog):
    """An older drive elsewhere: who asks is told, the background stops, nothing is lost."""

    def refuse(payload):
        from spdk_glue.command import IoOpcode
        from spdk_glue.status import Status

        raise NvmeStatusError(IoOpcode.SEAL_GROUPS, Status.INVALID_DESCRIPTOR, detail="derive")

    monkeypatch.setattr(store._namespace, "seal_groups", refuse)
    append(sequence, 4 * GROUP)
    with pytest.raises(NvmeStatusError):
        sequence.seal()
    store.set_sealing(sequence.model, ["sketch"])
    _wait(lambda: not store._sealer._thread.is_alive())
    assert store.check() == [] and spans(sequence) == []


def test_rest_while_others_work(store, sequence, monkeypatch):
    """Between two commands the thread waits for a multiple of the first, but only while the store is used."""
    waits = []
    sealer = background.BackgroundSealer(store, store._sealing)
    monkeypatch.setattr(sealer._stop, "wait", waits.append)
    clock = iter([10.0, 10.1, 10.1, 99.0, 99.0, 99.1])
    monkeypatch.setattr(background.time, "monotonic", lambda: next(clock))
    store._last_use = 10.0
    for _ in range(3):
        sealer._before_command()
    for _ in range(2):  # after the last of a segment, once
        sealer._rest()
    assert waits == [pytest.approx(0.1 * background.REST)]


def test_a_full_drive_is_left_alone(store, monkeypatch):
    """Tried again after ever longer times, and soon after something was given up."""
    sealer = background.BackgroundSealer(store, store._sealing)
    now, waits, free = [0.0], [], [10]

    def wait(seconds):
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(sealer._stop, "wait", wait)
    monkeypatch.setattr(sealer, "_free_lbas", lambda: free[0])
    monkeypatch.setattr(background.time, "monotonic", lambda: now[0])
    lengths = []
    for _ in range(9):
        waits.clear()
        sealer._wait_for_room()
        lengths.append(sum(waits))
    assert lengths == [5, 10, 20, 40, 80, 160, 320, 320, 320]

    def gives_up_after_two(seconds):
        wait(seconds)
        free[0] += len(waits) == 2

    monkeypatch.setattr(sealer._stop, "wait", gives_up_after_two)
    waits.clear()
    sealer._wait_for_room()
    assert sum(waits) == 10 and sealer._pause == background.FULL_SECONDS


def test_space_of_derived_data_is_told_apart(store, sequence):
    """Who looks how full a drive is sees what could be given up at any time."""
    append(sequence, FULL * GROUP)
    assert store.counters()["space"]["derived_bytes"] == 0
    sequence.seal()
    [usage] = store.derived_usage()
    assert store.counters()["space"]["derived_bytes"] == usage.num_bytes > 0
    store.drop_derived()
    assert store.counters()["space"]["derived_bytes"] == 0


def _shape(model):
    return {**vars(model.geometry)}


def _wait(condition, seconds=30):
    deadline = threading.Event()
    for _ in range(seconds * 50):
        if condition():
            return
        deadline.wait(0.02)
    raise AssertionError("it does not come about")
