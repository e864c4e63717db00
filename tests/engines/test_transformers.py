"""The Transformers plug-in against Transformers itself: the same tokens, or a clear refusal."""

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

import torch
from transformers.cache_utils import DynamicCache

import kvfs
from kvfs.engines.transformers import KvfsCache, UnsupportedMask

FAMILIES = {
    "llama, group of 2": ("Llama", {}),
    "llama, group of 4": ("Llama", {"num_key_value_heads": 1}),
    "llama, one KV head per query head": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral, window": ("Mistral", {"sliding_window": 48}),
    "gemma3, mixed windows": (
        "Gemma3",
        {
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 128, "init_std": 0.3}),
    "gpt-neox": ("GPTNeoX", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2, soft cap and windows": (
        "Gemma2",
        {"sliding_window": 48, "attn_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
    "gpt-oss, sinks and windows": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
    ),
}
# What sdpa cannot compute: their reference is Transformers' eager attention.
EAGER = ("Gemma2", "GptOss")
# Other ratios of query heads to KV heads: once is enough.
ONE_OF_A_KIND = [
    name for name in FAMILIES if name not in ("llama, group of 4", "llama, one KV head per query head")
]


def family_model(tiny_model, name):
    """A tiny model; in float32, and with weights so large that no two tokens are nearly as likely: rounding in
    another order then changes no token."""
    family, changes = FAMILIES[name]
    model = tiny_model(family, **changes)
    if family == "GptOss" and model.config._attn_implementation != "kvfs":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    if family in EAGER:
        model.set_attn_implementation("kvfs")
    return model


@pytest.fixture(params=FAMILIES)
def model_of_any_shape(request, tiny_model):
    return family_model(tiny_model, request.param)


@pytest.fixture(params=ONE_OF_A_KIND)
def any_model(request, tiny_model):
    """A tiny model of each family."""
    return family_model(tiny_model, request.param)


def generate(model, ids, cache=None, num_tokens=40, **options):
    """Token ids of a generation, prompt included; without a cache by Transformers alone."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    implementation = model.config._attn_implementation
    if cache is None and implementation == "kvfs":
        model.set_attn_implementation("eager")
    try:
        return model.generate(ids, past_key_values=cache, max_new_tokens=num_tokens, **options)
    finally:
        model.set_attn_implementation(implementation)


def greedy(model, ids, cache=None, num_tokens=40, **options):
    return generate(model, ids, cache, num_tokens, do_sample=False, **options)


def attention_commands(store):
    """Vendor attention commands that the drive has executed."""
    return store.counters()["attention"]["commands"]


# -- the same tokens -------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(model_of_any_shape, store, name, prompt):
    """Without it: a model family that generates other text on kvfs than in memory."""
    ids = prompt(100)
    expected = greedy(model_of_any_shape, ids)
    assert len(expected[0, 100:].unique()) > 5, "a model that repeats itself shows nothing"
    assert torch.equal(greedy(model_of_any_shape, ids, KvfsCache(store, name)), expected)


def test_decode_attention_runs_in_the_drive(llama, store, name, prompt):
    """Without it: K/V on the drive, but the drive idle and the host computing everything."""
    cache = KvfsCache(store, name)
    ids = greedy(llama, prompt(100), cache, num_tokens=1)
    cache.flush()  # until the prompt's pages are on flash the host computes
    before = attention_commands(store)
    greedy(llama, ids, cache, num_tokens=10)
    assert attention_commands(store) - before == 10 * llama.config.num_hidden_layers


def test_left_padded_batch(any_model, store, name, prompt):
    """Without it: padding tokens attended to, wrong text for the shorter prompts of a batch."""
    ids = prompt(100, num_rows=3)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[2, :70] = 0
    expected = greedy(any_model, ids, attention_mask=mask)
    assert torch.equal(greedy(any_model, ids, KvfsCache(store, name), attention_mask=mask), expected)
    assert [sequence.name for sequence in store.sequences() if sequence.name.startswith(f"{name}.")] == [
        f"{name}.{row}" for row in range(3)
    ]


def test_several_turns(any_model, store, name, prompt):
    """Without it: the second message of a chat answered as if part of the first were missing."""
    ids = greedy(any_model, prompt(60), num_tokens=20)
    cache = KvfsCache(store, name)
    assert torch.equal(greedy(any_model, prompt(60), cache, num_tokens=20), ids)
    for turn in (1, 2):
        ids = torch.cat([ids, prompt(30, seed=turn)], dim=1)
        stored = cache.get_seq_length()
        expected = greedy(any_model, ids, num_tokens=15)
        assert torch.equal(greedy(any_model, ids, cache, num_tokens=15), expected)
        assert cache.get_seq_length() == ids.shape[1] + 14 > stored
        ids = expected


def test_continuation_of_a_padded_batch(any_model, store, name, prompt):
    """Without it: a batch's second turn attends to padding."""
    ids = prompt(80, num_rows=2)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    cache = KvfsCache(store, name)
    ids = greedy(any_model, ids, cache, num_tokens=10, attention_mask=mask)
    ids = torch.cat([ids, prompt(20, num_rows=2, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 30, dtype=mask.dtype)], dim=1)
    expected = greedy(any_model, ids, num_tokens=10, attention_mask=mask)
    assert torch.equal(greedy(any_model, ids, cache, num_tokens=10, attention_mask=mask), expected)


def test_chunked_prefill(any_model, store, name, prompt):
    """Without it: long prompts, prefilled in chunks, seen wrongly at the seams."""
    ids = prompt(150)
    expected = greedy(any_model, ids, num_tokens=10)
    cache = KvfsCache(store, name)
    assert torch.equal(greedy(any_model, ids, cache, num_tokens=10, prefill_chunk_size=37), expected)


def test_sampling_with_a_seed(any_model, store, name, prompt):
    """Without it: results that cannot be repeated with what was generated in memory."""
    ids = prompt(80)
    runs = []
    for cache in (None, KvfsCache(store, name)):
        torch.manual_seed(11)
        runs.append(generate(any_model, ids, cache, num_tokens=20, do_sample=True, top_k=20))
    assert torch.equal(*runs)


def test_beam_search(any_model, store, name, prompt):
    """Without it: beams that continue another beam's past."""
    ids = prompt(80)
    expected = greedy(any_model, ids, num_beams=3, num_tokens=16)
    assert torch.equal(greedy(any_model, ids, KvfsCache(store, name), num_beams=3, num_tokens=16), expected)
    left = [sequence.name for sequence in store.sequences() if sequence.name.startswith(f"{name}.")]
    assert left == [f"{name}.{row}" for row in range(3)], "forks of beam search are left behind"


def test_prompt_lookup_takes_candidates_back(any_model, store, name, prompt):
    """Without it: rejected candidates stay in the sequence (crop)."""
    ids = prompt(40).repeat(1, 2)  # repetition makes the lookup propose something
    expected = greedy(any_model, ids, num_tokens=20)
    cache = KvfsCache(store, name)
    assert torch.equal(greedy(any_model, ids, cache, num_tokens=20, prompt_lookup_num_tokens=4), expected)


def test_a_draft_model(any_model, llama, store, name, prompt):
    """Without it: drafts of another model that were rejected are part of the text that follows."""
    ids = prompt(80)
    expected = greedy(any_model, ids, num_tokens=12)
    cache = KvfsCache(store, name)
    assert torch.equal(greedy(any_model, ids, cache, num_tokens=12, assistant_model=llama), expected)


def test_assisted_decoding_after_stored_tokens(llama, store, name, prompt):
    """Transformers passes all ids again there, and would have them stored twice: wrong text."""
    cache = KvfsCache(store, name)
    ids = greedy(llama, prompt(60), cache, num_tokens=10)
    with pytest.raises(UnsupportedMask, match="assisted"):
        greedy(llama, ids, cache, num_tokens=10, prompt_lookup_num_tokens=4)


def test_continues_after_reopening_without_prefill(llama, tmp_path, prompt):
    """Without it: a restart loses the conversation, or computes all of it again."""
    ids = prompt(300)
    expected = greedy(llama, ids, num_tokens=50)
    kvfs.format(tmp_path / "drive.kvfs", size="64MiB")
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        half = greedy(llama, ids, KvfsCache(store, "chat"), num_tokens=20)
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        cache = KvfsCache(store, "chat")
        assert cache.get_seq_length() == half.shape[1] - 1
        new_tokens = []
        hook = llama.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: new_tokens.append(inputs[0].shape[1])
        )
        try:
            assert torch.equal(greedy(llama, half, cache, num_tokens=30), expected)
        finally:
            hook.remove()
        assert new_tokens == [1] * 30, "stored tokens were computed again"


def test_half_precision_storage_equals_rounded_kv(llama, store, name, prompt):
    """Without it: fp16 on flash means something else than K/V rounded to fp16."""

    class Rounded(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            return super().update(keys.half().float(), values.half().float(), layer_idx, *args, **kwargs)

    ids = prompt(100)
    expected = greedy(llama, ids, Rounded())
    cache = KvfsCache(store, name, dtype="float16")
    assert torch.equal(greedy(llama, ids, cache), expected)
    assert cache.sequences[0].model.dtype == "float16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision(llama, store, name, prompt, dtype):
    """Without it: half-precision models, the usual ones, compute wrongly or are stored in another dtype."""
    model = type(llama)(llama.config).eval().to(dtype)
    model.load_state_dict(llama.state_dict())
    ids, step = prompt(100), prompt(1, seed=1)
    logits = []
    for cache in (DynamicCache(), KvfsCache(store, name)):
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            logits.append(model(step, past_key_values=cache).logits.float())
    # Both round the attention's output and everything after it to the model's dtype, in another order of sums.
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()
    assert store.sequence(name).model.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("family", ["gemma2, soft cap and windows", "gpt-oss, sinks and windows", "mixtral"])
def test_kvfs_attention_without_its_cache(tiny_model, family, prompt):
    """Without it: a model set to "kvfs" is of no use beside a KvfsCache, for drafts or after a full drive."""
    model = family_model(tiny_model, family)
    model.set_attn_implementation("kvfs")
    ids, mask = prompt(80, num_rows=2), torch.ones(2, 80, dtype=torch.long)
    mask[0, :30] = 0
    for options in ({}, {"attention_mask": mask}, {"prefill_chunk_size": 30}):
        expected = greedy(model, ids, num_tokens=8, **options)
        assert torch.equal(
            greedy(model, ids, DynamicCache(config=model.config), num_tokens=8, **options), expected
        )


def test_other_caches_are_left_alone(llama, prompt):
    """Without it: importing kvfs changes what every other model and cache computes."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, 9, 32) for heads in (4, 2, 2)]
    module = llama.model.layers[0].self_attn
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, None, scaling=0.2)[0]
    assert torch.equal(ours, sdpa_attention_forward(module, *tensors, None, scaling=0.2)[0])
    ids = prompt(50)
    assert torch.equal(greedy(llama, ids, DynamicCache()), greedy(llama, ids))


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_soft_capped_scores(tiny_model, store, name, prompt, softcap):
    """Without it: Gemma 2 without its soft cap, wrong text."""
    model = tiny_model("Gemma2", sliding_window=64, attn_logit_softcapping=softcap, tie_word_embeddings=False)
    model.set_attn_implementation("kvfs")
    expected = greedy(model, prompt(90))
    assert torch.equal(greedy(model, prompt(90), KvfsCache(store, name)), expected)


# -- changes of the cache --------------------------------------------------------------------------------------


def test_rows_can_be_repeated_and_selected(llama, store, name, prompt):
    """Without it: several answers to one stored prompt, or a subset of a batch, from wrong rows."""
    ids = prompt(90)
    cache = KvfsCache(store, name)
    with torch.inference_mode():
        llama(ids[:, :80], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        rest = torch.cat([ids[:, 80:], prompt(10, num_rows=2, seed=5)])
        llama(rest, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
    whole = torch.cat([ids[:, :80].expand(2, -1), rest[[2, 0]]], dim=1)
    step = prompt(1, num_rows=2, seed=6)
    with torch.inference_mode():
        logits = llama(step, past_key_values=cache).logits
        expected = llama(torch.cat([whole, step], dim=1)).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=1e-4)


def test_reset_empties_the_sequences(llama, store, name, prompt):
    """Without it: a reset cache goes on with the old conversation."""
    cache = KvfsCache(store, name)
    greedy(llama, prompt(80), cache, num_tokens=5)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = prompt(70, seed=3)
    assert torch.equal(greedy(llama, ids, cache, num_tokens=20), greedy(llama, ids, num_tokens=20))


def test_a_step_that_failed_half_way_is_forgotten(llama, store, name, prompt):
    """Without it: after an interrupt some layers are one token ahead, and all later text is wrong."""
    ids = prompt(90)
    expected = greedy(llama, ids, num_tokens=20)
    cache = KvfsCache(store, name)
    half = greedy(llama, ids, cache, num_tokens=10)

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            greedy(llama, half, cache, num_tokens=10)
    finally:
        hook.remove()
    assert cache.get_seq_length() == half.shape[1] - 1
    assert torch.equal(greedy(llama, half, cache, num_tokens=10), expected)


def test_a_failed_append_to_one_row_is_forgotten(llama, store, name, prompt, monkeypatch):
    """Without it: a full drive leaves the rows of a batch with different lengths, and wrong text after that."""
    ids = prompt(90, num_rows=2)
    expected = greedy(llama, ids, num_tokens=20)
    cache = KvfsCache(store, name)
    half = greedy(llama, ids, cache, num_tokens=10)
    calls = []
    append = kvfs.Sequence.append

    def fail_late(sequence, layer, keys, values):
        calls.append(layer)
        if len(calls) == 4:
            raise kvfs.errors.OutOfSpace(1, 0)
        append(sequence, layer, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(kvfs.Sequence, "append", fail_late)
        with pytest.raises(kvfs.errors.OutOfSpace):
            greedy(llama, half, cache, num_tokens=10)
    assert torch.equal(greedy(llama, half, cache, num_tokens=10), expected)
