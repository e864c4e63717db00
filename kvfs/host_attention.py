"""Attention over the tails, on the host, with the same kernels that the drive runs over pages."""

import numpy as np

from accel.merge import merge_units
from accel.page_plan import plan_units
from accel.workers import UnitRange
from kvfs.attention_scores import Scoring
from kvfs.layout import GroupLayout
from kvfs.tail import LayerTail

MAX_UNIT_PAGES = 1 << 20  # memory, unlike a cache, has no room to share: units are as long as they are


def _bias(scoring: Scoring) -> dict[str, np.ndarray]:
    if scoring.slopes is None:
        return {}
    return {"alibi_slopes": scoring.slopes, "query_position": scoring.positions}


def attend_tails(
    worker,
    layout: GroupLayout,
    tails: list[LayerTail],
    queries: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    scoring: Scoring,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) over the tokens that are not on flash, one tail per item.

    queries: float32 [num_items, num_queries, num_query_heads, head_dim]; starts, stops: int64
    [num_items, num_queries]. lse is -inf where a query sees nothing of the tail.
    """
    layout = layout.in_memory
    geometry, page_size = layout.geometry, layout.page_size
    num_items, num_queries = starts.shape
    spilled = np.array([tail.num_spilled for tail in tails], np.int64)
    images = [tail.image_addresses() for tail in tails]
    image_addresses = [address for _, addresses in images for address in addresses]
    num_images = [len(addresses) for _, addresses in images]
    plan = plan_units(
        np.maximum(starts.min(axis=1), spilled),
        np.minimum(stops.max(axis=1), [tail.num_tokens for tail in tails]),
        np.cumsum([0, *num_images[:-1]]),
        np.array([first_group for first_group, _ in images], np.int64),
        np.array(image_addresses, np.int64) // page_size,
        np.ones(len(image_addresses), np.int64),
        group_pages=layout.layer_lbas,
        layer_offset=0,
        num_kv_heads=geometry.num_kv_heads,
        pages_per_head=layout.pages_per_head,
        tokens_per_page=layout.tokens_per_page,
        group_tokens=geometry.group_tokens,
        max_unit_pages=MAX_UNIT_PAGES,
    )
    if not plan.num_units:
        lse = np.full((num_items, num_queries, queries.shape[2]), -np.inf, np.float32)
        return np.zeros(queries.shape, np.float32), lse
    addresses = (plan.lbas * page_size).view(np.uint64)
    batch = plan.batch(
        addresses,
        dtype=geometry.dtype,
        head_dim=geometry.head_dim,
        group_size=geometry.gqa_group_size,
        queries=queries,
        # rows of a page that lie before the tail are the drive's: the ranges leave them out
        visible_start=np.maximum(starts, spilled[:, None]),
        visible_stop=stops,
        scale=scoring.scale,
        softcap=scoring.softcap,
        **_bias(scoring),
    )
    group_size = geometry.gqa_group_size
    out = np.empty((plan.num_units, num_queries, group_size, geometry.head_dim), np.float32)
    lse = np.empty((plan.num_units, num_queries, group_size), np.float32)
    worker.attend_units(batch, UnitRange(0, plan.num_units), out, lse)
    return merge_units(out, lse, plan.unit_item, plan.unit_kv_head, num_items, geometry.num_kv_heads)
