"""Caps of models and tenants through the store's API, on a real embedded drive."""

import errno

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, NoSuchQuota, NoSuchSequence, QuotaExceeded, errno_of

from ..conftest import add_model, random_kv

GROUP = 64  # tokens; of this model 64 KiB
GROUP_BYTES = 64 << 10
TENANT = "user.kvfs.tenant"


@pytest.fixture
def model(store):
    return add_model(store, name="m", group_tokens=GROUP)


def fill(sequence, num_tokens):
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, *random_kv(num_tokens))
    return sequence


def make(store, model, name, num_groups=1, tenant=None):
    return fill(store.create_sequence(model, name, {TENANT: tenant} if tenant else {}), num_groups * GROUP)


def names(store):
    return [row.name for row in store.catalogue_rows()]


def flash_bytes(store, model, tenant=None):
    """What sequences hold of the flash, each block once; None: of all tenants. By no counter of the product."""
    extents = set()
    for row in store.catalogue_rows():
        if row.model_id != model.id:
            continue
        if tenant is not None and store._catalogue.attributes(row.id).get(TENANT, b"") != tenant:
            continue
        sequence = store._sequences.get(row.name)
        groups = sequence._groups if sequence else store._catalogue.groups(row.id)
        extents |= {(group.base_lba, group.num_lbas) for group in groups}
        extents |= {(row.tail_lba, row.tail_lbas)}
    return sum(count for _, count in extents) * 4096


def test_a_cap_evicts_what_was_used_longest_ago(store, model):
    """Order: a session in use, lost for one that nobody asks for."""
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    for name in "abc":
        make(store, model, name)
    store.sequence("a").read(0)
    make(store, model, "d")
    assert names(store) == ["a", "c", "d"]
    assert store.quotas()[0].used_bytes == 3 * GROUP_BYTES


def test_a_cap_is_no_block_more(store, model):
    """A cap that is not a whole number of groups."""
    store.set_quota("m", capacity_bytes=2 * GROUP_BYTES - 4096)
    for name in "ab":
        make(store, model, name)
    assert names(store) == ["b"]


def test_what_was_cut_off_counts_until_that_is_stored(store, model):
    """A power cut brings it back: with the first cap there must be room for it."""
    sequence = make(store, model, "a", 3)
    store.flush()
    sequence.truncate(GROUP)
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    assert store.quotas()[0].used_bytes == 3 * GROUP_BYTES
    store.flush()
    assert store.quotas()[0].used_bytes == GROUP_BYTES


def test_what_is_pinned_stays_and_the_cap_holds(store, model):
    """Either the promise of a pin, or the cap."""
    store.set_quota("m", capacity_bytes=2 * GROUP_BYTES)
    for name in "ab":
        make(store, model, name).set_attribute("user.kvfs.pinned", b"1")
    with pytest.raises(QuotaExceeded, match=r"cap of model 'm' is 131072 bytes, but with 65536 more") as caught:
        make(store, model, "c")
    assert errno_of(caught.value) == errno.EDQUOT
    assert names(store) == ["a", "b", "c"]
    assert store.sequence("c").num_tokens == 0
    store.sequence("a").set_attribute("user.kvfs.pinned", b"0")
    fill(store.sequence("c"), GROUP)
    assert names(store) == ["b", "c"]


def test_nothing_is_evicted_for_what_cannot_fit(store, model):
    """A request too large for the cap would otherwise empty the cache for nothing."""
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    for name in "abc":
        make(store, model, name)
    with pytest.raises(QuotaExceeded):
        make(store, model, "d", 4)
    assert names(store) == ["a", "b", "c", "d"]


def test_tenants_do_not_evict_each_other(store, model):
    """Isolation: one tenant's load is another's misses."""
    store.set_quota("m", "t", capacity_bytes=2 * GROUP_BYTES)
    make(store, model, "other", 2, b"u")
    for name in "abc":
        make(store, model, name, tenant=b"t")
    assert names(store) == ["b", "c", "other"]


def test_caps_hold_after_a_kill(path):
    """A crash is no way around a cap: neither caps nor what they count are lost."""
    store = kvfs.open(path, num_workers=2)
    model = add_model(store, name="m", group_tokens=GROUP)
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES, low_percent=67, policy="clock")
    for name in "abc":
        make(store, model, name)
    store.flush()
    store._abandon()
    with kvfs.open(path, num_workers=2) as store:
        (usage,) = store.quotas()
        assert (usage.used_bytes, usage.low_percent, usage.policy) == (3 * GROUP_BYTES, 67, "clock")
        make(store, store.model("m"), "d")
        assert names(store) == ["c", "d"]  # down to two thirds


def test_order_of_use_survives_a_restart(path):
    """Without it the first eviction after a restart takes what is used most."""
    with kvfs.open(path, num_workers=2) as store:
        model = add_model(store, name="m", group_tokens=GROUP)
        store.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
        for name in "abc":
            make(store, model, name)
        store.sequence("a").read(0)
    with kvfs.open(path, num_workers=2) as store:
        make(store, store.model("m"), "d")
        assert names(store) == ["a", "c", "d"]


def test_a_cap_set_on_a_full_drive_counts_what_is_there(store, model):
    """Drives of users are full before they read of caps."""
    for name in "abcd":
        make(store, model, name, tenant=b"t")
    store.flush()
    store.set_quota(tenant="t", capacity_bytes=2 * GROUP_BYTES)
    assert names(store) == ["c", "d"]
    store.remove_quota(tenant="t")
    assert not store.quotas()
    with pytest.raises(NoSuchQuota):
        store.remove_quota(tenant="t")


def test_time_to_live(store, model):
    """What nobody wants any more fills the drive."""
    store.set_quota(capacity_bytes=8 * GROUP_BYTES)
    for name, seconds in (("short", b"10"), ("long", b"10000"), ("for ever", None)):
        sequence = make(store, model, name)
        if seconds:
            sequence.set_attribute("user.kvfs.ttl", seconds)
    store.flush()
    now = store._space.clock()
    store._space.clock = lambda: now + 11_000_000_000
    assert [each.name for each in store.evict(dry_run=True)] == ["short"]
    assert [each.name for each in store.evict()] == ["short"]
    assert names(store) == ["for ever", "long"]


def test_clock_spares_what_was_looked_for_again(store, model):
    """A scan of new prompts empties an LRU cache; it must not empty this one."""
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES, policy="clock")
    make(store, model, "wanted")
    store.sequence("wanted")
    for number in range(4):
        make(store, model, f"scan {number}")
    assert names(store) == ["scan 2", "scan 3", "wanted"]


def test_forks_and_moves_to_another_tenant_are_charged(store, model):
    """Ways to take space beside append."""
    store.set_quota("m", "t", capacity_bytes=2 * GROUP_BYTES)
    parent = make(store, model, "a", 2, b"t")
    with pytest.raises(QuotaExceeded):
        parent.fork("b")
    assert names(store) == ["a"]
    other = make(store, model, "c", 1)
    parent.set_attribute("user.kvfs.pinned", b"1")
    with pytest.raises(QuotaExceeded):
        other.set_attribute(TENANT, b"t")
    assert TENANT not in other.attributes()
    parent.truncate(GROUP)
    parent.flush()
    other.set_attribute(TENANT, b"t")
    assert store.quotas()[0].used_bytes == 2 * GROUP_BYTES


def test_restored_prefixes_are_charged(store, model):
    """The commonest way to get a long sequence."""
    store.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    tokens = np.arange(2 * GROUP)
    source = make(store, model, "a", 2)
    source.append_tokens(tokens)
    source.publish()
    match = store.find_prefix(model, tokens)
    with pytest.raises(QuotaExceeded):
        store.restore_prefix(match, "b")
    assert names(store) == ["a"]
    store.set_quota("m", capacity_bytes=4 * GROUP_BYTES)
    assert store.restore_prefix(match, "b").num_tokens == 2 * GROUP
    assert store.quotas()[0].used_bytes == 4 * GROUP_BYTES


@pytest.mark.parametrize(
    "bad",
    [{"capacity_bytes": 0}, {"capacity_bytes": 5, "policy": "x"}, {"capacity_bytes": 5, "low_percent": 0}],
)
def test_bad_caps_are_refused(store, model, bad):
    with pytest.raises(InvalidArgument):
        store.set_quota("m", **bad)
    assert not store.quotas()


def test_pages_of_sequences(store, model):
    """A list of a million is read by the page: none twice, none left out."""
    for number in range(7):
        store.create_sequence(model, f"s{number}")
    found, after = [], ""
    while page := list(store.sequence_rows(after, 3)):
        found += [row.name for row in page]
        after = page[-1].name
    assert found == names(store)


OPERATIONS = ["new", "append", "fork"] * 6 + ["truncate", "flush", "delete", "move", "pin", "kill"]


@pytest.mark.parametrize("policy", ["lru", "clock"])
@pytest.mark.parametrize("seed", range(4))
def test_caps_hold_after_every_operation(path, seed, policy):
    """Any mix of operations, ten times the cap and more, with kills in between: never above any cap, counted by
    the blocks themselves; and what is counted is what the catalogue says."""
    random = np.random.default_rng(seed)
    caps = {(b"t"): 5 * GROUP_BYTES + 8192, None: 12 * GROUP_BYTES}
    store = kvfs.open(path, num_workers=1)
    model = add_model(store, name="m", group_tokens=GROUP)
    store.set_quota("m", capacity_bytes=caps[None], policy=policy)
    store.set_quota("m", "t", capacity_bytes=caps[b"t"], low_percent=80, policy=policy)
    store.flush()
    refused = 0
    for step in range(120):
        there = names(store)
        what = random.choice(OPERATIONS)
        try:
            if what == "new" or not there:
                make(store, model, f"n{step}", 0, bytes(random.choice([b"t", b"u"])))
                fill(store.sequence(f"n{step}"), int(random.integers(GROUP, 4 * GROUP)))
            elif what == "flush":
                store.flush()
            elif what == "kill":
                if random.random() < 0.3:
                    store._abandon()
                    store = kvfs.open(path, num_workers=1)
                    model = store.model("m")
            else:
                sequence = store.sequence(str(random.choice(there)))
                if what == "append":
                    for layer in range(model.num_layers):  # flushed while layers differ, too
                        sequence.append(layer, *random_kv(37))
                        if random.random() < 0.2:
                            sequence.flush()
                        assert flash_bytes(store, model) <= caps[None]
                elif what == "fork":
                    sequence.fork(f"f{step}")
                elif what == "truncate":
                    sequence.truncate(int(random.integers(0, sequence.num_tokens + 1)))
                elif what == "delete":
                    store.delete_sequence(sequence.name)
                elif what == "move":
                    sequence.set_attribute(TENANT, bytes(random.choice([b"t", b"u"])))
                elif what == "pin" and random.random() < 0.3:
                    sequence.set_attribute("user.kvfs.pinned", b"1" if random.random() < 0.2 else b"0")
        except QuotaExceeded:
            refused += 1
        except NoSuchSequence:
            pass  # evicted by what was appended to make it
        for tenant, cap in caps.items():
            assert flash_bytes(store, model, tenant) <= cap, what
    store.flush()
    counted = dict(store._space.accounts)
    store._space.load()
    assert {k: v for k, v in counted.items() if v} == {k: v for k, v in store._space.accounts.items() if v}
    assert not store.check()
    store.close()
