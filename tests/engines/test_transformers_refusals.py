"""What the Transformers plug-in refuses, each with a line that says why: never wrong tokens."""

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch

import kvfs
from kvfs.engines.transformers import (
    CacheMismatch,
    KvfsCache,
    UnsupportedMask,
    UnsupportedModel,
    WrongAttention,
)
from tests.engines.answers import greedy as answer


def greedy(model, ids, cache, **options):
    return answer(model, ids, past_key_values=cache, **options)


def test_eager_attention_is_refused(tiny_model, store, name, prompt):
    """Without it: attention over the new tokens alone, wrong text without a word."""
    model = tiny_model("Llama", num_hidden_layers=2)
    model.set_attn_implementation("eager")
    with pytest.raises(WrongAttention, match="set_attn_implementation"):
        greedy(model, prompt(20), KvfsCache(store, name))


def test_stand_ins_hold_no_plausible_numbers(store, name):
    """Without it: code that goes around the refusal computes with something that looks like keys."""
    keys = torch.randn(1, 2, 5, 32)
    for stand_in in KvfsCache(store, name).update(keys, keys, 0):
        assert stand_in.shape == keys.shape and stand_in.dtype == keys.dtype
        with torch._C.DisableTorchFunctionSubclass():
            assert stand_in.isnan().all()
        for operation in (
            lambda t: t + 1,
            lambda t: t[0],
            torch.nan_to_num,
            lambda t: t.numpy(),
            lambda t: t.data,
        ):
            with pytest.raises(WrongAttention):
                operation(stand_in)


def test_latent_attention_is_refused(tiny_model, store, name, prompt):
    """Without it: DeepSeek's latents stored as if they were K and V."""
    model = tiny_model(
        "DeepseekV3",
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        head_dim=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    with pytest.raises(UnsupportedModel, match="latent"):
        greedy(model, prompt(20), KvfsCache(store, name))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 16}, "head_dim"),
        ({"head_dim": 264, "num_attention_heads": 1, "num_key_value_heads": 1}, "head_dim"),
        ({"num_attention_heads": 32, "num_key_value_heads": 1}, "query heads"),
    ],
)
def test_shapes_that_the_drive_cannot_keep_are_refused(tiny_model, store, name, prompt, changes, reason):
    """Without it: an error from deep inside, or a model half stored."""
    with pytest.raises(UnsupportedModel, match=reason):
        greedy(tiny_model("Llama", **changes), prompt(20), KvfsCache(store, name))
    with pytest.raises(kvfs.errors.NoSuchSequence):
        store.sequence(name)


def test_encoder_decoder_models_are_refused(store, name, prompt):
    """Without it: cross attention appended to self attention's sequence."""
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=97,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    ).eval()
    with pytest.raises(UnsupportedModel, match="encoder-decoder"), torch.inference_mode():
        model(prompt(10), decoder_input_ids=prompt(3), past_key_values=KvfsCache(store, name))


def test_masks_with_holes_are_refused(llama, store, name, prompt):
    """Without it: masked tokens in the middle of a sequence are attended to."""
    ids = prompt(60)
    cache = KvfsCache(store, name)
    mask = torch.ones_like(ids)
    mask[0, 20:30] = 0
    with pytest.raises(UnsupportedMask, match="holes"):
        greedy(llama, ids, cache, attention_mask=mask)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_prompt_that_is_stored_already_is_refused(llama, store, name, prompt, with_mask):
    """Without it: the whole prompt appended a second time, and an answer to the doubled text."""
    ids = prompt(60)
    cache = KvfsCache(store, name)
    greedy(llama, ids, cache, num_tokens=20)
    for again in (ids, torch.cat([ids, prompt(19, seed=2)], dim=1)):
        mask = torch.ones_like(again) if with_mask else None
        with pytest.raises(UnsupportedMask, match="stored"):
            greedy(llama, again, cache, attention_mask=mask)


def test_another_model_is_refused(llama, tiny_model, store, name, prompt):
    """Without it: a conversation continued on K/V that another model computed."""
    ids = greedy(llama, prompt(60), KvfsCache(store, name), num_tokens=5)
    torch.manual_seed(1)
    other = type(llama)(llama.config).eval()
    other.generation_config = llama.generation_config
    with pytest.raises(CacheMismatch, match="this one"):
        greedy(other, ids, KvfsCache(store, name))
    with pytest.raises(CacheMismatch):
        greedy(llama, ids, KvfsCache(store, name, dtype="float16"))
    assert KvfsCache(store, name).get_seq_length() == 64, "a refusal changed what is stored"


def test_another_batch_size_is_refused(llama, store, name, prompt):
    """Without it: rows of a batch attached to sequences of other rows."""
    greedy(llama, prompt(60, num_rows=2), KvfsCache(store, name), num_tokens=5)
    with pytest.raises(CacheMismatch, match="2 sequences"):
        greedy(llama, prompt(70, num_rows=3), KvfsCache(store, name))


def test_training_is_refused(llama, store, name, prompt):
    """Without it: gradients that silently stop at the drive."""
    with pytest.raises(UnsupportedModel, match="no_grad"):
        llama(prompt(20), past_key_values=KvfsCache(store, name))


def test_a_closed_store_says_so(llama, tmp_path, prompt):
    """Without it: a crash somewhere in the drive instead of a reason."""
    kvfs.format(tmp_path / "drive.kvfs", size="64MiB")
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        cache = KvfsCache(store, "chat")
        ids = greedy(llama, prompt(40), cache, num_tokens=4)
    with pytest.raises(kvfs.errors.StoreClosed):
        greedy(llama, ids, cache)


def test_unknown_storage_dtype_is_refused(store, name):
    """Without it: a typo in dtype shows up in the middle of the first prompt."""
    with pytest.raises(ValueError, match="float16"):
        KvfsCache(store, name, dtype="fp16")
