"""The formulas of the planner: arithmetic over bytes. Those of X-cache: kvfs.engines.x_cache.share."""

import math
from dataclasses import dataclass

from kvfs.layout import GroupLayout, KvGeometry
from spdk_glue.derived_layout import DerivedLayout, groups_per_segment
from spdk_glue.vendor_command import DTYPE_OF_NAME, Derive

COMPRESSIONS = tuple(range(1, 10))
BUDGET_OF_DENSE = 4 / 3  # page budget of compression 1; at compression 8 it is 1/6 of the dense page bytes
PROBATION_SHARE = 16  # of a drive's cache, one slot in so many keeps nothing (accel/page_cache.py)
WRITEBACK_ITEM_BYTES = 2


def page_writeback_tokens(page_size: int, head_dim: int) -> int:
    """INF2's c: tokens of one head that fill a page: 16 at 4 KiB and head_dim 128."""
    return max(1, page_size // (WRITEBACK_ITEM_BYTES * head_dim))


@dataclass(frozen=True)
class LinkBytes:
    """What crosses the link in one decode step."""

    attention: int  # on the drive: q, k, v there, the output back
    offload: int  # all of K and V to the host instead


def link_bytes(geometry: KvGeometry, batch: int, num_tokens: int) -> LinkBytes:
    """Rows in the model's own dtype; outputs come back as float32 with their lse."""
    item = geometry.numpy_dtype.itemsize
    queries = geometry.num_query_heads * geometry.head_dim * item
    rows = 2 * geometry.num_kv_heads * geometry.head_dim * item
    answer = 4 * geometry.num_query_heads * (geometry.head_dim + 1)
    of_layer = batch * (queries + rows + answer)
    return LinkBytes(geometry.num_layers * of_layer, batch * num_tokens * geometry.token_bytes)


def flash_pages(layout: GroupLayout, num_tokens: int) -> int:
    """Pages of K and V of one sequence and layer that a dense command over its whole groups and the whole pages
    behind them reads."""
    groups, rest = divmod(num_tokens, layout.geometry.group_tokens)
    rest_pages = rest // layout.tokens_per_page
    return layout.geometry.num_kv_heads * 2 * (groups * layout.pages_per_head + rest_pages)


def tail_tokens(geometry: KvGeometry, num_tokens: int, writeback_tokens: int) -> int:
    """Tokens that wait in host memory once num_tokens are there."""
    return num_tokens % min(writeback_tokens, geometry.group_tokens)


def cached_bytes(kv_bytes: int, cache_bytes: int, pinned_bytes: int) -> int:
    """Of a loop over kv_bytes those that a cache keeps from one round to the next.

    pinned_bytes: at once, by one command. A line that is missed passes through probation, a sixteenth of the
    cache or as much as is pinned.
    """
    if kv_bytes <= cache_bytes:
        return kv_bytes
    probation = max(cache_bytes // PROBATION_SHARE, min(pinned_bytes, 2 * cache_bytes // 3))
    return max(0, cache_bytes - probation)


@dataclass(frozen=True)
class SketchPages:
    """What a compressed step reads of one sequence, layer and KV head."""

    index: int  # read in order, for all tokens
    refinement: int  # of the chosen units, one by one
    all_refinement: int  # of which other steps choose others
    dense: int

    @property
    def share(self) -> float:
        """Of the dense page bytes."""
        return (self.index + self.refinement) / self.dense


def sketch_pages(geometry: KvGeometry, num_tokens: int, compression: float, page_size: int) -> SketchPages:
    """At a page budget of 4/(3c) of the dense pages; all index pages are read whatever the budget."""
    tokens = num_tokens - num_tokens % geometry.group_tokens
    of_segment = _segment_tokens(geometry, Derive.SKETCH, page_size)
    index = refinement = 0
    for first in range(0, tokens, of_segment):
        layout = _layout(geometry, Derive.SKETCH, page_size, min(of_segment, tokens - first))
        index += layout.index_pages
        refinement += layout.refinement_pages
    dense = 2 * (tokens // geometry.group_tokens) * GroupLayout(geometry, page_size).pages_per_head
    budget = BUDGET_OF_DENSE / compression * dense
    fraction = min(1.0, max(0.0, (budget - index) / refinement)) if refinement else 0.0
    return SketchPages(index, math.ceil(fraction * refinement), refinement, dense)


def derived_token_bytes(geometry: KvGeometry, derive: Derive, page_size: int) -> float:
    """What a whole segment takes on flash for each of its tokens, all layers and heads."""
    tokens = _segment_tokens(geometry, derive, page_size)
    pages = _layout(geometry, derive, page_size, tokens).num_lbas
    return geometry.num_layers * geometry.num_kv_heads * pages * page_size / tokens


def _segment_tokens(geometry: KvGeometry, derive: Derive, page_size: int) -> int:
    dtype = DTYPE_OF_NAME[geometry.dtype]
    return geometry.group_tokens * groups_per_segment(
        derive, page_size, geometry.head_dim, dtype, geometry.group_tokens
    )


def _layout(geometry: KvGeometry, derive: Derive, page_size: int, num_tokens: int) -> DerivedLayout:
    """Of one layer and head."""
    dtype = DTYPE_OF_NAME[geometry.dtype]
    return DerivedLayout(derive, page_size, 1, 1, geometry.head_dim, dtype, num_tokens)
