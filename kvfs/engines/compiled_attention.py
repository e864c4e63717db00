"""The same attention inside a graph of torch.compile: one operator that appends and attends.

A graph holds tensors and numbers, so the cache is named by a number in a tensor, which no graph depends on: a
graph that was compiled with one cache runs with the next. That tensor counts as changed by the operator, which
keeps the layers' order. `KvfsCache.update` hands keys and values over beside the graph's data flow, as it does
without a compiler: what it returns is NaN.
"""

import itertools
import weakref
from types import SimpleNamespace

import torch

from kvfs.engines.errors import UnsupportedModel, WrongAttention

_caches = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class _HandOver:
    """From `update` to the attention function that is called next, while a graph is made."""

    def __init__(self):
        self.state = self.keys = self.values = None
        self.layer = -1


_hand_over = _HandOver()


def new_state(cache):
    """int64 [1]: names this cache as long as it is there."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number])


def hand_over(state, layer, keys, values):
    """Traced. Returns (keys, values) for who cannot know better: of their shapes, and NaN."""
    if layer and _hand_over.state is not None:
        raise WrongAttention(
            "this model's attention took no notice of kvfs: use attn_implementation='sdpa' (most models' "
            "default) or model.set_attn_implementation('kvfs')"
        )
    _hand_over.state, _hand_over.layer = state, layer
    _hand_over.keys, _hand_over.values = keys, values
    poison = keys.new_full((1,), torch.nan)
    return poison.expand(keys.shape), poison.expand(values.shape)


def was_handed_over():
    """Traced. Whether keys and values wait for the attention that is called now."""
    return _hand_over.state is not None


def attend_handed_over(query, attention_mask, scaling, softcap, sinks, position_ids):
    """Traced. What kvfs_attention returns first."""
    state, layer = _hand_over.state, _hand_over.layer
    keys, values = _hand_over.keys, _hand_over.values
    _hand_over.state = _hand_over.keys = _hand_over.values = None
    return torch.ops.kvfs.append_and_attend(
        query, keys, values, attention_mask, position_ids, sinks, state, layer, scaling, softcap
    )


@torch.library.custom_op("kvfs::append_and_attend", mutates_args=("state",))
def append_and_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: torch.Tensor,
    layer: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """As kvfs_attention, outside of any graph. state: see new_state."""
    from kvfs.engines.transformers_attention import attend_fresh

    cache = _caches[int(state[0])]
    if cache.config is None and not cache.is_initialized:
        raise UnsupportedModel(
            "a compiled model needs KvfsCache(store, name, model=model), or enable(model, store, session=...)"
        )
    cache.forget_masks()  # a graph may put the next step's mask where this one's was
    # What sdpa asks of the layer that it works for.
    module = SimpleNamespace(
        num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True, config=cache.config
    )
    options = {"softcap": softcap, "s_aux": sinks, "position_ids": position_ids}
    fresh = cache.fresh_tokens(layer, keys, values)
    return attend_fresh(module, query, fresh, attention_mask, scaling, options).contiguous()


@append_and_attend.register_fake
def _(query, keys, values, attention_mask, position_ids, sinks, state, layer, scaling, softcap):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
