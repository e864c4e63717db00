"""The Transformers plug-in on a store that another process owns: the same tokens, by the same code."""

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

import torch

import kvfs
from kvfs.engines.transformers import KvfsCache


@pytest.fixture
def remote(store, tmp_path, client_of):
    with client_of(store, tmp_path) as remote:
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


@pytest.mark.parametrize("options", [{"compression": 4}, {"target_error": 0.05}, {"sparf": (8, 64)}])
def test_sparse_through_the_mount(tiny_model, store, remote, name, prompt, options):
    """Reading less than all stored tokens: the same logits as in process, and fewer than dense reads."""
    model = tiny_model("Llama", initializer_range=0.05)
    ids, text = prompt(600), prompt(10, seed=3)
    derive = "channel_major_keys" if "sparf" in options else "sketch"
    logits = []
    for place, sequence in ((store, f"{name}-here"), (remote, f"{name}-there")):
        cache = KvfsCache(place, sequence, model=model, **options)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            assert cache.sequences[0].seal(derive) == 512
            before = place.counters()["attention"]["sparse_commands"]
            steps = [model(input_ids=text[:, at : at + 1], past_key_values=cache).logits for at in range(10)]
        assert place.counters()["attention"]["sparse_commands"] == before + 10 * model.config.num_hidden_layers
        logits.append(torch.cat(steps))
    torch.testing.assert_close(*logits)


def test_continued_by_the_owner(tiny_model, store, remote, name, prompt):
    """A conversation begun through the mount goes on in the owner's process, without prefill."""
    model = tiny_model("Llama")
    ids = prompt(80)
    expected = generate(model, ids, None, max_new_tokens=20)
    half = generate(model, ids, KvfsCache(remote, name), max_new_tokens=10)
    cache = KvfsCache(store, name)
    assert cache.get_seq_length() == half.shape[1] - 1
    assert torch.equal(generate(model, half, cache, max_new_tokens=10), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_late_failure(tiny_model, client_of, tmp_path, prompt, layer):
    """An append that was posted fails in the owner: the step raises, and the cache knows what is there."""
    model = tiny_model("Llama")
    ids = prompt(60)
    expected = generate(model, ids, None, max_new_tokens=10)
    kvfs.format(tmp_path / "drive.kvfs", "64MiB")
    with kvfs.open(tmp_path / "drive.kvfs") as store, client_of(store, tmp_path) as remote:
        cache = KvfsCache(remote, "chat")
        half = generate(model, ids, cache, max_new_tokens=5)
        owners = store.sequence("chat")
        append = owners.append

        def failing(to_layer, *arguments):
            if to_layer == layer:
                raise kvfs.errors.MediaFailure("the drive is gone")
            append(to_layer, *arguments)

        owners.append = failing
        with pytest.raises(kvfs.errors.MediaFailure, match="gone"):
            generate(model, half, cache, max_new_tokens=5)
        owners.append = append
        assert cache.get_seq_length() == owners.num_tokens == half.shape[1] - 1
        assert torch.equal(generate(model, half, cache, max_new_tokens=5), expected)
