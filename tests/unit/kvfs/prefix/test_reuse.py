"""Prefix reuse through a store: what is found, what is shared, and what nobody may find."""

import logging

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, NvmeStatusError, SequenceExists, StoreClosed
from kvfs.prefix.match import Miss
from kvfs.sequence_attributes import TENANT

from ..conftest import add_model
from .conftest import GROUP, assert_holds, fill, kv_of, publish


def prefix_counters(store, tenant="", model="model-float16"):
    rows = store.counters()["prefix"]["tenants"]
    return next(row for row in rows if (row["tenant"], row["model"]) == (tenant, model))


def test_longest_prefix(store, model, tokens):
    """A prompt that goes on otherwise takes whole groups up to there, not one more."""
    assert publish(store, model, "a", tokens).num_tokens == len(tokens)
    for same in (0, GROUP - 1, GROUP, 3 * GROUP + 5, 5 * GROUP, len(tokens)):
        prompt = np.concatenate([tokens[:same], tokens[same:] ^ 1])
        match = store.find_prefix(model, prompt)
        assert match.num_tokens == same // GROUP * GROUP
        assert np.array_equal(match.token_ids, tokens[: match.num_tokens])
        assert match.miss == (None if match.num_tokens == 5 * GROUP else Miss.UNKNOWN)
    assert store.find_prefix(model, tokens[: 2 * GROUP + 9].tolist()).num_tokens == 2 * GROUP


def test_restored_without_copies(store, model, tokens):
    """What was prefilled once is there again, in the same blocks."""
    publish(store, model, "a", tokens)
    store.flush()
    free = store.counters()["space"]["free_bytes"]
    written = store.counters()["flash"]["host_bytes_written"]
    match = store.find_prefix(model, tokens)
    restored = store.restore_prefix(match, "b")
    assert store.counters()["space"]["free_bytes"] == free
    assert store.counters()["flash"]["host_bytes_written"] == written
    assert_holds(restored, tokens[: 5 * GROUP])
    fill(restored, tokens[5 * GROUP :])
    assert_holds(restored, tokens)
    assert_holds(store.sequence("a"), tokens)
    assert store.check() == []


def test_copy_on_write(store, model, tokens):
    """Who goes on otherwise, or takes back, changes nobody else's tokens."""
    publish(store, model, "a", tokens)
    match = store.find_prefix(model, tokens)
    one, two = (store.restore_prefix(match, name) for name in "bc")
    one.truncate(2 * GROUP + 7)
    other = tokens[: 3 * GROUP] ^ 5
    fill(one, other)
    fill(two, tokens[:9])
    assert_holds(one, np.concatenate([tokens[: 2 * GROUP + 7], other]))
    assert_holds(two, np.concatenate([tokens[: 5 * GROUP], tokens[:9]]))
    assert_holds(store.sequence("a"), tokens)
    assert store.check() == []


@pytest.mark.parametrize("by", ["fork", "restore"])
def test_source_deleted(store, model, tokens, by):
    """Groups that another sequence shares stay, and are still found; with the last one they are gone."""
    source = publish(store, model, "a", tokens)
    if by == "fork":
        other = source.fork("b")
    else:
        other = store.restore_prefix(store.find_prefix(model, tokens), "b")
    store.delete_sequence("a")
    store.flush()
    assert store.find_prefix(model, tokens).num_tokens == 5 * GROUP
    other.truncate(3 * GROUP + 1)
    other.flush()
    assert store.find_prefix(model, tokens).num_tokens == 3 * GROUP
    assert_holds(store.restore_prefix(store.find_prefix(model, tokens), "c"), tokens[: 3 * GROUP])
    store.delete_sequence("c")
    store.delete_sequence("b")
    store.flush()
    match = store.find_prefix(model, tokens)
    assert (match.num_tokens, match.miss) == (0, Miss.UNKNOWN)
    assert store._catalogue._db.execute("SELECT count(*) FROM prefix_entry").get == 0
    assert store.check() == []


def test_source_gone_after_the_look_up(store, model, tokens):
    """A match is no promise: restoring takes what is still there, never another's blocks."""
    publish(store, model, "a", tokens)
    match = store.find_prefix(model, tokens)
    store.delete_sequence("a")
    store.flush()
    fill(store.create_sequence(model, "squatter"), tokens ^ 3)
    restored = store.restore_prefix(match, "b")
    assert restored.num_tokens == 0
    fill(restored, tokens)
    assert_holds(restored, tokens)


def test_across_restarts(path, tokens):
    """What users ask for most: the cache survives the process."""
    with kvfs.open(path) as store:
        publish(store, add_model(store), "a", tokens[: 2 * GROUP], tenant="t", settings={"rope_theta": 1e6})
    with kvfs.open(path) as store:
        model = store.model("model-float16")
        options = {"tenant": "t", "settings": {"rope_theta": 1e6}}
        match = store.find_prefix(model, tokens, **options)
        assert match.num_tokens == 2 * GROUP
        assert_holds(store.restore_prefix(match, "b"), tokens[: 2 * GROUP])
        fill(store.sequence("a"), tokens[2 * GROUP :])  # published still
        store.flush()
        assert store.find_prefix(model, tokens, **options).num_tokens == 5 * GROUP
        assert store.check() == []


def test_published_as_it_grows(store, model, tokens):
    """Groups are found once they are full in all layers, have their token ids, and are stored: no sooner."""
    sequence = store.create_sequence(model, "a")
    assert sequence.publish() == 0
    keys, values = kv_of(tokens)
    sequence.append_tokens(tokens[: 2 * GROUP])
    sequence.append(0, keys, values)
    store.flush()
    match = store.find_prefix(model, tokens)
    assert (match.num_tokens, match.miss) == (0, Miss.NOT_ON_FLASH)
    sequence.append(1, keys, values)
    assert store.find_prefix(model, tokens).num_tokens == 0
    sequence.flush()
    match = store.find_prefix(model, tokens)
    assert (match.num_tokens, match.miss) == (2 * GROUP, Miss.UNKNOWN)  # no ids beyond
    sequence.append_tokens(tokens[2 * GROUP :])
    assert store.find_prefix(model, tokens).miss == Miss.NOT_ON_FLASH
    sequence.flush()
    assert store.find_prefix(model, tokens).num_tokens == 5 * GROUP
    assert sequence.publish() == 5 * GROUP


def test_model_of_another_store(store, model, tokens, tmp_path):
    """Its number may be another model's here."""
    publish(store, model, "a", tokens)
    kvfs.format(tmp_path / "other.kvfs", "48MiB")
    with kvfs.open(tmp_path / "other.kvfs", cache_bytes="8MiB") as other:
        stranger = add_model(other)
    with pytest.raises(InvalidArgument, match="is not a model of this store"):
        store.find_prefix(stranger, tokens)


def test_part_of_a_group_on_flash(path, tokens):
    """A group whose first pages are stored is not there yet, though all its token ids are known."""
    with kvfs.open(path, writeback_tokens=32) as store:
        model = add_model(store)
        sequence = store.create_sequence(model, "a")
        sequence.append_tokens(tokens[: 2 * GROUP])
        sequence.publish()
        for layer in range(model.num_layers):
            sequence.append(layer, *kv_of(tokens[: GROUP + GROUP // 2]))
        sequence.flush()
        assert sequence._row.num_spilled > GROUP
        assert sequence.publish() == store.find_prefix(model, tokens[: 2 * GROUP]).num_tokens == GROUP
        for layer in range(model.num_layers):
            keys, values = kv_of(tokens[: 2 * GROUP])
            sequence.append(layer, keys[GROUP + GROUP // 2 :], values[GROUP + GROUP // 2 :])
        sequence.flush()
        match = store.find_prefix(model, tokens[: 2 * GROUP])
        assert_holds(store.restore_prefix(match, "b"), tokens[: 2 * GROUP])


def test_fork_without_token_ids(store, model, tokens):
    """A fork that was made before the ids came shares the groups, and can say nothing of them."""
    sequence = store.create_sequence(model, "a")
    for layer in range(model.num_layers):
        sequence.append(layer, *kv_of(tokens))
    child = sequence.fork("b")
    child.append_tokens(tokens)
    child.publish()
    for _ in range(2):
        match = store.find_prefix(model, tokens)
        assert match.num_tokens == 5 * GROUP
        assert_holds(store.restore_prefix(match, "c"), tokens[: 5 * GROUP])
        store.delete_sequence("c")
    store.delete_sequence("b")  # and nobody knows the tokens any more
    store.flush()
    assert store.restore_prefix(store.find_prefix(model, tokens), "c").num_tokens == 0
    assert store.find_prefix(model, tokens).num_tokens == 0
    assert store.check() == []


def test_not_published(store, model, tokens):
    """Who does not publish is not found, forks of the published neither beyond what they share."""
    fill(store.create_sequence(model, "quiet"), tokens).flush()
    assert store.find_prefix(model, tokens).num_tokens == 0
    child = publish(store, model, "a", tokens[:GROUP]).fork("b")
    fill(child, tokens[GROUP:]).flush()
    assert store.find_prefix(model, tokens).num_tokens == GROUP
    assert child.publish() == 5 * GROUP
    assert store.find_prefix(model, tokens).num_tokens == 5 * GROUP


def test_tenants_apart(store, model, tokens):
    """What a tenant has cached is a miss for every other one, of the same kind as what nobody has."""
    publish(store, model, "a", tokens, tenant="red")
    by_attribute = fill(store.create_sequence(model, "b", {TENANT: b"blue"}), tokens[: 2 * GROUP])
    by_attribute.publish()
    for tenant, found in (("red", 5), ("blue", 2), ("green", 0), ("", 0)):
        match = store.find_prefix(model, tokens, tenant)
        assert match.num_tokens == found * GROUP, tenant
        assert match.miss == (None if tenant == "red" else Miss.UNKNOWN)
    restored = store.restore_prefix(store.find_prefix(model, tokens, "red"), "c")
    assert restored.attributes() == {TENANT: b"red"}  # so that it publishes to nobody else
    salts = [row[0] for row in store._catalogue._db.execute("SELECT salt FROM prefix_scope")]
    names = [row[0] for row in store._catalogue._db.execute("SELECT name FROM prefix_entry")]
    assert len({*salts}) == 2 and len({*names}) == 7


def test_same_work_for_what_others_have(store, model, tokens):
    """A tenant that could count another's look-ups would learn what is cached: the statements are the same."""
    publish(store, model, "a", tokens, tenant="red")
    publish(store, model, "b", tokens[:GROUP] ^ 9, tenant="green")

    def statements(prompt):
        seen = []
        db = store._catalogue._db
        db.exec_trace = lambda cursor, statement, bindings: (
            seen.append((statement, len(bindings or ()))) or True
        )
        try:
            assert store.find_prefix(model, prompt, "green").num_tokens == 0
        finally:
            db.exec_trace = None
        return seen

    assert statements(tokens) == statements(tokens ^ 77)


def test_reasons(store, model, tokens):
    """A miss that nobody can explain is a cache that nobody trusts."""
    publish(store, model, "a", tokens[:GROUP])
    other_dtype = add_model(store, "bfloat16")
    other_model = add_model(store, name="tall", num_layers=3)
    for wanted, miss in (
        (store.find_prefix(other_dtype, tokens), Miss.OTHER_DTYPE),
        (store.find_prefix(other_model, tokens), Miss.OTHER_MODEL),
        (store.find_prefix(model, tokens, settings={"lora": "x"}), Miss.OTHER_SETTINGS),
        (store.find_prefix(model, tokens ^ 1), Miss.UNKNOWN),
        (store.find_prefix(model, tokens[: GROUP - 1]), Miss.TOO_SHORT),
        (store.find_prefix(model, []), Miss.TOO_SHORT),
    ):
        assert (wanted.num_tokens, wanted.miss) == (0, miss)
    assert store.find_prefix(model, tokens).miss == Miss.UNKNOWN
    assert store.find_prefix(model, tokens[:GROUP]).miss is None
    counted = prefix_counters(store)
    assert (counted["lookups"], counted["hits"], counted["misses"]) == (6, 2, 4)
    assert counted["tokens_found"] == 2 * GROUP and counted["tokens_wanted"] == 16 * GROUP
    assert (counted["miss_unknown"], counted["miss_too_short"], counted["miss_other_settings"]) == (2, 2, 1)
    assert prefix_counters(store, model="tall")["miss_other_model"] == 1
    assert store.counters()["prefix"]["lookups"] == 8


def test_tokens_are_compared(store, model, tokens, caplog):
    """Two groups of one name, which chance or a damaged catalogue could make: a miss, never the other's."""
    publish(store, model, "a", tokens)
    store._catalogue._db.execute(
        "UPDATE token_chunk SET token_ids = zeroblob(4096) WHERE sequence_id = ? AND position = 0",
        (store.sequence("a").id,),
    )
    assert store._catalogue.prefixes.leftovers() == ["5 prefix entries that no sequence's tokens give"]
    match = store.find_prefix(model, tokens)  # goes by names
    assert match.num_tokens == 5 * GROUP
    with caplog.at_level(logging.WARNING):
        assert store.restore_prefix(match, "b").num_tokens == 0
    assert "does not hold the tokens" in caplog.text
    assert prefix_counters(store)["groups_dropped"] == 5
    assert prefix_counters(store)["miss_tokens_differ"] == 1
    assert store.find_prefix(model, tokens).miss == Miss.UNKNOWN
    assert store._catalogue.prefixes.leftovers() == []


def test_bad_arguments(store, model, tokens, path):
    """One clear line each, with nothing changed."""
    match = store.find_prefix(model, tokens)
    store.create_sequence(model, "taken")
    with pytest.raises(SequenceExists):
        store.restore_prefix(match, "taken")
    for call in (
        lambda: store.find_prefix("model", tokens),
        lambda: store.find_prefix(model, [-1]),
        lambda: store.find_prefix(model, [0.5]),
        lambda: store.find_prefix(model, tokens, tenant="\n"),
        lambda: store.find_prefix(model, tokens, tenant="\ud800"),
        lambda: store.find_prefix(model, tokens, tenant=b"red"),
        lambda: store.find_prefix(model, tokens, settings=["rope"]),
        lambda: store.find_prefix(model, tokens, settings={"x": object()}),
        lambda: store.find_prefix(model, tokens, settings={"x": "y" * 5000}),
        lambda: store.restore_prefix(tokens, "b"),
        lambda: store.restore_prefix(match, "b", {"user.kvfs.tenant": b""}),
        lambda: store.sequence("taken").publish(tenant="x" * 256),
    ):
        with pytest.raises(InvalidArgument):
            call()
    assert [sequence.name for sequence in store.sequences()] == ["taken"]
    store.close()
    with pytest.raises(StoreClosed):
        store.find_prefix(model, tokens)


def test_dropped(store, model, tokens):
    """What a tenant's data may no longer be used for, at once; its sequences are its own to delete."""
    publish(store, model, "a", tokens, tenant="red")
    publish(store, model, "b", tokens, tenant="blue")
    usage = store.prefix_usage()
    assert [(u.tenant, u.model, u.num_groups, u.num_sequences) for u in usage] == [
        ("blue", model.name, 5, 1),
        ("red", model.name, 5, 1),
    ]
    assert store.drop_prefixes(tenant="red", model="other") == 0
    assert store.drop_prefixes(tenant="red") == 5
    assert store.find_prefix(model, tokens, "red").num_tokens == 0
    assert store.find_prefix(model, tokens, "blue").num_tokens == 5 * GROUP
    fill(store.sequence("a"), tokens[:GROUP]).flush()  # is published no more
    assert [u.tenant for u in store.prefix_usage()] == ["blue"]
    assert_holds(store.sequence("b"), tokens)
    assert store.drop_prefixes() == 5


def test_damage_is_a_miss(store, model, tokens, caplog, lose):
    """Corrupted groups: an error once, where they are read; then a shorter prefix, and no wrong keys ever."""
    source = publish(store, model, "a", tokens)
    restored = store.restore_prefix(store.find_prefix(model, tokens), "b")
    lose(source._groups[2].base_lba + source._layout.layer_lbas + 1)
    assert store.find_prefix(model, tokens).num_tokens == 5 * GROUP  # nobody has read it
    with pytest.raises(NvmeStatusError):
        restored.read(1)
    with caplog.at_level(logging.WARNING):
        match = store.find_prefix(model, tokens)
    assert (match.num_tokens, match.miss) == (2 * GROUP, Miss.DAMAGED)
    assert "is damaged: 3 groups are not found any more" in caplog.text
    assert_holds(store.restore_prefix(match, "c"), tokens[: 2 * GROUP])
    assert prefix_counters(store)["groups_dropped"] == 3
    fill(store.sequence("a"), tokens[:GROUP]).flush()
    assert store.find_prefix(model, tokens).num_tokens == 2 * GROUP  # and it does not come back


def test_verified(store, model, tokens, lose):
    """Who cannot bear an error later has the drive read all of it first; another's copy is found instead."""
    source = publish(store, model, "a", tokens)
    publish(store, model, "twin", tokens[: 4 * GROUP])
    lose(source._groups[0].base_lba)
    match = store.find_prefix(model, tokens, verify=True)
    assert (match.num_tokens, match.miss) == (4 * GROUP, Miss.DAMAGED)
    assert_holds(store.restore_prefix(match, "b"), tokens[: 4 * GROUP])
    assert store.find_prefix(model, tokens, verify=True).miss == Miss.UNKNOWN
