"""Attention over the new tokens, in torch, with the log-sum-exp that a merge with the stored past needs."""

import torch

# Scores kept at once, in float32 elements: 32 MiB. Long prefills go through in slices of queries.
_SCORES_AT_ONCE = 8 << 20


def rounded(tensor, dtype):
    """What will come back from the store: `tensor` rounded to the torch dtype `dtype`, in its own dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype).to(tensor.dtype)


def attend_ranges(queries, keys, values, ranges, scale):
    """Attention of each query over its own range of the given tokens.

    queries: [num_sequences, num_query_heads, num_queries, head_dim], any float dtype
    keys, values: [num_sequences, num_kv_heads, num_tokens, head_dim]
    ranges: int64 [num_sequences, num_queries, 2], (start, stop) of the visible tokens; may be empty

    Returns out float32 [num_sequences, num_queries, num_query_heads, head_dim] and lse float32
    [num_sequences, num_queries, num_query_heads], natural log; 0 and -inf where nothing is visible.
    """
    num_sequences, num_query_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    group = num_query_heads // num_kv_heads
    keys = keys.float().unsqueeze(2).transpose(-1, -2)
    values = values.float().unsqueeze(2)
    ranges = torch.as_tensor(ranges, device=queries.device)[:, None, None]
    positions = torch.arange(num_tokens, device=queries.device)
    out = torch.empty(num_sequences, num_queries, num_query_heads, head_dim, device=queries.device)
    lse = torch.empty(num_sequences, num_queries, num_query_heads, device=queries.device)
    step = max(1, _SCORES_AT_ONCE // max(1, num_sequences * num_query_heads * num_tokens))
    for begin in range(0, num_queries, step):
        part = slice(begin, begin + step)
        q = queries[:, :, part].float().unflatten(1, (num_kv_heads, group))
        start, stop = ranges[:, :, :, part, 0, None], ranges[:, :, :, part, 1, None]
        scores = (q @ keys).mul_(scale).masked_fill_((positions < start) | (positions >= stop), -torch.inf)
        part_lse = scores.logsumexp(-1, keepdim=True)
        # A query without visible tokens: exp(-inf - 0) is 0, where exp(-inf - -inf) would be NaN.
        weights = (scores - part_lse.masked_fill(part_lse.isneginf(), 0.0)).exp_()
        out[:, part] = (weights @ values).flatten(1, 2).transpose(1, 2)
        lse[:, part] = part_lse.squeeze(-1).flatten(1, 2).transpose(1, 2)
    return out, lse


def with_sinks(out, lse, sinks):
    """Add a learned sink per query head (gpt-oss: a logit without a value) to a finished attention.

    sinks: [num_query_heads]; out and lse as in attend_ranges.
    """
    return out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
