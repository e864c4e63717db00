"""Many sequences deleted in transactions of several: what memory knows goes with the rows, not before."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import CatalogueFull
from kvfs.store import ROWS_OF_SEQUENCE

from .conftest import add_model, random_kv


@pytest.fixture
def store(path):
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        for number in range(7):
            sequence = store.create_sequence(model, f"s{number}")
            for layer in range(model.num_layers):
                sequence.append(layer, *random_kv(1000))
        store.flush()
        yield store


def test_transactions(store, monkeypatch):
    """One that is longer than the log has room for would fail."""
    changes = ROWS_OF_SEQUENCE + len(store.sequence("s0")._groups)
    monkeypatch.setattr(store._catalogue.batch, "_max_changes", 3 * changes)
    transactions, delete = [], store._delete
    monkeypatch.setattr(store, "_delete", lambda some: (transactions.append(len(some)), delete(some)))
    store.delete_sequences(f"s{number}" for number in range(7))
    assert transactions == [3, 3, 1]
    assert list(store.catalogue_rows()) == [] and store.check() == []


def test_one_that_is_taken_back(store, monkeypatch):
    """Sequences that rows still name must be there, and their blocks nobody else's."""
    expected = [array.copy() for array in store.sequence("s0").read(0)]
    delete = store._catalogue.delete_sequence

    def fails_in_the_end(row):
        if row.name == "s2":
            raise CatalogueFull(1)
        return delete(row)

    with monkeypatch.context() as patched, pytest.raises(CatalogueFull):
        patched.setattr(store._catalogue, "delete_sequence", fails_in_the_end)
        store.delete_sequences(["s0", "s1", "s2"])
    for found, array in zip(store.sequence("s0").read(0), expected, strict=True):
        np.testing.assert_array_equal(found, array)
    assert len(list(store.catalogue_rows())) == 7 and store.check() == []
