"""Caps of a set of drives: of all drives together, of whole sequences, whatever drives come and go."""

import numpy as np
import pytest

import kvfs
from kvfs.drive_set import drives, moving
from kvfs.errors import NoSuchQuota, NoSuchSequence, QuotaExceeded
from kvfs.kv_tree.transfer import export_sequence, import_sequence
from spdk_glue.status import ConnectionLost

from ..conftest import add_model, random_kv

NUM_HEADS, GROUP = 4, 64
GROUP_BYTES = 128 << 10  # of all heads, on all drives together
TENANT, PINNED = "user.kvfs.tenant", "user.kvfs.pinned"
OPTIONS = {"cache_bytes": "24MiB", "num_workers": 1}


@pytest.fixture
def locations(tmp_path):
    return format_set(tmp_path, "ab")


@pytest.fixture
def drive_set(locations):
    with kvfs.open(locations, **OPTIONS) as drive_set:
        yield drive_set


def format_set(tmp_path, names):
    locations = [str(tmp_path / f"{name}.kvfs") for name in names]
    kvfs.format(locations, "48MiB")
    return locations


def model_of(store, num_heads=NUM_HEADS, name="m"):
    shape = {"num_kv_heads": num_heads, "num_query_heads": 2 * num_heads, "group_tokens": GROUP}
    return add_model(store, name=name, **shape)


def fill(sequence, num_tokens):
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, *random_kv(num_tokens, num_kv_heads=sequence.model.num_kv_heads))
    return sequence


def make(store, model, name, num_groups=1, tenant=None):
    return fill(store.create_sequence(model, name, {TENANT: tenant} if tenant else {}), num_groups * GROUP)


def names(store):
    return [row.name for row in store.catalogue_rows()]


def flash_bytes(drive_set, tenant=None):
    """What sequences hold of the flash of all drives, each block once; by no counter of the product."""
    of_tenant = {
        f"{record.uid:016x}"
        for name, record in drive_set._placed.items()
        if tenant is None or drive_set.sequence(name).attributes().get(TENANT, b"") == tenant
    }
    blocks = 0
    for member in drive_set._live:
        extents, store = set(), member.store
        for row in store._catalogue.sequences():
            if row.name.partition("-")[0] in of_tenant:
                sequence = store._sequences.get(row.name)
                groups = sequence._groups if sequence else store._catalogue.groups(row.id)
                extents |= {(group.base_lba, group.num_lbas) for group in groups}
                extents |= {(row.tail_lba, row.tail_lbas)}
        blocks += sum(count for _, count in extents)
    return blocks * 4096


def lose(drive_set, index):
    member = [*drive_set._members.values()][index]
    member.lose(ConnectionLost("unplugged"))
    return member.location


def test_whole_sequences_go(drive_set):
    """A drive that evicts for itself would leave halves of sequences."""
    model = model_of(drive_set)
    drive_set.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    for name in "abc":
        make(drive_set, model, name)
    drive_set.sequence("a").read(0)
    make(drive_set, model, "d")
    assert names(drive_set) == ["a", "c", "d"]
    (usage,) = drive_set.quotas()
    assert usage.used_bytes == 3 * GROUP_BYTES == flash_bytes(drive_set)
    for member in drive_set._live:
        assert len(list(member.store.catalogue_rows())) == 3
    assert drive_set.counters()["eviction"]["evictions"] == 1
    drive_set.sequence("d").set_attribute(PINNED, b"1")
    with pytest.raises(QuotaExceeded, match="cap of model 'm'"):
        fill(drive_set.sequence("c"), 3 * GROUP)
    assert names(drive_set) == ["a", "c", "d"]


def test_few_heads_are_counted_wherever_they_are(drive_set):
    """Sequences of a batch, each on one drive: the cap is of all, not of each."""
    model = model_of(drive_set, num_heads=1)
    drive_set.set_quota("m", capacity_bytes=3 * GROUP_BYTES // NUM_HEADS)
    for number in range(8):
        make(drive_set, model, f"s{number}")
    assert names(drive_set) == ["s5", "s6", "s7"]
    assert flash_bytes(drive_set) == 3 * GROUP_BYTES // NUM_HEADS


def test_forks_prefixes_imports_and_moves_are_charged(drive_set, tmp_path):
    """Ways to take space beside append."""
    model = model_of(drive_set)
    drive_set.set_quota("m", "t", capacity_bytes=2 * GROUP_BYTES)
    parent = make(drive_set, model, "a", 2, b"t")
    parent.append_tokens(np.arange(2 * GROUP))
    parent.publish()
    with pytest.raises(QuotaExceeded):
        parent.fork("b")
    with pytest.raises(QuotaExceeded):
        drive_set.restore_prefix(drive_set.find_prefix(model, np.arange(2 * GROUP), "t"), "b")
    other = make(drive_set, model, "c")
    parent.set_attribute(PINNED, b"1")
    with pytest.raises(QuotaExceeded):
        other.set_attribute(TENANT, b"t")
    parent.truncate(GROUP)
    parent.flush()
    other.set_attribute(TENANT, b"t")
    assert drive_set.quotas()[0].used_bytes == 2 * GROUP_BYTES
    with open(tmp_path / "a.safetensors", "wb") as file:
        export_sequence(parent, file)
    other.set_attribute(PINNED, b"1")
    with pytest.raises(QuotaExceeded), open(tmp_path / "a.safetensors", "rb") as file:
        import_sequence(drive_set, model, "e", file, {TENANT: b"t"})
    assert names(drive_set) == ["a", "c"]


def test_a_source_is_not_evicted_for_what_it_gives(drive_set):
    """A restored prefix of groups that were just deleted."""
    model = model_of(drive_set)
    source = make(drive_set, model, "a", 2)
    source.append_tokens(np.arange(2 * GROUP))
    source.publish()
    make(drive_set, model, "b")
    drive_set.set_quota("m", capacity_bytes=4 * GROUP_BYTES)
    drive_set.restore_prefix(drive_set.find_prefix(model, np.arange(2 * GROUP)), "c")
    assert names(drive_set) == ["a", "c"]
    assert drive_set.sequence("c").num_tokens == 2 * GROUP


def test_caps_and_order_of_use_survive_a_restart(locations):
    """Without them a set that is opened again knows no cap, or evicts what is used most."""
    with kvfs.open(locations, **OPTIONS) as drive_set:
        model = model_of(drive_set)
        drive_set.set_quota("m", capacity_bytes=3 * GROUP_BYTES, low_percent=67, policy="clock")
        for name in "abc":
            make(drive_set, model, name)
        drive_set.sequence("a").read(0)
    with kvfs.open(locations, **OPTIONS) as drive_set:
        (usage,) = drive_set.quotas()
        assert (usage.used_bytes, usage.low_percent, usage.policy) == (3 * GROUP_BYTES, 67, "clock")
        drive_set._space._charges[drive_set._placed["a"].uid].num_uses = 0
        make(drive_set, drive_set.model("m"), "d")
        assert names(drive_set) == ["a", "d"]
        drive_set.remove_quota("m")
        with pytest.raises(NoSuchQuota):
            drive_set.remove_quota("m")


def test_a_drive_alone_enforces_no_cap_of_its_own(locations, tmp_path):
    """A cap that a drive had before it joined would evict parts."""
    added = str(tmp_path / "c.kvfs")
    kvfs.format(added, "48MiB")
    with kvfs.open(added, num_workers=1) as store:
        store.set_quota(capacity_bytes=4096)
    with kvfs.open(locations, **OPTIONS) as drive_set:
        drive_set.drives.add(added)
        make(drive_set, model_of(drive_set), "a", 3)
        assert drive_set.quotas() == []
        assert drive_set.sequence("a").num_tokens == 3 * GROUP


@pytest.mark.parametrize("index", [0, 1])
def test_a_drive_is_lost_and_returns(drive_set, index):
    """What it holds stays charged, is not evicted half, and no cap is exceeded when it is back."""
    model, single = model_of(drive_set), model_of(drive_set, num_heads=1, name="single")
    for name in "ab":
        make(drive_set, model, name, tenant=b"t")
    for name in ("x", "y"):  # one on each drive
        make(drive_set, single, name, tenant=b"t")
    drive_set.flush()
    drive_set.set_quota(tenant="t", capacity_bytes=3 * GROUP_BYTES)
    used = drive_set.quotas()[0].used_bytes
    location = lose(drive_set, index)
    assert drive_set.quotas()[0].used_bytes == used
    # of what is there only the single one on the other drive can go: the others have parts on the lost one
    there = next(name for name in "xy" if drive_set._member(drive_set._placed[name].parts[0]).lost is None)
    drive_set.flush()
    make(drive_set, single, "z1", 3, b"t").set_attribute(PINNED, b"1")
    with pytest.raises(QuotaExceeded):
        make(drive_set, single, "z2", 1, b"t")
    assert there not in names(drive_set)
    drive_set.drives.bring_back(location)
    assert {"a", "b"} <= set(names(drive_set))
    assert drive_set.quotas()[0].used_bytes == flash_bytes(drive_set, b"t") <= 3 * GROUP_BYTES


def test_what_a_returning_drive_has_too_much_goes(locations, tmp_path):
    """Sequences that a degraded set knew nothing of: with them the cap would be exceeded."""
    with kvfs.open(locations, **OPTIONS) as drive_set:
        single = model_of(drive_set, num_heads=1, name="single")
        for number in range(6):
            make(drive_set, single, f"old{number}", 4)
        drive_set.set_quota(capacity_bytes=6 * GROUP_BYTES)
    (tmp_path / "b.kvfs").rename(tmp_path / "away.kvfs")
    with kvfs.open(locations, **OPTIONS, degraded=True) as drive_set:
        assert drive_set.quotas()[0].used_bytes == 3 * GROUP_BYTES
        single = drive_set.model("single")
        for number in range(3):
            make(drive_set, single, f"new{number}", 4)
        assert drive_set.quotas()[0].used_bytes == flash_bytes(drive_set) == 6 * GROUP_BYTES
        (tmp_path / "away.kvfs").rename(tmp_path / "b.kvfs")
        drive_set.drives.bring_back(locations[1])
        assert drive_set.quotas()[0].used_bytes == flash_bytes(drive_set) == 6 * GROUP_BYTES
        assert {f"new{number}" for number in range(3)} <= set(names(drive_set))


def test_a_copy_on_its_way_is_charged(drive_set, tmp_path):
    """While a part moves it is on flash twice."""
    model = model_of(drive_set)
    for name in "abc":
        make(drive_set, model, name, 2)
    drive_set.set_quota("m", capacity_bytes=6 * GROUP_BYTES)
    added = str(tmp_path / "c.kvfs")
    kvfs.format(added, "48MiB")
    drive_set.drives.add(added)
    leaving = [*drive_set._members.values()][1].location
    while not drive_set.drives.drain_step(leaving).is_done:
        assert flash_bytes(drive_set) <= 6 * GROUP_BYTES
    assert names(drive_set) == ["a", "c"]  # "b", the oldest but for what moves, went for the first copy
    assert drive_set.quotas()[0].used_bytes == flash_bytes(drive_set) == 4 * GROUP_BYTES


def test_what_grows_while_it_moves(drive_set, tmp_path, monkeypatch):
    """Half a copy is on flash beside the parts: what is appended meanwhile has no room there."""
    monkeypatch.setattr(moving, "STEP_BYTES", 1)
    monkeypatch.setattr(drives, "STEP_SECONDS", -1)  # a step of a drain is one copy
    sequence = make(drive_set, model_of(drive_set), "a", 4)
    added = str(tmp_path / "c.kvfs")
    kvfs.format(added, "48MiB")
    drive_set.drives.add(added)
    leaving = [*drive_set._members.values()][1].location
    for _ in range(2):
        drive_set.drives.drain_step(leaving)
    assert sequence._move.copy.num_tokens == 2 * GROUP
    capacity = flash_bytes(drive_set)
    drive_set.set_quota("m", capacity_bytes=capacity)
    assert drive_set.quotas()[0].used_bytes == capacity == 5 * GROUP_BYTES
    with pytest.raises(QuotaExceeded):
        fill(sequence, GROUP)
    assert flash_bytes(drive_set) == capacity and sequence.num_tokens == 4 * GROUP


OPERATIONS = ["new", "append", "fork"] * 5 + ["truncate", "flush", "delete", "move", "pin", "rename", "reopen"]


@pytest.mark.parametrize("seed", range(4))
def test_caps_hold_after_every_operation(locations, seed):
    """Any mix of operations, ten times the cap and more: never above any cap, counted by the blocks."""
    random = np.random.default_rng(seed)
    caps = {b"t": 5 * GROUP_BYTES + 8192, None: 12 * GROUP_BYTES}
    policy = ("lru", "clock")[seed % 2]
    drive_set = kvfs.open(locations, **OPTIONS)
    models = [model_of(drive_set), model_of(drive_set, 1, "single"), model_of(drive_set, 3, "uneven")]
    drive_set.set_quota(capacity_bytes=caps[None], policy=policy)
    drive_set.set_quota(tenant="t", capacity_bytes=caps[b"t"], low_percent=80, policy=policy)
    for step in range(80):
        there, what = names(drive_set), random.choice(OPERATIONS)
        try:
            if what == "new" or not there:
                model = models[random.integers(len(models))]
                make(drive_set, model, f"n{step}", 0, bytes(random.choice([b"t", b"u"])))
                fill(drive_set.sequence(f"n{step}"), int(random.integers(GROUP, 4 * GROUP)))
            elif what == "flush":
                drive_set.flush()
            elif what == "reopen":
                drive_set.close()
                drive_set = kvfs.open(locations, **OPTIONS)
                models = drive_set.models()
            else:
                sequence = drive_set.sequence(str(random.choice(there)))
                if what == "append":
                    for layer in range(sequence.model.num_layers):
                        sequence.append(layer, *random_kv(37, num_kv_heads=sequence.model.num_kv_heads))
                        if random.random() < 0.2:
                            sequence.flush()
                elif what == "fork":
                    sequence.fork(f"f{step}")
                elif what == "truncate":
                    sequence.truncate(int(random.integers(0, sequence.num_tokens + 1)))
                elif what == "delete":
                    drive_set.delete_sequence(sequence.name)
                elif what == "rename":
                    drive_set.rename_sequence(sequence.name, f"r{step}")
                elif what == "move":
                    sequence.set_attribute(TENANT, bytes(random.choice([b"t", b"u"])))
                elif what == "pin" and random.random() < 0.3:
                    sequence.set_attribute(PINNED, b"1" if random.random() < 0.2 else b"0")
        except QuotaExceeded:
            pass
        except NoSuchSequence:
            assert what == "new"  # evicted by what was appended to make it
        for tenant, cap in caps.items():
            assert flash_bytes(drive_set, tenant) <= cap, what
    drive_set.flush()
    counted = {account: lbas for account, lbas in drive_set._space.accounts.items() if lbas}
    drive_set._space.load()
    assert counted == {account: lbas for account, lbas in drive_set._space.accounts.items() if lbas}
    assert not drive_set.check()
    drive_set.close()
