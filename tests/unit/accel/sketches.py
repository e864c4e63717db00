"""Sketch batches over pages in memory, for the tests of accel/sketch."""

from itertools import pairwise

import numpy as np

from accel.sketch import SketchBatch
from accel.sketch.codebook import rotate
from accel.sketch.encoder import encode
from accel.sketch.reference import sketch_layout
from tests.unit.accel.pages import Pages


class Sketches:
    """Segments of every (item, KV head) over the same tokens, pages scattered; keeps the memory alive.

    keys, values: float32 [num_kv_heads, num_tokens, head_dim]; queries: float32 [num_items, num_queries,
    num_query_heads, head_dim], not rotated
    """

    def __init__(self, keys, values, queries, start, stop, *, page_size=4096, segment_tokens=None, **options):
        num_kv_heads, num_tokens, head_dim = keys.shape
        num_items = len(queries)
        self.pages = Pages(page_size)
        self.segments = []  # (first token, layout, image) of each head
        cuts = [*range(0, num_tokens, segment_tokens or num_tokens), num_tokens]
        segments = []
        for first, behind in pairwise(cuts):
            layout = sketch_layout(page_size, head_dim, behind - first)
            images = [
                encode(keys[h, first:behind], values[h, first:behind], layout) for h in range(num_kv_heads)
            ]
            segments.append(
                (first, layout, images, [[self.pages.add(page) for page in image] for image in images])
            )
        self.layouts = [layout for _, layout, _, _ in segments]
        self.images = [images for _, _, images, _ in segments]
        index, refinement, first_page, first_unit = [], [], [0], [0]
        rows = {name: [] for name in ("num_tokens", "first_token", "item", "kv_head")}
        for item in range(num_items):
            for head in range(num_kv_heads):
                for first, layout, _, addresses in segments:
                    index += addresses[head][: layout.index_pages]
                    refinement += addresses[head][layout.index_pages :]
                    first_page.append(len(index))
                    first_unit.append(len(refinement))
                    rows["num_tokens"].append(layout.num_tokens)
                    rows["first_token"].append(first)
                    rows["item"].append(item)
                    rows["kv_head"].append(head)
        self.refinement_pages = np.array(refinement, np.uint64)
        self.batch = SketchBatch(
            page_size=page_size,
            head_dim=head_dim,
            group_size=queries.shape[2] // num_kv_heads,
            index_pages=np.array(index, np.uint64),
            segment_first_page=np.array(first_page, np.int64),
            segment_first_unit=np.array(first_unit, np.int64),
            segment_num_tokens=np.array(rows["num_tokens"], np.int64),
            segment_first_token=np.array(rows["first_token"], np.int64),
            segment_item=np.array(rows["item"], np.int32),
            segment_kv_head=np.array(rows["kv_head"], np.int32),
            queries=rotate(queries),
            visible_start=np.asarray(start, np.int64),
            visible_stop=np.asarray(stop, np.int64),
            **{"scale": head_dim**-0.5} | options,
        )

    def results(self):
        """out, lse and noise for all units, filled with what no test expects."""
        shape = (self.batch.num_units, self.batch.queries.shape[1], self.batch.group_size)
        sizes = ((*shape, self.batch.head_dim), shape, (*shape, 2))
        return tuple(np.full(size, 7e7, np.float32) for size in sizes)
