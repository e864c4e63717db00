"""Merging partial attention by log-sum-exp. Source: online softmax, arXiv:1805.02867; FlashDecoding."""

import numpy as np
from numba import njit


class ShapeMismatch(ValueError):
    """Two partial results that do not belong to the same queries."""


@njit(nogil=True, cache=True)
def _merge_pairs(out_a, lse_a, out_b, lse_b, out, lse):
    for row in range(len(lse)):
        # an empty part leaves the other as it is, NaN included
        if lse_b[row] == -np.inf:
            lse[row] = lse_a[row]
            out[row, :] = out_a[row, :]
            continue
        if lse_a[row] == -np.inf:
            lse[row] = lse_b[row]
            out[row, :] = out_b[row, :]
            continue
        top = max(lse_a[row], lse_b[row])
        weight_a = np.exp(lse_a[row] - top)
        weight_b = np.exp(lse_b[row] - top)
        total = weight_a + weight_b
        lse[row] = top + np.log(total)
        weight_a /= total
        weight_b /= total
        for column in range(out.shape[1]):
            out[row, column] = weight_a * out_a[row, column] + weight_b * out_b[row, column]


def merge_states(out_a, lse_a, out_b, lse_b) -> tuple[np.ndarray, np.ndarray]:
    """Combine attention over two disjoint parts of the tokens.

    out: float32 [..., head_dim]; lse: float32 [...], natural log, -inf (and out zero) for an empty part.
    Returns (out, lse) of the same shapes; both parts empty gives zero and -inf. Raises ShapeMismatch.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ShapeMismatch(
            f"out {out_a.shape} and {out_b.shape}, lse {lse_a.shape} and {lse_b.shape} do not belong together"
        )
    head_dim = out_a.shape[-1]
    out, lse = np.empty(out_a.shape, np.float32), np.empty(lse_a.shape, np.float32)
    _merge_pairs(
        np.ascontiguousarray(out_a).reshape(-1, head_dim),
        np.ascontiguousarray(lse_a).reshape(-1),
        np.ascontiguousarray(out_b).reshape(-1, head_dim),
        np.ascontiguousarray(lse_b).reshape(-1),
        out.reshape(-1, head_dim),
        lse.reshape(-1),
    )
    return out, lse


@njit(nogil=True, cache=True)
def _merge_units(unit_out, unit_lse, unit_item, unit_kv_head, out, lse):
    """False, with nothing merged, where a unit's item or head does not exist."""
    num_units, num_queries, group_size, head_dim = unit_out.shape
    for unit in range(num_units):
        if not (0 <= unit_item[unit] < out.shape[0] and 0 <= unit_kv_head[unit] * group_size < out.shape[2]):
            return False
    lse[:] = -np.inf
    for unit in range(num_units):
        for query in range(num_queries):
            for member in range(group_size):
                head = unit_kv_head[unit] * group_size + member
                value = unit_lse[unit, query, member]
                # NaN must win, so that it is not lost
                if not value <= lse[unit_item[unit], query, head]:
                    lse[unit_item[unit], query, head] = value
    total = np.zeros(lse.shape, np.float64)
    out[:] = 0
    for unit in range(num_units):
        item = unit_item[unit]
        for query in range(num_queries):
            for member in range(group_size):
                if unit_lse[unit, query, member] == -np.inf:
                    continue
                head = unit_kv_head[unit] * group_size + member
                weight = np.exp(unit_lse[unit, query, member] - lse[item, query, head])
                total[item, query, head] += weight
                for column in range(head_dim):
                    out[item, query, head, column] += weight * unit_out[unit, query, member, column]
    for item in range(out.shape[0]):
        for query in range(num_queries):
            for head in range(out.shape[2]):
                if total[item, query, head] != 0:
                    inverse = np.float32(1.0 / total[item, query, head])
                    lse[item, query, head] += np.log(total[item, query, head])
                    for column in range(head_dim):
                        out[item, query, head, column] *= inverse
    return True


def merge_units(
    out: np.ndarray,
    lse: np.ndarray,
    unit_item: np.ndarray,
    unit_kv_head: np.ndarray,
    num_items: int,
    num_kv_heads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Combine all units of the same item and KV head.

    out: float32 [num_units, num_queries, group_size, head_dim]; lse: float32 [num_units, num_queries,
    group_size], natural log; unit_item, unit_kv_head: int32 [num_units]. Does not hold the GIL.
    Returns out float32 [num_items, num_queries, num_query_heads, head_dim] and lse float32 [num_items,
    num_queries, num_query_heads]; zero and -inf where no unit saw a token. A unit whose lse is NaN makes
    its heads NaN. Raises ShapeMismatch.
    """
    _, num_queries, group_size, head_dim = out.shape
    shape = (num_items, num_queries, num_kv_heads * group_size)
    merged, merged_lse = np.empty((*shape, head_dim), np.float32), np.empty(shape, np.float32)
    merge_units_into(out, lse, unit_item, unit_kv_head, merged, merged_lse)
    return merged, merged_lse


def merge_units_into(
    out: np.ndarray,
    lse: np.ndarray,
    unit_item: np.ndarray,
    unit_kv_head: np.ndarray,
    merged: np.ndarray,
    merged_lse: np.ndarray,
) -> None:
    """As merge_units, into arrays of the caller's."""
    if lse.shape != out.shape[:-1] or not len(out) == len(unit_item) == len(unit_kv_head):
        raise ShapeMismatch(
            f"out {out.shape}, lse {lse.shape}, {len(unit_item)} items, {len(unit_kv_head)} KV heads of units"
        )
    if not _merge_units(out, lse, unit_item, unit_kv_head, merged, merged_lse):
        num_items, _, num_heads = merged_lse.shape
        raise ShapeMismatch(
            f"a unit's item or KV head is outside {num_items} items and {num_heads // out.shape[2]} heads"
        )
