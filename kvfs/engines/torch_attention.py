"""Attention over the new tokens, in torch, with the log-sum-exp that a merge with the stored past needs."""

import torch

# Scores kept at once, in float32 elements: 4 MiB, so that the passes over them stay in the CPU's caches. Long
# prompts go through in slices of queries, each over the tokens that one of its queries sees.
_SCORES_AT_ONCE = 1 << 20


def rounded(tensor, dtype):
    """What will come back from the store: `tensor` rounded to the torch dtype `dtype`, in its own dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype).to(tensor.dtype)


def attend_ranges(queries, keys, values, ranges, scale, softcap=None):
    """Attention of each query over its own range of the given tokens.

    queries: [num_sequences, num_query_heads, num_queries, head_dim], any float dtype
    keys, values: [num_sequences, num_kv_heads, num_tokens, head_dim]
    ranges: int64 [num_sequences, num_queries, 2], (start, stop) of the visible tokens; may be empty
    softcap: None, or scores become softcap * tanh(score / softcap)

    Returns out float32 [num_sequences, num_queries, num_query_heads, head_dim] and lse float32
    [num_sequences, num_queries, num_query_heads], natural log; 0 and -inf where nothing is visible.
    """
    num_sequences, num_query_heads, num_queries, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    keys = keys.float().unsqueeze(2).transpose(-1, -2)
    values = values.float().unsqueeze(2)
    out = torch.zeros(num_sequences, num_queries, num_query_heads, head_dim, device=queries.device)
    lse = torch.full(out.shape[:3], -torch.inf, device=queries.device)
    step = max(1, _SCORES_AT_ONCE // max(1, num_sequences * num_query_heads * keys.shape[-1]))
    for begin in range(0, num_queries, step):
        part = slice(begin, begin + step)
        first, last = int(ranges[:, part, 0].min()), int(ranges[:, part, 1].max())
        if first >= last:
            continue
        q = queries[:, :, part].float().mul(scale).unflatten(1, (num_kv_heads, -1))
        scores = q @ keys[..., first:last]
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(_hidden(ranges[:, part], first, last, queries.device), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        # A query without visible tokens: exp(-inf - 0) is 0, where exp(-inf - -inf) would be NaN.
        weights = scores.sub_(top.masked_fill(top.isneginf(), 0.0)).exp_()
        total = weights.sum(-1, keepdim=True)
        part_out = (weights @ values[:, :, :, first:last]).div_(total.clamp_min(torch.finfo(total.dtype).tiny))
        out[:, part] = part_out.flatten(1, 2).transpose(1, 2)
        lse[:, part] = (top + total.log()).squeeze(-1).flatten(1, 2).transpose(1, 2)
    return out, lse


def _hidden(ranges, first, last, device):
    """bool [num_sequences, 1, 1, num_queries, last - first]: True where a query does not see a token."""
    start, stop = torch.as_tensor(ranges, device=device)[:, None, None, :, :, None].unbind(-2)
    positions = torch.arange(first, last, device=device)
    return (positions < start) | (positions >= stop)


def with_sinks(out, lse, sinks):
    """Add a learned sink per query head (gpt-oss: a logit without a value) to a finished attention.

    sinks: [num_query_heads]; out and lse as in attend_ranges.
    """
    return out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
