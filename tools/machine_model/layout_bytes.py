"""Bytes that a decode step moves, page by page, from the layout code that the real drive and host run.

A unit is one KV head of one sequence: what is spread over drives. Flash is read in whole pages; what crosses a
link is the vendor command's own descriptor, queries and answer.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from kvfs.layout import GroupLayout, KvGeometry
from kvfs_bench.planner.formulas import derived_token_bytes, flash_pages, sketch_pages
from spdk_glue.derived_layout import DerivedLayout, groups_per_segment
from spdk_glue.vendor_command import (
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    DTYPE_OF_NAME,
    GROUP_EXTENT,
    Derive,
    answer_bytes,
)

# Of pages of 16 tokens, those that hold one of the S/16 tokens that SparF chooses for one query head: measured
# on the shipped model and source code by sparf_locality.py; tokens at random would be on 0.64.
SPARF_PAGES_TOUCHED = 0.345
SPARF_PAGE_TOKENS = 16  # of that figure


@dataclass(frozen=True)
class UnitPages:
    """What a step reads of one unit and layer. ordered: pages in runs, as they were written; scattered: single
    pages anywhere"""

    ordered: int
    scattered: int = 0

    @property
    def total(self) -> int:
        return self.ordered + self.scattered


@lru_cache(maxsize=4096)
def dense_pages(geometry: KvGeometry, num_tokens: int, page_size: int) -> UnitPages:
    """Of the tokens on flash: whole pages."""
    return UnitPages(flash_pages(GroupLayout(geometry, page_size), num_tokens) // geometry.num_kv_heads)


@lru_cache(maxsize=4096)
def sketched_pages(geometry: KvGeometry, num_tokens: int, page_size: int, compression: float) -> UnitPages:
    """Sealed groups by their sketches and chosen refinements, the rest dense."""
    found = sketch_pages(geometry, num_tokens, compression, page_size)
    rest = dense_pages(geometry, num_tokens % geometry.group_tokens, page_size).total
    return UnitPages(found.index + rest, found.refinement)


@lru_cache(maxsize=4096)
def sparf_pages(geometry: KvGeometry, num_tokens: int, page_size: int, compression: float) -> UnitPages:
    """SparF as published: r = head_dim / c channels, k = tokens / 2c tokens for each query head.

    Channel-major pages of r channels and the mean of V, of every segment; token-major pages of K and V that
    hold a chosen token; groups that are not sealed yet are read dense. Query heads that share a KV head read
    the union, as if each chose by itself.
    """
    tokens = num_tokens - num_tokens % geometry.group_tokens
    group = geometry.gqa_group_size
    layout = GroupLayout(geometry, page_size)
    channels = _union(1 / compression, group) * geometry.head_dim
    index = 0
    of_segment = _segment_tokens(geometry, Derive.CHANNEL_MAJOR_KEYS, page_size)
    for first in range(0, tokens, of_segment):
        part = _derived(geometry, Derive.CHANNEL_MAJOR_KEYS, page_size, min(of_segment, tokens - first))
        pages_per_channel = (part.index_pages - 1) // geometry.head_dim
        index += math.ceil(channels) * pages_per_channel + 1
    touched = _union(pages_touched(layout.tokens_per_page, 1 / (2 * compression)), group)
    chosen = 2 * math.ceil(touched * -(-tokens // layout.tokens_per_page))
    dense = dense_pages(geometry, tokens, page_size).total
    rest = dense_pages(geometry, num_tokens % geometry.group_tokens, page_size).total
    return UnitPages(index + rest, min(chosen, dense))


@lru_cache(maxsize=4096)
def sparf_ideal_pages(geometry: KvGeometry, num_tokens: int, page_size: int, compression: float) -> UnitPages:
    """As if flash were read by the element: 1 / compression of the dense bytes."""
    dense = dense_pages(geometry, num_tokens, page_size).total
    return UnitPages(math.ceil(dense / compression))


def pages_touched(page_tokens: int, share: float) -> float:
    """Share of pages that hold one of a share of the tokens. Chosen tokens lie in clusters: as if a page had
    fewer tokens than it has, chosen at random, which the measured figure tells."""
    clusters = math.log(1 - SPARF_PAGES_TOUCHED) / math.log(1 - 1 / 16) / SPARF_PAGE_TOKENS
    return 1 - (1 - share) ** (clusters * page_tokens)


def _union(share: float, group_size: int) -> float:
    return 1 - (1 - share) ** group_size


@lru_cache(maxsize=64)
def _segment_tokens(geometry: KvGeometry, derive: Derive, page_size: int) -> int:
    dtype = DTYPE_OF_NAME[geometry.dtype]
    return geometry.group_tokens * groups_per_segment(
        derive, page_size, geometry.head_dim, dtype, geometry.group_tokens
    )


@lru_cache(maxsize=1024)
def _derived(geometry: KvGeometry, derive: Derive, page_size: int, num_tokens: int) -> DerivedLayout:
    dtype = DTYPE_OF_NAME[geometry.dtype]
    return DerivedLayout(derive, page_size, 1, 1, geometry.head_dim, dtype, num_tokens)


def stored_token_bytes(geometry: KvGeometry, page_size: int, derive: Derive | None = None) -> float:
    """On flash, all layers, slack of pages included; with what is derived from K and V beside them."""
    layout = GroupLayout(geometry, page_size)
    found = layout.group_lbas * page_size / geometry.group_tokens
    return found if derive is None else found + derived_token_bytes(geometry, derive, page_size)


@dataclass(frozen=True)
class CommandBytes:
    """Of one attention command over the link."""

    submit: int  # descriptor and queries
    answer: int


def command_bytes(geometry: KvGeometry, num_units: float, num_tokens: int) -> CommandBytes:
    """num_units: of one drive. An item is a sequence with all its heads on this drive; its groups are one
    extent for each that the drive wrote, at most one a group."""
    items = max(1, math.ceil(num_units / geometry.num_kv_heads))
    heads = max(1, math.ceil(num_units / items)) * geometry.gqa_group_size
    extents = items * max(1, num_tokens // geometry.group_tokens)
    submit = ATTENTION_HEADER.itemsize + items * ATTENTION_ITEM.itemsize + extents * GROUP_EXTENT.itemsize
    submit += items * heads * geometry.head_dim * geometry.numpy_dtype.itemsize
    return CommandBytes(submit, answer_bytes(items, 1, heads, geometry.head_dim))
