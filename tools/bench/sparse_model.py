"""A language model over a long text whose attention to the past is a drive's, or a sparse method's.

The past is computed once, by the model's own attention, and then fixed. Tokens behind it are passed in one
batch, each attending to the past through a `PastAttention` and to the new ones before it in torch; both parts
merge by their log-sum-exp. So every method sees the same keys, and every token's queries are as in decoding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Beyond what a model's configuration allows: YaRN (arXiv:2309.00071), the smallest factor that reaches. Most of
# the shipped model's training was on less. Nats per token of 32k held-out tokens, by position:
#                                0-4k   4-8k  8-12k 12-16k 16-20k 20-24k 24-28k 28-32k
#   windows of 2k to 4k         2.385  2.111  1.775  2.113  2.342  2.109  2.269  2.243
#   unchanged                   2.385  2.137  1.842  2.204  2.478  2.297  2.675  2.618
#   YaRN, factor 8 from 4,096   2.435  2.085  1.788  2.118  2.355  2.160  2.359  2.381
#   YaRN, factor 4 from 4,096   2.411  2.085  1.773  2.090  2.342  2.163  2.403  2.376
#   theta times 5               2.420  2.124  1.796  2.118  2.385  2.205  2.451  2.472
#   linear, factor 4            3.951  3.892  3.772  3.889  4.072  4.001  4.625  4.313
# So a context of up to 12k serves the model; one of 32k is usable, 0.1 nats worse than windows. Starting from
# 2,048 costs nothing (2.151 against 2.153 at 8k, both with factor 8), and finds more needles: 19 of 40
# against 16.
TRAINED_TOKENS = 2048
PART_TOKENS = 1024  # of logits at a time: the vocabulary times the context would not fit in memory
IMPLEMENTATION = "kvfs_bench_past"


class PastAttention(Protocol):
    """Attention over the past's tokens."""

    def attend(self, layer: int, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [num_queries, num_kv_heads, group_size, head_dim], lse [num_queries, num_kv_heads, group_size]).

        queries: float32 [num_queries, num_kv_heads, group_size, head_dim], scaled already
        """
        ...


@dataclass(frozen=True)
class Past:
    """Keys and values of each layer, float32 [num_kv_heads, num_tokens, head_dim], rounded to float16."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def first(self, num_tokens: int) -> "Past":
        """The past as it was after so many tokens."""
        return Past(*([part[:, :num_tokens] for part in parts] for parts in (self.keys, self.values)))


def rope_factor(config, num_tokens: int) -> float:
    """What a context of num_tokens needs."""
    return 1.0 if num_tokens <= config.max_position_embeddings else num_tokens / TRAINED_TOKENS


def rope_parameters(config, factor: float) -> dict:
    """YaRN over a configuration's own rotary embedding; a factor of 1 leaves it."""
    own = dict(config.rope_parameters)
    if factor == 1:
        return own
    return own | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": TRAINED_TOKENS,
    }


def load_model(model_dir: Path, context: int = 0):
    """A model for contexts of so many tokens. Computes in float32, takes `past_attention` when called."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    config = AutoConfig.from_pretrained(model_dir)
    config.rope_parameters = rope_parameters(config, rope_factor(config, context))
    config.max_position_embeddings = max(config.max_position_embeddings, context)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, dtype="float32", attn_implementation=IMPLEMENTATION
    )
    return model.eval().requires_grad_(False)


def _attention(module, query, key, value, attention_mask, scaling=None, past_attention=None, **kwargs):
    """In the shapes of Transformers' attention interface: one sequence, and all new tokens causal."""
    if past_attention is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    num_queries, num_kv_heads = query.shape[2], key.shape[1]
    queries = (query[0].transpose(0, 1) * scaling).reshape(num_queries, num_kv_heads, -1, query.shape[-1])
    past = past_attention.attend(module.layer_idx, queries)
    scores = torch.einsum("thgd,hnd->thgn", queries, key[0])
    later = torch.ones(num_queries, num_queries, dtype=torch.bool).triu(1)
    scores.masked_fill_(later[:, None, None], -torch.inf)
    fresh = torch.einsum("thgn,hnd->thgd", scores.softmax(-1), value[0]), scores.logsumexp(-1)
    share = torch.sigmoid(past[1] - fresh[1])[..., None]  # of the past in both parts' weights
    out = share * past[0] + (1 - share) * fresh[0]
    return out.reshape(1, num_queries, -1, query.shape[-1]), None


def prefill(model, ids: torch.Tensor) -> Past:
    """The past that a text, int64 [num_tokens], leaves."""
    cache = DynamicCache()
    model.model(ids[None], past_key_values=cache)
    return Past(
        *([_as_stored(getattr(layer, name)[0]) for layer in cache.layers] for name in ("keys", "values"))
    )


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half().float().contiguous()


def next_log_probabilities(
    model, ids: torch.Tensor, past_attention: PastAttention, num_past: int
) -> torch.Tensor:
    """float32 [num_new, vocabulary]: of the token after each of `ids`, int64 [num_new], behind the past."""
    positions = torch.arange(num_past, num_past + len(ids))[None]
    logits = model(ids[None], position_ids=positions, use_cache=False, past_attention=past_attention).logits[0]
    return torch.log_softmax(logits, -1)


def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Nats of each token of a text but the first, by the model's own attention."""
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    parts = []
    for start in range(0, len(ids) - 1, PART_TOKENS):
        targets = ids[start + 1 : start + 1 + PART_TOKENS]
        logits = model.lm_head(hidden[start : start + len(targets)])
        parts.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts)
