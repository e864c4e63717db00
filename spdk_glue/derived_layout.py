"""Where derived data of sealed token groups lies: arithmetic that host and drive share.

A segment is a run of whole token groups of one sequence. Its derived data is one allocation of consecutive
blocks, `[layer][kv_head][index page]` and then, of a sketch, `[layer][kv_head][refinement page]`: within a
layer all heads' index pages come first, then all heads' refinement pages.

- SKETCH: index pages hold 2-bit codes of K and V of all tokens with their scales and means; a refinement page
  holds 4 more bits of K and of V of `unit_tokens` tokens, so that both together are 6-bit codes.
- CHANNEL_MAJOR_KEYS: index page c < head_dim holds channel c of K of all tokens, as float16 (bfloat16 and
  float32 models: their own dtype); index page head_dim holds the mean of V. No refinement pages.
"""

from dataclasses import dataclass
from functools import cached_property

from spdk_glue.vendor_command import Derive, KvDtype

MEAN_TOKENS = 256  # of a sketch, tokens that share the mean taken off their K and V
SKETCH_HEADER_BYTES = 128
_FULL_CODE_PAGES = 8  # of a full segment's sketch: then scales and means fill most of a ninth


def channel_bytes(dtype: KvDtype) -> int:
    """Of an element in a channel-major copy."""
    return 4 if dtype == KvDtype.FLOAT32 else 2


def groups_per_segment(derive: Derive, page_size: int, head_dim: int, dtype: KvDtype, group_tokens: int) -> int:
    """Of a full segment; shorter ones are as good, with more slack."""
    if derive == Derive.CHANNEL_MAJOR_KEYS:
        tokens = page_size // channel_bytes(dtype)
    else:
        tokens = 2 * _FULL_CODE_PAGES * page_size // head_dim
    return max(1, tokens // group_tokens)


@dataclass(frozen=True)
class DerivedLayout:
    """Of one segment of `num_tokens` tokens."""

    derive: Derive
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KvDtype
    num_tokens: int

    @cached_property
    def index_pages(self) -> int:
        """Of one head of one layer."""
        if self.derive == Derive.CHANNEL_MAJOR_KEYS:
            return self.head_dim * -(-self.num_tokens * channel_bytes(self.dtype) // self.page_size) + 1
        num_means = -(-self.num_tokens // MEAN_TOKENS)
        codes = self.num_tokens * self.head_dim // 2  # 2 bits each, K and V
        return -(
            -(SKETCH_HEADER_BYTES + codes + 2 * self.num_tokens + 4 * num_means * self.head_dim)
            // self.page_size
        )

    @cached_property
    def unit_tokens(self) -> int:
        """Tokens of a refinement page: 4 bits of K and of V make a byte for each channel."""
        return self.page_size // self.head_dim

    @cached_property
    def refinement_pages(self) -> int:
        """Of one head of one layer; also the number of units."""
        return 0 if self.derive == Derive.CHANNEL_MAJOR_KEYS else -(-self.num_tokens // self.unit_tokens)

    @cached_property
    def layer_lbas(self) -> int:
        return self.num_kv_heads * (self.index_pages + self.refinement_pages)

    @cached_property
    def num_lbas(self) -> int:
        return self.num_layers * self.layer_lbas

    def index_lba(self, layer: int, kv_head: int) -> int:
        """From the segment's base: of the first index page."""
        return layer * self.layer_lbas + kv_head * self.index_pages

    def refinement_lba(self, layer: int, kv_head: int, unit: int = 0) -> int:
        """From the segment's base: of a unit's refinement page."""
        heads = self.num_kv_heads * self.index_pages
        return layer * self.layer_lbas + heads + kv_head * self.refinement_pages + unit
