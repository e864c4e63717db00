"""Sketches: sealed tokens coded twice, 2 bits of all for attention to read and 4 more of those that matter.

| module | idea |
|---|---|
| `format` | where what lies in index and refinement pages |
| `codebook` | the levels that codes stand for, and the rotation that makes channels normally distributed |
| `token_order` | tokens of like keys lie together |
| `encoder` | rows of K and V to pages |
| `reference` | pages to rows, and attention over them: the definition, in NumPy |
| `kernels` | attention over pages, fast: units one by one, with their noise |
| `scan` | the same for a budget, in two passes: scores of all tokens, then values of what is not refined |
| `integer_kernels` | their inner steps, in products of bytes |
| `selection` | which units are worth their refinement page |
| `expected_error` | what error is left, and which units to refine for less |

FORMAT.md explains the bytes.
"""

from dataclasses import dataclass, field

import numpy as np


class DamagedSketch(Exception):
    """Index pages whose header or means are not of their layout. segment: of the batch; 0 of a lone one."""

    def __init__(self, segment: int, reason: str):
        super().__init__(f"sketch of segment {segment}: {reason}")
        self.segment = segment
        self.reason = reason


@dataclass
class SketchBatch:
    """One command's segments, each of one item and one KV head.

    A unit is the tokens of one refinement page: `unit_tokens` of a segment's, fewer in its last unit. Units
    are numbered through the batch, in the order of its segments.

    page_size, head_dim: of all; head_dim is a multiple of 8, 32 to 256
    group_size: query heads per KV head, 1 to 16
    index_pages: uint64 [num_pages], addresses of index pages, segment by segment
    segment_first_page: int64 [num_segments + 1]
    segment_first_unit: int64 [num_segments + 1]
    segment_num_tokens: int64 [num_segments]
    segment_first_token: int64 [num_segments], position in the sequence of the segment's first token
    segment_item, segment_kv_head: int32 [num_segments]
    queries: float32 [num_items, num_queries, num_query_heads, head_dim], rotated; head h reads KV head
        h // group_size
    visible_start, visible_stop: int64 [num_items, num_queries]: a query sees start <= position < stop
    scale: score = scale * q . k
    softcap: above 0, scores become softcap * tanh(score / softcap)
    alibi_slopes: float32 [num_query_heads], or empty; score -= slope * (query_position - position)
    query_position: int64 [num_items, num_queries]; of no use without slopes
    """

    page_size: int
    head_dim: int
    group_size: int
    index_pages: np.ndarray
    segment_first_page: np.ndarray
    segment_first_unit: np.ndarray
    segment_num_tokens: np.ndarray
    segment_first_token: np.ndarray
    segment_item: np.ndarray
    segment_kv_head: np.ndarray
    queries: np.ndarray
    visible_start: np.ndarray
    visible_stop: np.ndarray
    scale: float
    softcap: float = 0.0
    alibi_slopes: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    query_position: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))

    def segment_arrays(self) -> tuple[np.ndarray, ...]:
        """Pages, and what the segments are, as all kernels take them first."""
        return (
            np.ascontiguousarray(self.index_pages, np.uint64),
            np.ascontiguousarray(self.segment_first_page, np.int64),
            np.ascontiguousarray(self.segment_first_unit, np.int64),
            np.ascontiguousarray(self.segment_num_tokens, np.int64),
            np.ascontiguousarray(self.segment_first_token, np.int64),
            np.ascontiguousarray(self.segment_item, np.int32),
            np.ascontiguousarray(self.segment_kv_head, np.int32),
        )

    @property
    def num_segments(self) -> int:
        return len(self.segment_num_tokens)

    @property
    def num_units(self) -> int:
        return int(self.segment_first_unit[-1])

    def unit_segment(self, units: np.ndarray) -> np.ndarray:
        """int64: the segments that units belong to."""
        return np.searchsorted(self.segment_first_unit, units, side="right") - 1
