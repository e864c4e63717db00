"""Attention over the tails, on the host, with the same kernels that the drive runs over pages."""

import numpy as np

from accel.merge import merge_units
from accel.workers import AttentionBatch
from kvfs.layout import GroupLayout
from kvfs.tail import LayerTail
from spdk_glue import dma


def attend_tails(
    worker,
    layout: GroupLayout,
    tails: list[LayerTail],
    queries: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) over the tokens that are not on flash, one tail per item.

    queries: float32 [num_items, num_queries, num_query_heads, head_dim]; starts, stops: int64
    [num_items, num_queries]. lse is -inf where a query sees nothing of the tail.
    """
    num_heads = layout.geometry.num_kv_heads
    group_tokens, per_page = layout.geometry.group_tokens, layout.tokens_per_page
    keys, values, firsts, counts, unit_first_page, unit_item = [], [], [], [], [0], []
    for item, tail in enumerate(tails):
        start = max(tail.num_spilled, int(starts[item].min()))
        stop = min(tail.num_tokens, int(stops[item].max()))
        if start >= stop:
            continue
        spans = []
        for group in range(start // group_tokens, (stop - 1) // group_tokens + 1):
            origin = group * group_tokens
            first = max(start - origin, 0) // per_page
            last = (min(stop - origin, group_tokens) - 1) // per_page
            pages = np.arange(first, last + 1)
            addresses = dma.address_of(tail.images[group]) + layout.page_size * pages
            row = origin + pages * per_page
            spans.append((addresses, row, np.minimum(per_page, min(origin + group_tokens, stop) - row)))
        address, first_token, count = (np.concatenate(column) for column in zip(*spans, strict=True))
        plane = layout.pages_per_head * layout.page_size
        for head in range(num_heads):
            keys.append(address + 2 * head * plane)
            values.append(address + (2 * head + 1) * plane)
            firsts.append(first_token)
            counts.append(count)
            unit_first_page.append(unit_first_page[-1] + len(address))
            unit_item.append(item)
    num_items, num_queries = starts.shape
    if not unit_item:
        lse = np.full((num_items, num_queries, queries.shape[2]), -np.inf, np.float32)
        return np.zeros(queries.shape, np.float32), lse
    # rows of a page that lie before `start` belong to the drive's part: the ranges leave them out
    spilled = np.array([tail.num_spilled for tail in tails], np.int64)[:, None]
    num_units = len(unit_item)
    batch = AttentionBatch(
        dtype=layout.geometry.dtype,
        head_dim=layout.geometry.head_dim,
        group_size=layout.geometry.gqa_group_size,
        key_pages=np.concatenate(keys).astype(np.uint64),
        value_pages=np.concatenate(values).astype(np.uint64),
        page_first_token=np.concatenate(firsts).astype(np.int64),
        page_num_tokens=np.concatenate(counts).astype(np.int32),
        unit_first_page=np.array(unit_first_page, np.int64),
        unit_item=np.array(unit_item, np.int32),
        unit_kv_head=np.tile(np.arange(num_heads, dtype=np.int32), num_units // num_heads),
        queries=queries,
        visible_start=np.maximum(starts, spilled),
        visible_stop=stops,
        scale=scale,
    )
    group_size = layout.geometry.gqa_group_size
    out = np.empty((num_units, num_queries, group_size, layout.geometry.head_dim), np.float32)
    lse = np.empty((num_units, num_queries, group_size), np.float32)
    worker.attend_units(batch, 0, num_units, out, lse)
    return merge_units(out, lse, batch.unit_item, batch.unit_kv_head, num_items, num_heads)
