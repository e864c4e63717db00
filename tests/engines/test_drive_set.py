"""The Transformers plug-in on a set of drives: the same tokens, by the same code."""

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

import torch

import kvfs
from kvfs.engines.transformers import KvfsCache


@pytest.fixture
def drive_set(tmp_path):
    locations = [tmp_path / f"{name}.kvfs" for name in "ab"]
    kvfs.format(locations, "128MiB")
    with kvfs.open(locations, cache_bytes="32MiB", writeback_tokens=1) as drive_set:
        yield drive_set


def generate(model, ids, cache, **options):
    return model.generate(
        ids, past_key_values=cache, attention_mask=torch.ones_like(ids), do_sample=False, **options
    )


def test_the_same_tokens(tiny_model, store, drive_set, name, prompt):
    """Decoding, a second turn and prefill in chunks over two drives: other text than over one."""
    model = tiny_model("Llama")
    ids = prompt(100)
    one, several = KvfsCache(store, name), KvfsCache(drive_set, name)
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 10, "prefill_chunk_size": 16}):
        expected = generate(model, ids, one, **options)
        assert torch.equal(generate(model, ids, several, **options), expected)
        ids = torch.cat([expected, prompt(40, seed=1)], dim=1)
    several.flush()
    assert drive_set.check() == []


def test_beams(tiny_model, store, drive_set, name, prompt):
    """Forks, renames and deletions of a batch's sequences on two drives."""
    model, ids = tiny_model("Llama"), prompt(30)
    options = {"max_new_tokens": 12, "num_beams": 3}
    expected = generate(model, ids, KvfsCache(store, name), **options)
    assert torch.equal(generate(model, ids, KvfsCache(drive_set, name), **options), expected)


def test_enabled(tiny_model, drive_set, enable, prompt):
    """The session's own sequence is gone on with; another session begins with whole groups of it."""
    model, ids = tiny_model("Llama"), prompt(300)
    expected = generate(model, ids, None, max_new_tokens=6)
    for name, reuses in (("chat", (0, 299)), ("other", (256, 299))):
        session = enable(model, drive_set, session=name, tenant="")
        for reused in reuses:
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
            assert session.last.num_tokens == reused and session.last.is_kept


def test_enabled_without_a_drive(tiny_model, drive_set, enable, prompt, caplog):
    """What a lost drive has is computed anew, with the reason; the same tokens, and reuse when it is back."""
    model, ids = tiny_model("Llama"), prompt(300)
    expected = generate(model, ids, None, max_new_tokens=6)
    session = enable(model, drive_set, session="chat", tenant="")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    member = list(drive_set._members.values())[1]
    member.lose(OSError("gone"))
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert (session.last.num_tokens, session.last.miss) == (0, "drive_lost")
    assert "gone" in caplog.text
    drive_set.drives.bring_back(member.location)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert session.last.num_tokens == 299
    assert drive_set.check() == []
