"""Entries in the catalogue: with their rows or not at all, checked and mended, on drives of any version."""

import numpy as np
import pytest

import kvfs
from kvfs.catalogue_schema import SCHEMA_VERSION, SET_SCHEMA, SET_VERSION
from kvfs.inspection import Inspection
from kvfs.objects.object_catalogue import OBJECT_TABLES
from kvfs.prefix import hashing
from kvfs.prefix.prefix_catalogue import PREFIX_TABLES
from kvfs.sealing.derived_catalogue import DERIVED_TABLES, DERIVED_TRIGGERS

from ..conftest import add_model
from ..test_check import check, mend, sql, texts
from .conftest import GROUP, assert_holds, publish

DROPS = (  # what version 2 did not have
    "TRIGGER prefix_entry_of_no_group",
    "TRIGGER prefix_publication_of_no_sequence",
    *(f"TRIGGER {trigger}" for trigger in DERIVED_TRIGGERS),
    "INDEX sequence_group_by_group",
    *(f"TABLE {table}" for table in (*DERIVED_TABLES, *OBJECT_TABLES, *PREFIX_TABLES)),
)


def test_hashes():
    """What is stored on drives that live on: the same names for the same tokens, on every machine."""
    geometry = kvfs.layout.KvGeometry(2, 8, 2, 64, "float16", 4)
    first = hashing.root(b"s" * 32, "llama", geometry, hashing.settings_text({"b": 1, "a": [2.5]}))
    names = hashing.chain(b"s" * 32, first, 0, np.arange(11, dtype="<u4").tobytes(), 16)
    assert [name.hex() for name in names] == [
        "5fff21e45fff21e4f5aafa088ccaa4676b7c8479",
        "5fff21e4c67813c7ca928db09d16d2466e739c02",
    ]
    assert hashing.settings_text({"a": [2.5], "b": 1}) == '{"a":[2.5],"b":1}'
    others = [
        hashing.root(b"t" * 32, "llama", geometry, "{}"),
        hashing.root(b"s" * 32, "llama", geometry, "{}"),
        hashing.root(b"s" * 32, "llamb", geometry, "{}"),
        hashing.root(b"s" * 32, "llama", kvfs.layout.KvGeometry(2, 8, 2, 64, "bfloat16", 4), "{}"),
    ]
    assert len({first, *others}) == 5


def test_drive_of_version_2(path, tokens):
    """Sequences of before are published like new ones; older versions of kvfs refuse the drive from then on."""
    with kvfs.open(path) as store:
        publish(store, add_model(store), "old", tokens)
    sql(path, *(f"DROP {what}" for what in DROPS), "PRAGMA user_version = 2")
    before = path.read_bytes()
    assert check(path).problems == []
    assert path.read_bytes() == before
    with kvfs.open(path) as store:
        assert store.find_prefix(store.model("model-float16"), tokens).num_tokens == 0
        assert store.sequence("old").publish() == 5 * GROUP
    with kvfs.open(path) as store:
        match = store.find_prefix(store.model("model-float16"), tokens)
        assert_holds(store.restore_prefix(match, "new"), tokens[: 5 * GROUP])
        assert store._catalogue._db.execute("PRAGMA user_version").get == SCHEMA_VERSION


def test_drive_of_a_set_of_version_3(path):
    """It is one of its set still, and of no use alone."""
    membership = [SET_SCHEMA, "INSERT INTO set_membership VALUES (1, x'7b7d')"]
    sql(path, *(f"DROP {what}" for what in DROPS), *membership, "PRAGMA user_version = 3")
    with pytest.raises(kvfs.errors.DriveOfSet):
        kvfs.open(path)
    with Inspection(path) as inspection:
        assert inspection.catalogue.membership() == b"{}"
        assert inspection.catalogue._db.execute("PRAGMA user_version").get == SET_VERSION


def test_look_into_a_closed_drive_of_version_2(path, tokens):
    """A check of an old drive that was closed well, so without a log: nothing is written to it."""
    with kvfs.open(path) as store:
        publish(store, add_model(store), "old", tokens)
        catalogue = store._catalogue
        for what in DROPS:
            catalogue._db.execute(f"DROP {what}")
        catalogue._db.execute("PRAGMA user_version = 2")
        store.flush = lambda: None
        catalogue.is_durable = False
    before = path.read_bytes()
    with Inspection(path) as inspection:
        assert inspection.why == "" and inspection.check().problems == []
    assert path.read_bytes() == before


def test_checked_and_mended(path, tokens):
    """Entries that lead nowhere or astray are named, and go; nobody's tokens go with them."""
    with kvfs.open(path) as store:
        publish(store, add_model(store), "a", tokens)
    group_of = "(SELECT group_id FROM sequence_group WHERE position = {})"
    sql(
        path,
        f"UPDATE prefix_entry SET name = zeroblob(20) WHERE group_id = {group_of.format(1)}",
        "INSERT INTO prefix_entry SELECT group_id, 99, name FROM prefix_entry"
        f" WHERE group_id = {group_of.format(2)}",
        "INSERT INTO prefix_entry VALUES (4711, 1, x'00')",
        "INSERT INTO prefix_publication VALUES (4711, 1)",
    )
    found = texts(check(path))
    assert len(found) == 4
    assert sum("prefix entry" in text for text in found) == 2
    assert "1 prefix entries that no sequence's tokens give" in found
    done, left = mend(path)
    assert any("rows of the catalogue that led nowhere" in line for line in done)
    assert left == []
    with kvfs.open(path) as store:
        assert store.sequence("a").publish() == 5 * GROUP  # made up for
        assert_holds(store.sequence("a"), tokens)


def test_lost_pages(path, tokens):
    """Repair cuts a sequence at what is lost, and its entries with it."""
    with kvfs.open(path) as store:
        sequence = publish(store, add_model(store), "a", tokens)
        store.restore_prefix(store.find_prefix(sequence.model, tokens), "b")
        base_lba = sequence._groups[3].base_lba
    sql(path, f"UPDATE kv_group SET base_lba = base_lba + (1 << 30) WHERE base_lba = {base_lba}")
    _, left = mend(path)
    assert left == []
    with kvfs.open(path) as store:
        assert store.find_prefix(store.model("model-float16"), tokens).num_tokens == 3 * GROUP
        assert_holds(store.sequence("b"), tokens[: 3 * GROUP])


def test_full_catalogue(path, tokens, monkeypatch):
    """What could be found later never keeps tokens from being stored now; it is made up for."""
    with kvfs.open(path) as store:
        sequence = publish(store, add_model(store), "a", tokens[:GROUP])
        prefixes = store._catalogue.prefixes
        with monkeypatch.context() as patched:
            patched.setattr(prefixes, "_free_bytes", lambda: 100)
            publish(store, sequence.model, "b", tokens)
            assert store.find_prefix(sequence.model, tokens).num_tokens == GROUP
        assert store.sequence("b").publish() == 5 * GROUP


def test_nothing_half_done(path, tokens, monkeypatch):
    """A transaction that fails leaves neither a sequence nor counted references behind."""
    with kvfs.open(path) as store:
        sequence = publish(store, add_model(store), "a", tokens)
        match = store.find_prefix(sequence.model, tokens)
        with monkeypatch.context() as patched:
            patched.setattr(store._catalogue.prefixes, "share", lambda *arguments: 0)
            with pytest.raises(kvfs.errors.CatalogueDamaged):
                store.restore_prefix(match, "b")
        assert [found.name for found in store.sequences()] == ["a"]
        assert_holds(store.restore_prefix(match, "b"), tokens[: 5 * GROUP])
        assert store.check() == []
    with Inspection(path) as inspection:
        assert inspection.check().problems == []
