"""What SparF reads: channels by |q|, tokens by approximate scores; and the mean of V for the rest.

All arrays are of one (item, KV head); num_rows = num_queries * group_size.
"""

import numpy as np


def choose_channels(queries: np.ndarray, num_channels: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The `num_channels` channels largest in |q|, for each row.

    queries: float32 [num_rows, head_dim]
    Returns (channels int64 [num_union], ascending: those of any row; weights float32 [num_rows, num_union]:
    what a row's approximate score multiplies channels with, zero for the channels of other rows only).
    Weights are scale * sqrt(|q|_1 / |q_chosen|_1) * q, which is q / tau with the usual scale of 1 /
    sqrt(head_dim).
    """
    head_dim = queries.shape[1]
    num_channels = min(num_channels, head_dim)
    size = np.abs(queries.astype(np.float64))
    chosen = np.argsort(-size, axis=1, kind="stable")[:, :num_channels]
    is_chosen = np.zeros(size.shape, bool)
    np.put_along_axis(is_chosen, chosen, True, axis=1)
    part = (size * is_chosen).sum(axis=1)
    ratio = np.where(part > 0, size.sum(axis=1) / np.where(part > 0, part, 1), 1)
    weights = queries * is_chosen * (scale * np.sqrt(ratio))[:, None]
    channels = np.flatnonzero(is_chosen.any(axis=0))
    return channels, np.ascontiguousarray(weights[:, channels], np.float32)


def choose_tokens(scores: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The `num_tokens` tokens of the largest scores, for each row; all rows attend to the tokens of any.

    scores: float32 [num_rows, total_tokens], -inf where a row does not see a token
    Returns (chosen bool [total_tokens], alpha float64 [num_rows]: the softmax of `scores` on the chosen
    tokens; 1 for a row that sees none).
    """
    total = scores.shape[1]
    num_tokens = min(num_tokens, total)
    top = scores.max(axis=1, initial=-np.inf, keepdims=True)
    top[np.isneginf(top)] = 0
    chosen = np.zeros(total, bool)
    if 0 < num_tokens < total:
        best = np.argpartition(scores, total - num_tokens, axis=1)[:, total - num_tokens :]
        seen = np.isfinite(np.take_along_axis(scores, best, axis=1))
        chosen[best[seen]] = True
    elif num_tokens:
        chosen[:] = np.isfinite(scores).any(axis=0)
    weights = np.exp(scores.astype(np.float64) - top)
    mass = weights.sum(axis=1)
    alpha = weights[:, chosen].sum(axis=1) / np.where(mass > 0, mass, 1)
    return chosen, np.where(mass > 0, alpha, 1.0)


def join_mean(out: np.ndarray, lse: np.ndarray, alpha: np.ndarray, mean: np.ndarray):
    """(out, lse) with the mean of V standing for the tokens that were not read.

    out: float32 [num_rows, head_dim], lse: float32 [num_rows] of the chosen tokens; alpha: float64 [num_rows];
    mean: float32 [head_dim]. The lse returned is that of all tokens, by the approximate scores, so that the
    result merges with dense parts. Rows that see nothing stay as they are.
    """
    alpha = np.clip(alpha, 1e-30, 1.0)
    joined = alpha[:, None] * out + (1 - alpha)[:, None] * mean
    seen = ~np.isneginf(lse)
    return (
        np.where(seen[:, None], joined, out).astype(np.float32),
        np.where(seen, lse - np.log(alpha), lse).astype(np.float32),
    )
