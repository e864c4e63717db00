"""Decoding that reads less than all stored tokens: mostly the same tokens, and the very same without it."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch

import kvfs
from kvfs.engines.transformers import KvfsCache
from tests.engines.answers import greedy, plain

DEMO_MODEL = Path(__file__).parents[2] / "tools" / "kvfsctl" / "demo_model"


def sealed_cache(model, store, name, ids, **options):
    """A cache that holds all ids but the last, with what `options` takes of its complete groups."""
    cache = KvfsCache(store, name, model=model, **options)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
    for row in cache.sequences:
        row.seal("channel_major_keys" if "sparf" in options else "sketch")
    return cache


def following(model, cache, ids, num_tokens):
    """(ids [num_tokens] of greedy decoding on a text of the test's, logits [num_tokens, vocabulary])"""
    logits = []
    with torch.no_grad():
        for place in range(num_tokens):
            step = ids[:, place : place + 1]
            logits.append(model(input_ids=step, past_key_values=cache).logits[0, -1])
    return torch.stack(logits).argmax(dim=-1), torch.stack(logits)


@pytest.mark.parametrize("options", [{"compression": 1}, {"target_error": 0.02}, {"sparf": (32, 4096)}])
def test_logits_of_a_tiny_model(tiny_model, store, name, prompt, options):
    """What is left out changes the answer little; prompts are computed whole."""
    llama = tiny_model("Llama", initializer_range=0.05)  # small weights: nothing hangs on one token alone
    ids = prompt(600)
    dense = KvfsCache(store, f"{name}-dense", model=llama)
    with torch.no_grad():
        expected_prompt = llama(input_ids=ids[:, :-1], past_key_values=dense).logits
        cache = KvfsCache(store, name, model=llama, **options)
        torch.testing.assert_close(llama(input_ids=ids[:, :-1], past_key_values=cache).logits, expected_prompt)
    cache.sequences[0].seal("channel_major_keys" if "sparf" in options else "sketch")
    before = store.counters()["attention"]["sparse_commands"]
    text = torch.cat([ids[:, -1:], prompt(19, seed=3)], dim=1)
    _, expected = following(llama, dense, text, 20)
    _, found = following(llama, cache, text, 20)
    assert store.counters()["attention"]["sparse_commands"] > before
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-3 if "sparf" in options else 0.15)
    if "sparf" not in options:
        assert error > 0


def test_nothing_asked_for_is_dense(llama, store, name, prompt):
    """compression=None on sealed sequences: the same tokens, and no sparse command."""
    ids = prompt(600)
    cache = sealed_cache(llama, store, name, ids)
    before = store.counters()["attention"]["sparse_commands"]
    assert torch.equal(llama.generate(ids, past_key_values=cache, max_new_tokens=12), plain(llama, ids))
    assert store.counters()["attention"]["sparse_commands"] == before


def test_enable(llama, enable, store, name, prompt):
    """An answer under compression is found by sessions of the same choice, not by exact ones."""
    ids = prompt(600)
    session = enable(llama, store, session=name, compression=4)
    answer = greedy(llama, ids)
    assert session.last.is_kept
    assert "sketch" in store.sealing(store.sequence(name).model)
    again = enable(llama, store, session=f"{name}-again", compression=4)
    greedy(llama, torch.cat([answer, prompt(5, seed=2)], dim=1))
    assert again.last.num_tokens > 0
    exact = enable(llama, store, session=f"{name}-exact")
    assert torch.equal(greedy(llama, ids), plain(llama, ids))
    assert exact.last.num_tokens == 0


def test_refusals(llama, enable, store, name):
    """Before anything is computed, with the range."""
    with pytest.raises(kvfs.KvfsError, match="compression is a number from 1 to 64"):
        KvfsCache(store, name, compression=0.5)
    with pytest.raises(kvfs.KvfsError, match="exclude each other"):
        enable(llama, store, session=name, compression=8, target_error=0.1)
    with pytest.raises(kvfs.KvfsError, match="channels are a whole number"):
        KvfsCache(store, name, sparf=(0, 1))


def test_the_shipped_model(store, name):
    """Real attention: at compression 8 nearly all tokens are those of dense attention."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    source = "".join(path.read_text() for path in sorted(Path(kvfs.__file__).parent.glob("*.py")))
    ids = torch.tensor([tokenizer(source)["input_ids"][:2112]])
    prefix, text = ids[:, :2049], ids[:, 2048:]
    dense = KvfsCache(store, f"{name}-dense", model=model)
    with torch.no_grad():
        model(input_ids=prefix[:, :-1], past_key_values=dense)
    cache = sealed_cache(model, store, name, prefix, compression=8)
    expected, _ = following(model, dense, text, 64)
    found, _ = following(model, cache, text, 64)
    assert (expected == found).float().mean() >= 0.9
