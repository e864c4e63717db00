"""torch.compile: one whole graph, and the same tokens.

By aot_eager, which does all but generate code, and once by inductor, which does, and wants a C++ compiler.
"""

import shutil

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch
import torch._dynamo

import kvfs
from kvfs.engines.transformers import KvfsCache, UnsupportedModel, disable, enable

# Windows in some layers; sinks. A plain one is in the tests below.
FAMILIES = {
    "Gemma3": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
}


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model = tiny_model(request.param, **FAMILIES[request.param], tie_word_embeddings=False)
    if model.config._attn_implementation == "eager":
        model.set_attn_implementation("kvfs")
    return model


@pytest.fixture
def compiled():
    """compiled(model, backend): with its forward compiled, until the test ends."""
    models = []

    def compile_forward(model, backend="aot_eager"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        models.append(model)
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)

    yield compile_forward
    for model in models:
        vars(model).pop("forward", None)


def greedy(model, ids, cache=None, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **options)


def test_the_same_tokens_from_one_graph(model, compiled, store, name, prompt):
    """Prefill, decoding and a second turn, with several caches: graphs are of shapes, not of caches."""
    ids = prompt(80)
    expected = greedy(model, ids, KvfsCache(store, name))
    more = torch.cat([expected, prompt(20, seed=1)], dim=1)
    expected_more = greedy(model, more, KvfsCache(store, f"{name}-more"))
    compiled(model)
    for number in range(2):
        cache = KvfsCache(store, f"{name}-{number}", model=model)
        assert torch.equal(greedy(model, ids, cache), expected)
        assert torch.equal(greedy(model, more, cache), expected_more)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 4


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))),
    reason="no C++ compiler, which torch.compile's inductor runs",
)
def test_generated_code(compiled, tiny_model, store, name, prompt):
    """Code that reads stand-ins, or moves an append past its attention: inductor reorders and fuses."""
    llama = tiny_model("Llama")
    ids = prompt(300)
    expected = greedy(llama, ids)
    compiled(llama, "inductor")
    session = enable(llama, store, session=name, tenant=name)
    for reused in (0, 299):
        assert torch.equal(greedy(llama, ids), expected)
        assert session.last.num_tokens == reused
    disable(llama)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["inductor"]


def test_padded_batches_and_beams(compiled, tiny_model, store, name, prompt):
    """Masks and rearranged rows, by the way of a graph."""
    llama = tiny_model("Llama")
    ids, mask = prompt(80, num_rows=2), torch.ones(2, 80, dtype=torch.long)
    mask[0, :30] = 0
    options = {"attention_mask": mask, "num_beams": 2}
    expected = greedy(llama, ids, **options)
    compiled(llama)
    assert torch.equal(greedy(llama, ids, KvfsCache(store, name, model=llama), **options), expected)


def test_enabled(compiled, tiny_model, store, name, prompt):
    """Compiled first, then enabled: what is stored is reused."""
    llama = tiny_model("Llama")
    ids = prompt(400)
    expected = greedy(llama, ids)
    compiled(llama)
    session = enable(llama, store, session=name, tenant=name)
    for reused in (0, 399):
        assert torch.equal(greedy(llama, ids), expected)
        assert session.last.num_tokens == reused
    disable(llama)


def test_refusals(compiled, tiny_model, store, name, prompt):
    """A cache that does not know the model; an attention that does not know kvfs: an error, never tokens."""
    llama = tiny_model("Llama", num_hidden_layers=2)
    compiled(llama)
    with pytest.raises(UnsupportedModel, match="model=model"):
        greedy(llama, prompt(40), KvfsCache(store, name))
    with pytest.raises(kvfs.errors.NoSuchSequence):
        store.sequence(name)
    llama.set_attn_implementation("eager")
    with pytest.raises(Exception, match="set_attn_implementation"):
        greedy(llama, prompt(40), KvfsCache(store, name, model=llama))
