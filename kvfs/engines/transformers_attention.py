"""The attention function behind `KvfsCache`, and its registration with Transformers.

Three cases, by what is in the store before the new tokens:

- nothing: prefill. Attention over the new tokens stays in torch, on K/V rounded as the store rounds them, so
  that the result equals attention over what is stored.
- something, and one new token: decode. The whole attention is one vendor command per layer to the drive.
- something, and several new tokens: a continued prompt, a chunk of a prefill, candidates to verify. The past
  goes to the drive, the new tokens' part is computed here, and both are merged by their log-sum-exp.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accel.merge import merge_states
from kvfs.engines.compiled_attention import attend_handed_over, was_handed_over
from kvfs.engines.errors import UnsupportedMask, UnsupportedModel
from kvfs.engines.fresh_tokens import StandIn
from kvfs.engines.host_arrays import host_array
from kvfs.engines.torch_attention import attend_ranges, rounded, with_sinks
from kvfs.engines.visibility import causal_ranges, ranges_of_mask

# Queries of one command: bounds the memory of a long prompt's continuation; each command reads the past once.
QUERIES_PER_COMMAND = 1024


def kvfs_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of a model whose cache is a KvfsCache, in the shapes of Transformers' attention interface.

    query: [num_sequences, num_query_heads, num_queries, head_dim]; key, value: stand-ins from KvfsCache.update

    Returns (out [num_sequences, num_queries, num_query_heads, head_dim] in the query's dtype, None).
    Raises UnsupportedModel or UnsupportedMask, with the reason, for everything that it would get wrong.
    """
    _check_supported(module, query, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        options = (kwargs.get(name) for name in ("softcap", "s_aux", "position_ids"))
        return attend_handed_over(query, attention_mask, scaling, *options), None
    fresh = key.fresh
    if fresh is None or type(value) is not StandIn:
        raise UnsupportedModel(
            f"{type(module).__name__} rearranges the keys and values that its cache returned"
        )
    return attend_fresh(module, query, fresh, attention_mask, scaling, kwargs), None


def attend_fresh(module, query, fresh, attention_mask, scaling, kwargs):
    """Append a layer's fresh tokens and attend; returns what kvfs_attention does first."""
    _check_new_positions(fresh, attention_mask, kwargs.get("position_ids"))
    fresh.cache.append(fresh, module, query)
    out = _attend(module, query, fresh, attention_mask, scaling, kwargs)
    fresh.cache.attended(fresh)
    return out


def _is_ours(key):
    return was_handed_over() if torch.compiler.is_compiling() else type(key) is StandIn


def _attend(module, query, fresh, attention_mask, scaling, kwargs):
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    if fresh.num_past == 0 and sinks is None and softcap is None:
        return _prefill(module, query, fresh, attention_mask, scaling, kwargs)
    if fresh.num_past and query.shape[2] == 1:
        out, lse = _decode(query, fresh, attention_mask, scaling, softcap)
    else:
        out, lse = _continue(query, fresh, attention_mask, scaling, softcap)
    if sinks is not None:
        out = with_sinks(out, lse, sinks)
    return out.to(query.dtype)


def _prefill(module, query, fresh, attention_mask, scaling, kwargs):
    keys, values = (rounded(tensor, fresh.cache.torch_dtype) for tensor in (fresh.keys, fresh.values))
    return sdpa_attention_forward(module, query, keys, values, attention_mask, scaling=scaling, **kwargs)[0]


def _decode(query, fresh, attention_mask, scaling, softcap):
    """One query per sequence over all its stored tokens, the new one included."""
    ranges = None
    if attention_mask is not None:
        ranges = fresh.cache.mask_ranges(attention_mask, query.shape[0], 1, fresh.num_past)
    return fresh.cache.attend_stored(query, fresh, scaling, softcap, ranges)


def _continue(query, fresh, attention_mask, scaling, softcap):
    """Several queries per sequence: the stored past on the drive, the new tokens here."""
    num_sequences, _, num_queries, _ = query.shape
    past = fresh.num_past
    if attention_mask is None:
        ranges = causal_ranges(num_sequences, num_queries, past)
    else:
        ranges = fresh.cache.mask_ranges(attention_mask, num_sequences, num_queries, past)
    keys, values = (rounded(tensor, fresh.cache.torch_dtype) for tensor in (fresh.keys, fresh.values))
    out, lse = attend_ranges(query, keys, values, (ranges - past).clip(min=0), scaling, softcap)
    if not past:
        return out, lse
    stored = [
        fresh.cache.attend_stored(query[:, :, part], fresh, scaling, softcap, ranges[:, part].clip(max=past))
        for part in _slices(num_queries, QUERIES_PER_COMMAND)
    ]
    stored_out, stored_lse = (torch.cat(column, dim=1) for column in zip(*stored, strict=True))
    return _merged(out, lse, stored_out, stored_lse)


def _slices(length, step):
    return [slice(begin, begin + step) for begin in range(0, length, step)]


def _merged(out, lse, stored_out, stored_lse):
    """accel's merge, on the host; tensors on the device of `out`."""
    arrays = (host_array(tensor) for tensor in (out, lse, stored_out, stored_lse))
    return tuple(torch.from_numpy(array).to(out.device) for array in merge_states(*arrays))


def _check_supported(module, query, dropout, kwargs):
    name = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{name}: a position bias in the attention scores is not supported by kvfs")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModel(f"{name}: attention that is not causal is not supported by kvfs")
    if dropout or (query.requires_grad and torch.is_grad_enabled()):
        raise UnsupportedModel(
            f"{name}: kvfs is for inference: call model.eval(), and the model inside torch.no_grad()"
        )


def _check_new_positions(fresh, attention_mask, position_ids):
    """Refuse tokens that the model itself places among the stored ones.

    `generate` with ids that are all stored already passes every one of them again; without a mask nothing else
    would tell.
    """
    if attention_mask is not None or position_ids is None or not fresh.num_past or fresh.layer:
        return
    last = fresh.num_past + fresh.keys.shape[2] - 1
    if position_ids.ndim == 2 and int(position_ids[0, -1]) < last:
        raise UnsupportedMask(
            f"new tokens at positions up to {int(position_ids[0, -1])}, but {fresh.num_past} tokens are "
            f"stored, so that they go up to {last}: pass the ids of the whole sequence (stored and new) to "
            "generate, without assisted decoding, or crop() the cache first"
        )


def sdpa_or_kvfs_attention(module, query, key, value, attention_mask, *args, **kwargs):
    """Registered as "sdpa": ours for K/V of a KvfsCache, Transformers' own, untouched, for all others."""
    if _is_ours(key):
        return kvfs_attention(module, query, key, value, attention_mask, *args, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def kvfs_or_sdpa_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Registered as "kvfs", for models whose default is eager; without a KvfsCache it is sdpa, or in float32
    what sdpa has not: soft caps and sinks."""
    if _is_ours(key):
        return kvfs_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    if sinks is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _check_supported(module, query, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_sequences, _, num_queries, _ = query.shape
    num_past = key.shape[2] - num_queries
    if attention_mask is None:
        ranges = causal_ranges(num_sequences, num_queries, num_past)
    else:
        ranges = ranges_of_mask(attention_mask, num_sequences, num_queries, num_past)
    out, lse = attend_ranges(query, key, value, ranges, scaling, softcap)
    return (out if sinks is None else with_sinks(out, lse, sinks)).to(query.dtype), None


def register():
    """Make Transformers use the above; idempotent. Masks are sdpa's: bool, or None for plain causality."""
    AttentionInterface.register("kvfs", kvfs_or_sdpa_attention)
    AttentionMaskInterface.register("kvfs", sdpa_mask)
    AttentionInterface.register("sdpa", sdpa_or_kvfs_attention)
