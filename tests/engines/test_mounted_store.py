"""The Transformers plug-in on a store that another process owns: the same tokens, by the same code."""

import json
import os

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

import torch

import kvfs
from kvfs.engines.transformers import KvfsCache
from kvfs.remote.remote_store import RemoteStore
from kvfs.remote.server import RemoteServer
from kvfs.tree import Caller


@pytest.fixture
def remote(store, tmp_path):
    """A client of the store, as kvfs.open of a mounted folder gives."""
    (tmp_path / ".kvfs").mkdir()
    with RemoteServer(store, tmp_path / "socket") as server:
        invitation = server.invite(Caller(os.geteuid(), os.getegid(), os.getpid()))
        assert "token" in json.loads(invitation)
        (tmp_path / ".kvfs" / "connect").write_bytes(invitation)
        with kvfs.open(tmp_path) as remote:
            assert isinstance(remote, RemoteStore)
            yield remote


def generate(model, ids, cache, **options):
    return model.generate(
        ids, past_key_values=cache, attention_mask=torch.ones_like(ids), do_sample=False, **options
    )


def test_the_same_tokens(tiny_model, store, remote, name, prompt):
    """Decoding, a second turn and prefill in chunks through the mount: other text than in process."""
    model = tiny_model("Llama")
    ids = prompt(100)
    here, there = KvfsCache(store, name), KvfsCache(remote, f"{name}-remote")
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 10, "prefill_chunk_size": 16}):
        expected = generate(model, ids, here, **options)
        assert torch.equal(generate(model, ids, there, **options), expected)
        ids = torch.cat([expected, prompt(40, seed=1)], dim=1)
    assert there.get_seq_length() == here.get_seq_length()
    there.flush()


def test_beams(tiny_model, remote, name, prompt):
    """Forks, renames and deletions of a batch's sequences through the mount."""
    model = tiny_model("Llama")
    ids = prompt(60)
    expected = generate(model, ids, None, num_beams=3, max_new_tokens=10)
    assert torch.equal(generate(model, ids, KvfsCache(remote, name), num_beams=3, max_new_tokens=10), expected)


def test_continued_by_the_owner(tiny_model, store, remote, name, prompt):
    """A conversation begun through the mount goes on in the owner's process, without prefill."""
    model = tiny_model("Llama")
    ids = prompt(80)
    expected = generate(model, ids, None, max_new_tokens=20)
    half = generate(model, ids, KvfsCache(remote, name), max_new_tokens=10)
    cache = KvfsCache(store, name)
    assert cache.get_seq_length() == half.shape[1] - 1
    assert torch.equal(generate(model, half, cache, max_new_tokens=10), expected)
