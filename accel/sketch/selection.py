"""Which units are worth their refinement pages.

All arrays are of the units of one (item, KV head), with num_rows = num_queries * group_size.
"""

import numpy as np

# Of a run, whose units are chosen together: their pages are one request. With head_dim 128 and runs of 128
# tokens reading what is chosen from 32,768 took 7 ms instead of 15, but of a model's next tokens behind 8,192
# only 95.3% were those of dense attention, with runs of 64 97.7%.
RUN_TOKENS = 64


def run_of(unit_tokens: int) -> int:
    """Units that are chosen together, where a compression says how many are."""
    return max(1, RUN_TOKENS // unit_tokens)


def units_within(compression: float, dense_pages: int, index_pages: int, refinement_pages: int) -> int:
    """Units whose refinement pages may be read at a compression.

    Its page budget is 4 / (3 * compression) of the dense pages that the sketches stand for, index pages
    included. Returns 0 to refinement_pages.
    """
    budget = int(4 * dense_pages / (3 * compression)) - index_pages
    return min(max(budget, 0), refinement_pages)


def shares(lse: np.ndarray, other_lse: np.ndarray | None = None) -> np.ndarray:
    """float64 [..., num_units, num_rows]: a unit's part of a row's softmax.

    lse: float32 [..., num_units, num_rows]; other_lse: float32 [..., num_rows], of tokens that are read in any
    case. A row that sees nothing has shares of zero.
    """
    lse = np.asarray(lse, np.float64)
    top = lse.max(axis=-2, keepdims=True, initial=-np.inf)
    if other_lse is not None:
        other = np.asarray(other_lse, np.float64)[..., None, :]
        top = np.maximum(top, other)
    top[np.isneginf(top)] = 0
    weights = np.exp(lse - top)
    total = weights.sum(axis=-2, keepdims=True)
    if other_lse is not None:
        total += np.exp(other - top)
    weights /= np.where(total > 0, total, 1)
    return weights


def choose_units(
    lse: np.ndarray, num_chosen: int, other_lse: np.ndarray | None = None, run: int = 1
) -> np.ndarray:
    """int64 [..., num_chosen], ascending: the units of the largest shares, summed over rows. See `shares`.

    run: neighbours are chosen together, so many, as far as num_chosen has room for them: their pages are one
    request.
    """
    rank = shares(lse, other_lse).sum(axis=-1)
    num_units = rank.shape[-1]
    num_chosen = min(max(num_chosen, 0), num_units)
    if run > 1 and run <= num_chosen < num_units:
        # units of the best runs before all others
        padded = np.zeros((*rank.shape[:-1], -(-num_units // run) * run))
        padded[..., :num_units] = rank
        of_run = padded.reshape(*rank.shape[:-1], -1, run).sum(axis=-1)
        best = _largest(of_run, num_chosen // run)
        np.put_along_axis(of_run, best, np.inf, axis=-1)
        first = np.repeat(np.isinf(of_run), run, axis=-1)[..., :num_units]
        rank = np.where(first, rank + 1 + rank.shape[-1], rank)
    return np.sort(_largest(rank, num_chosen), axis=-1)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """int64 [..., count]: places of the largest along the last axis."""
    if count == 0:
        return np.empty((*values.shape[:-1], 0), np.int64)
    return np.argpartition(-values, count - 1, axis=-1)[..., :count].astype(np.int64)
