"""The definition of SparF for one (item, KV head): all of its steps over arrays, in plain NumPy."""

import numpy as np


def sparf(queries, keys, values, num_channels: int, num_tokens: int, scale: float, start=None, stop=None):
    """(out float64 [num_rows, head_dim], lse float64 [num_rows]), as join_mean gives them.

    queries: [num_rows, head_dim]; keys, values: [total_tokens, head_dim]; start, stop: int64 [num_rows], what
    a row sees
    Rows are those of one KV head: they share the channels and tokens that are read, not the scores' channels.
    Source: arXiv:2409.04992; tau as in SparQ, arXiv:2312.04985.
    """
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    num_rows, head_dim = queries.shape
    total = len(keys)
    positions = np.arange(total)
    start = np.zeros(num_rows, int) if start is None else start
    stop = np.full(num_rows, total) if stop is None else stop
    seen = (positions >= start[:, None]) & (positions < stop[:, None])
    weights = np.zeros((num_rows, total))
    chosen = np.zeros(total, bool)
    for row, query in enumerate(queries):
        channels = np.argsort(-np.abs(query), kind="stable")[:num_channels]
        ratio = np.abs(query).sum() / np.abs(query[channels]).sum() if query.any() else 1.0
        scores = scale * np.sqrt(ratio) * keys[:, channels] @ query[channels]
        scores[~seen[row]] = -np.inf
        if seen[row].any():
            weights[row] = np.exp(scores - scores.max())
            weights[row] /= weights[row].sum()
        best = np.argsort(-scores, kind="stable")[:num_tokens]
        chosen[best[seen[row, best]]] = True
    out, lse = np.zeros((num_rows, head_dim)), np.full(num_rows, -np.inf)
    for row, query in enumerate(queries):
        tokens = chosen & seen[row]
        if not tokens.any():
            continue
        scores = scale * keys[tokens] @ query
        exact = np.exp(scores - scores.max())
        alpha = weights[row, chosen].sum()
        out[row] = alpha * (exact @ values[tokens] / exact.sum()) + (1 - alpha) * values.mean(axis=0)
        lse[row] = scores.max() + np.log(exact.sum()) - np.log(alpha)
    return out, lse
