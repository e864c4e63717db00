"""Stand-ins for K and V: what `KvfsCache.update` hands to the model's attention.

The keys and values of the past are in the store, those of the new tokens travel beside the stand-in. An
attention implementation that does not know kvfs would compute over the new tokens alone and give wrong tokens
without a word. Two things make that impossible: every operation on a stand-in raises, and its storage is one
NaN, so that even code which goes around the check (a C++ extension) yields NaN and never plausible numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfs.engines.errors import WrongAttention

if TYPE_CHECKING:
    from kvfs.engines.transformers_cache import KvfsCache

# Facts about a tensor that need none of its numbers.
_HARMLESS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "requires_grad")
) | {torch.Tensor.size, torch.Tensor.dim}

_REFUSAL = (
    "this model's attention computed with K/V directly (torch operation {operation!r}), but they are in the "
    "kvfs store: use attn_implementation='sdpa' (most models' default) or model.set_attn_implementation('kvfs')"
)


@dataclass(slots=True)
class FreshTokens:
    """Keys and values of one layer's new tokens, on their way to the store.

    keys, values: [num_sequences, num_kv_heads, num_new_tokens, head_dim] as the model computed them
    num_past:     tokens of each sequence in the store before these
    stored:       appended already (layers that share K/V come here twice)
    """

    cache: KvfsCache
    layer: int
    num_past: int
    keys: torch.Tensor
    values: torch.Tensor
    stored: bool = False


class StandIn(torch.Tensor):
    """A tensor with a shape and a dtype, without numbers; `fresh` holds the real ones (on the keys only)."""

    fresh: FreshTokens | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise WrongAttention(_REFUSAL.format(operation=getattr(func, "__name__", str(func))))

    def __repr__(self):
        return f"StandIn(shape={tuple(self.shape)}, dtype={self.dtype}, in kvfs)"


_poison: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _poison_like(tensor):
    key = (tensor.dtype, tensor.device)
    if key not in _poison:
        _poison[key] = torch.full((1,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return _poison[key].expand(tensor.shape)


def stand_ins(fresh):
    """(keys, values) to return from a cache's update: the shapes of the fresh K/V, and `fresh` on the keys."""
    poison = _poison_like(fresh.keys)
    keys = torch.Tensor._make_subclass(StandIn, poison)
    keys.fresh = fresh
    return keys, torch.Tensor._make_subclass(StandIn, poison)
