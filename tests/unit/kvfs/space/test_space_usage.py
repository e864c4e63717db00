"""What df says: two sums that come to all of the flash, whatever was done."""

import tempfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import kvfs
from kvfs.block_owners import NamedExtent
from kvfs.errors import ModelInUse, NoSuchModel, OutOfSpace

from ..conftest import add_model, random_kv

BLOCK = 4096


def append(sequence, num_tokens):
    for layer in range(2):
        keys, values = random_kv(num_tokens, seed=layer)
        sequence.append(layer, keys, values)
    sequence.append_tokens(np.arange(num_tokens, dtype=np.uint32))


def recounted(store):
    """By kind, from every row, once all is in rows."""
    found = dict.fromkeys(("groups", "tails", "derived", "objects", "files"), 0)
    for extent in store._owners().extents:
        kind = {"FileExtent": "files", "ObjectExtent": "objects", "DerivedExtent": "derived"}.get(
            type(extent).__name__
        )
        if isinstance(extent, NamedExtent):
            kind = "tails" if extent.group_id is None else "groups"
        found[kind] += extent.num_lbas * BLOCK
    return found


def assert_sums(usage):
    assert min([*usage.blocks.values(), *usage.pages.values()]) >= 0, usage
    assert sum(usage.blocks.values()) == usage.media_bytes
    assert sum(usage.pages.values()) == usage.media_bytes


class SpaceMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/drive.kvfs"
        kvfs.format(self.path, "48MiB", parity=True)
        self.number = 0
        self.open()

    def open(self):
        self.store = kvfs.open(self.path, cache_bytes="8MiB", num_workers=1)
        self.model = add_model(self.store, group_tokens=64)
        self.cache = self.store.object_cache("engine", identity={"model": "m"}, capacity_bytes=4 << 20)

    def names(self):
        return [row.name for row in self.store.catalogue_rows()]

    def holds(self):
        (usage,) = self.store.space_usage()
        assert_sums(usage)
        assert usage.blocks["files"] == 0  # nobody has any: what is missing elsewhere would be here

    @rule(num_tokens=st.integers(1, 200))
    def create(self, num_tokens):
        self.number += 1
        with suppress(OutOfSpace):
            append(self.store.create_sequence(self.model, f"s{self.number}"), num_tokens)
        self.holds()

    @precondition(lambda self: self.names())
    @rule(data=st.data(), num_tokens=st.integers(0, 100))
    def truncate(self, data, num_tokens):
        sequence = self.store.sequence(data.draw(st.sampled_from(self.names())))
        sequence.truncate(min(num_tokens, sequence.num_tokens))
        self.holds()

    @precondition(lambda self: self.names())
    @rule(data=st.data())
    def fork(self, data):
        self.number += 1
        self.store.sequence(data.draw(st.sampled_from(self.names()))).fork(f"s{self.number}")
        self.holds()

    @precondition(lambda self: self.names())
    @rule(data=st.data())
    def delete(self, data):
        self.store.delete_sequence(data.draw(st.sampled_from(self.names())))
        self.holds()

    @rule(key=st.integers(0, 5), size=st.integers(0, 300_000))
    def put(self, key, size):
        self.cache.put([b"%d" % key], [bytes(size)])
        self.holds()

    @rule(key=st.integers(0, 5))
    def remove(self, key):
        self.cache.delete([b"%d" % key])
        self.holds()

    @rule()
    def flush(self):
        self.store.flush()
        self.holds()
        (usage,) = self.store.space_usage()
        assert recounted(self.store) == {name: usage.blocks[name] for name in recounted(self.store)}
        assert self.store.check() == []

    @rule()
    def reopen(self):
        self.store.close()
        self.open()
        self.holds()

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


TestSpaceMachine = SpaceMachine.TestCase
TestSpaceMachine.settings = settings(max_examples=3, stateful_step_count=20, deadline=None)


def test_a_drive_of_before_gets_its_totals(path):
    """Sums kept from some day on would be wrong for ever by what was there before."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        append(store.create_sequence(model, "a"), 300)
        store.flush()
        expected = store.space_usage()[0].blocks
        with store._catalogue.transaction():
            for number in range(len(store._catalogue.row_totals._triggers)):
                store._catalogue._db.execute(f"DROP TRIGGER row_totals_{number}")
            store._catalogue._db.execute("DROP TABLE row_totals")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert store.space_usage()[0].blocks == expected
        append(store.create_sequence(store.model(model.name), "b"), 300)
        store.flush()
        assert store.sequence_counts() == {model.name: 2}
        assert recounted(store)["groups"] == store.space_usage()[0].blocks["groups"]
        assert store.check() == []


def test_wrong_totals_are_found_and_mended(store, model):
    """df believed for ever what a bug or damage once made of a sum."""
    append(store.create_sequence(model, "a"), 300)
    store.flush()
    with store._catalogue.transaction():
        store._catalogue._db.execute("UPDATE row_totals SET num_rows = num_rows + 1 WHERE kind = 'group'")
    assert store.check() == ["the totals of all groups are not what their rows say"]
    store._catalogue.mend_references()
    assert store.check() == []


def test_models_with_sequences_stay(store, model):
    """Sequences whose model is gone cannot be opened."""
    sequence = store.create_sequence(model, "a")
    with pytest.raises(ModelInUse, match="has 1 sequences"):
        store.delete_model(model.name)
    sequence.publish("tenant")
    store.set_quota(model.name, capacity_bytes=1 << 20)
    store.delete_sequence("a")
    store.delete_model(model.name)
    assert (store.models(), store.quotas()) == ([], [])
    with pytest.raises(NoSuchModel):
        store.delete_model(model.name)
    append(store.create_sequence(add_model(store), "a"), 10)
    store.flush()
    assert store.check() == []


def test_pages_of_one_model(store, model):
    """A page that leaves one out, or shows one twice, hides a sequence from who goes through them."""
    other = add_model(store, name="other")
    for number in range(10):
        store.create_sequence(model if number % 2 else other, f"s{number}")
    assert [row.name for row in store.sequence_rows(limit=3, model="other")] == ["s0", "s2", "s4"]
    assert [row.name for row in store.sequence_rows("s4", model="other")] == ["s6", "s8"]
    with pytest.raises(NoSuchModel):
        store.sequence_rows(model="no")
