"""A Transformers chat whose KV cache is on the drive: tomorrow it goes on without computing the past again."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvfs
from kvfs.engines.transformers import KvfsCache


def a_model() -> LlamaForCausalLM:
    """Small, with random weights: any model of Transformers with grouped-query or multi-head attention does."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=96, head_dim=32, eos_token_id=None, **shape
    )
    return LlamaForCausalLM(config).eval()


def main(folder: Path) -> None:
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    model = a_model()
    ids = torch.randint(1, 100, (1, 64))
    with kvfs.open(drive) as store:  # today
        ids = model.generate(ids, past_key_values=KvfsCache(store, "chat-42"), max_new_tokens=8, pad_token_id=0)
    with kvfs.open(drive) as store:  # tomorrow, in another process
        cache = KvfsCache(store, "chat-42")
        num_stored = cache.get_seq_length()
        ids = torch.cat([ids, torch.randint(1, 100, (1, 4))], dim=1)  # the user's next turn
        answer = model.generate(ids, past_key_values=cache, max_new_tokens=8, pad_token_id=0, do_sample=False)
    plain = model.generate(ids, max_new_tokens=8, pad_token_id=0, do_sample=False)
    print(f"{num_stored} of {ids.shape[1]} tokens were on the drive; same tokens: {torch.equal(answer, plain)}")
    assert torch.equal(answer, plain)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
