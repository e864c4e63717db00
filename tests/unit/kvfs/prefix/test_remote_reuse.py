"""Prefix reuse through the process that owns the drive."""

import os

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, SequenceExists
from kvfs.prefix.match import Miss
from kvfs.remote.rights import Client
from kvfs.sequence_attributes import TENANT
from kvfs.telemetry.metrics import metrics_text

from ..conftest import add_model
from ..remote.owner import Served
from .conftest import GROUP, assert_holds, publish


@pytest.fixture
def served(path, tmp_path):
    with kvfs.open(path, cache_bytes="8MiB") as store, Served(store, tmp_path / "mount") as served:
        yield served


def test_as_in_process(served, tokens):
    """An engine beside the mount finds what another has stored, and shares it."""
    with served.open() as client:
        model = add_model(client)
        publish(client, model, "a", tokens, tenant="red", settings={"lora": "x"})
        assert client.find_prefix(model, tokens).miss == Miss.UNKNOWN
        match = client.find_prefix(model, tokens.tolist(), "red", {"lora": "x"}, verify=True)
        assert match.num_tokens == 5 * GROUP and match.miss is None
        restored = client.restore_prefix(match, "b", {"user.note": b"\xff"})
        assert restored.attributes() == {TENANT: b"red", "user.note": b"\xff"}
        assert_holds(restored, tokens[: 5 * GROUP])
        assert served.store.prefix_usage() == client.prefix_usage()
        assert client.counters()["prefix"]["hits"] == 1
        with pytest.raises(SequenceExists):
            client.restore_prefix(match, "b")
        with pytest.raises(InvalidArgument):
            client.find_prefix(served.store.model(model.name), tokens)
        with pytest.raises(InvalidArgument, match="shared"):
            client.find_prefix(model, np.zeros(1 << 26, np.uint32))
        assert client.drop_prefixes("red") == 5
        assert client.drop_prefixes() == 0


def test_users_are_apart(served, tokens, monkeypatch):
    """A user that names another's tenant, or the owner's: nothing is found, counted or dropped."""
    store = served.store
    model = add_model(store)
    publish(store, model, "a", tokens, tenant="red")
    store.find_prefix(model, tokens, "red")
    monkeypatch.setattr(Client, "is_administrator", property(lambda client: False))
    with served.open() as client:
        mine = client.model(model.name)
        assert client.find_prefix(mine, tokens, "red").miss == Miss.UNKNOWN
        assert client.prefix_usage() == []
        assert client.drop_prefixes() == client.drop_prefixes("red") == 0
        publish(client, mine, "b", tokens[: 2 * GROUP], tenant="red")
        publish(client, mine, "c", tokens[:GROUP])
        match = client.find_prefix(mine, tokens, "red")
        assert match.num_tokens == 2 * GROUP
        restored = client.restore_prefix(match, "d")
        assert restored.attributes()[TENANT] == b"red"
        assert restored.publish() == 2 * GROUP
        assert {usage.tenant for usage in client.prefix_usage()} == {"", "red"}
        counted = client.counters()["prefix"]
        assert {row["tenant"] for row in counted["tenants"]} == {"red"}
        assert counted["lookups"] == 2 < store.counters()["prefix"]["lookups"]
        assert {u.tenant for u in store.prefix_usage()} == {
            "red",
            *(f"user {os.geteuid()}: {t}" for t in ("", "red")),
        }
        assert client.drop_prefixes() == 3
    assert store.find_prefix(model, tokens, "red").num_tokens == 5 * GROUP


def test_metrics(served, tokens):
    """Hits by tenant and model as Prometheus reads them."""
    model = add_model(served.store, name='a "b"')
    publish(served.store, model, "a", tokens, tenant="red")
    served.store.find_prefix(model, tokens, "red")
    text = metrics_text(served.store.telemetry()).decode()
    assert 'kvfs_prefix_lookups_total{model="a \\"b\\"",result="hit",tenant="red"} 1.0\n' in text
