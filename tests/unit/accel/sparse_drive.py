"""Sequences with derived data on a drive, commands over them, and what they are to answer."""

from dataclasses import dataclass, field

import numpy as np

from accel.merge import merge_states, merge_units
from accel.sketch import SketchBatch, reference, scan
from accel.sketch.codebook import rotate, unrotate
from accel.sketch.encoder import encode
from accel.sketch.selection import choose_units, run_of, units_within
from accel.sparf.channel_major import encode_channel_major
from accel.workers import UnitRange
from spdk_glue import dma
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.vendor_command import (
    ANSWER_HEADER,
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    DERIVED_SEGMENT,
    GROUP_EXTENT,
    LINEAR_BIAS,
    Derive,
    KvDtype,
    SparseMethod,
    answer_bytes,
)

PAGE = 4096
LAYERS, HEADS, GROUP, HEAD_DIM, GROUP_TOKENS = 2, 2, 2, 64, 256
ROWS = PAGE // (2 * HEAD_DIM)  # of a page
PER_HEAD = GROUP_TOKENS // ROWS
LAYER_LBAS = HEADS * 2 * PER_HEAD
GROUP_LBAS = LAYERS * LAYER_LBAS


@dataclass
class Stored:
    """A sequence: keys, values float32 [LAYERS, num_tokens, HEADS, HEAD_DIM], as they are stored.

    segments: (first group, number of groups, base LBA, pages [LAYERS][HEADS] of encode)
    """

    keys: np.ndarray
    values: np.ndarray
    base_lba: int
    segments: list = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


def layout(num_groups: int, derive=Derive.SKETCH) -> DerivedLayout:
    return DerivedLayout(derive, PAGE, LAYERS, HEADS, HEAD_DIM, KvDtype.FLOAT16, num_groups * GROUP_TOKENS)


def store(namespace, num_groups, segments, base_lba=64, seed=0, derive=Derive.SKETCH) -> Stored:
    """Write a sequence and its derived data. segments: (first group, number of groups)"""
    random = np.random.default_rng(seed)
    shape = (2, LAYERS, num_groups * GROUP_TOKENS, HEADS, HEAD_DIM)
    rows = random.standard_normal(shape, np.float32)
    rows[0, :, ::64] *= 3  # some tokens that stand out
    rows = rows.astype(np.float16)
    image = rows.reshape(2, LAYERS, num_groups, GROUP_TOKENS, HEADS, HEAD_DIM).transpose(2, 1, 4, 0, 3, 5)
    write(namespace, base_lba, np.ascontiguousarray(image))
    stored = Stored(*rows.astype(np.float32), base_lba)
    lba = base_lba + num_groups * GROUP_LBAS
    encoder = encode if derive == Derive.SKETCH else encode_channel_major
    for first, count in segments:
        of = layout(count, derive)
        tokens = slice(first * GROUP_TOKENS, (first + count) * GROUP_TOKENS)
        pages = [
            [
                encoder(stored.keys[layer, tokens, head], stored.values[layer, tokens, head], of)
                for head in range(HEADS)
            ]
            for layer in range(LAYERS)
        ]
        image = np.zeros((of.num_lbas, PAGE), np.uint8)
        for layer in range(LAYERS):
            for head in range(HEADS):
                at = of.index_lba(layer, head)
                image[at : at + of.index_pages] = pages[layer][head][: of.index_pages]
                at = of.refinement_lba(layer, head)
                image[at : at + of.refinement_pages] = pages[layer][head][of.index_pages :]
        write(namespace, lba, image)
        stored.segments.append((first, count, lba, pages))
        lba += of.num_lbas
    return stored


def write(namespace, lba, data: np.ndarray) -> None:
    raw = data.reshape(-1).view(np.uint8)
    buffer = dma.allocate(raw.nbytes)
    buffer[:] = raw
    namespace.write(lba, buffer, placement_id=1)


def random_queries(num_items=1, num_queries=1, seed=1):
    return np.random.default_rng(seed).standard_normal(
        (num_items, num_queries, HEADS * GROUP, HEAD_DIM), np.float32
    )


def sparse_descriptor(stored: list[Stored], queries, layer=0, seen=None, slopes=None, **changes) -> np.ndarray:
    """seen: (start, stop) of each item; changes: of the header, segment_* of the first segment"""
    num_items, num_queries = queries.shape[:2]
    header = np.zeros(1, ATTENTION_HEADER)
    items, extents = np.zeros(num_items, ATTENTION_ITEM), np.zeros(num_items, GROUP_EXTENT)
    segments = np.zeros(sum(len(each.segments) for each in stored), DERIVED_SEGMENT)
    place = 0
    for number, each in enumerate(stored):
        start, stop = seen[number] if seen else (0, each.num_tokens)
        items[number] = (number, 1, 0, each.num_tokens, start, stop, 0, int(num_queries > 1))
        extents[number] = (each.base_lba, each.num_tokens // GROUP_TOKENS, 0)
        for first, count, lba, _ in each.segments:
            segments[place] = (lba, number, first, count, 0)
            place += 1
    bias = []
    if slopes is not None:
        bias = [np.asarray(slopes, "<f4"), np.full((num_items, num_queries), stored[0].num_tokens, "<u4")]
    fields = {
        "magic": ATTENTION_MAGIC,
        "version": ATTENTION_VERSION,
        "flags": LINEAR_BIAS if slopes is not None else 0,
        "num_items": num_items,
        "num_extents": num_items,
        "group_tokens": GROUP_TOKENS,
        "num_layers": LAYERS,
        "layer": layer,
        "num_kv_heads": HEADS,
        "group_size": GROUP,
        "head_dim": HEAD_DIM,
        "num_queries": num_queries,
        "dtype": KvDtype.FLOAT16,
        "query_dtype": KvDtype.FLOAT32,
        "num_segments": len(segments),
        "scale": HEAD_DIM**-0.5,
        "sparse_method": SparseMethod.SKETCH,
        **changes,
    }
    for name, value in fields.items():
        if name.startswith("segment_"):
            segments[name[8:]][0] = value
        else:
            header[name] = value
    parts = [header, items, extents, segments, *bias]
    if "queries_offset" not in changes:
        header["queries_offset"] = sum(part.nbytes for part in parts)
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in (*parts, queries)])


def attend(namespace, descriptor, queries):
    """(out, lse, header) of a command."""
    answer = namespace.attend(descriptor, answer_bytes(*queries.shape))
    return (*parts_of(answer, queries.shape), answer[: ANSWER_HEADER.itemsize].view(ANSWER_HEADER)[0])


def parts_of(answer, shape):
    values = answer[ANSWER_HEADER.itemsize :].view(np.float32)
    split = int(np.prod(shape))
    return values[:split].reshape(shape), values[split:].reshape(shape[:3])


def ranges(stored: list[Stored], num_queries: int, seen=None):
    """int64 [num_items, num_queries] starts and stops, as sparse_descriptor has them."""
    starts, stops = np.zeros((2, len(stored), num_queries), np.int64)
    for number, each in enumerate(stored):
        start, stop = seen[number] if seen else (0, each.num_tokens)
        starts[number], stops[number] = start, stop - np.arange(num_queries)[::-1]
    return starts, stops


def dense_attention(keys, values, queries, start, stop, tokens, softcap=0.0, slopes=None, position=0):
    """(out, lse) float64 of one head's rows over some tokens. queries [num_queries, num_rows, d]"""
    out, lse = np.zeros(queries.shape), np.full(queries.shape[:2], -np.inf)
    for query in range(len(queries)):
        seen = tokens[(start[query] <= tokens) & (tokens < stop[query])]
        if not len(seen):
            continue
        scores = queries[query].astype(np.float64) @ keys[seen].astype(np.float64).T * HEAD_DIM**-0.5
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:
            scores -= slopes[:, None] * (position - seen)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[query] = weights @ values[seen] / weights.sum(axis=1, keepdims=True)
        lse[query] = scores.max(axis=1) + np.log(weights.sum(axis=1))
    return out, lse


def expected(
    stored: list[Stored], queries, compression, layer=0, seen=None, without=(), softcap=0.0, slopes=None
):
    """((out, lse), chosen pages): the whole method, from its definition. without: segments taken for damaged"""
    starts, stops = ranges(stored, queries.shape[1], seen)
    out, lse = np.zeros(queries.shape, np.float32), np.full(queries.shape[:3], -np.inf, np.float32)
    num_chosen = 0
    for item, each in enumerate(stored):
        used = [segment for number, segment in enumerate(each.segments) if number not in without]
        tokens = np.arange(each.num_tokens)
        sketched = np.zeros(each.num_tokens, bool)
        for first, count, *_ in used:
            sketched[first * GROUP_TOKENS : (first + count) * GROUP_TOKENS] = True
        for head in range(HEADS):
            rows = slice(head * GROUP, (head + 1) * GROUP)
            bias = {} if slopes is None else {"slopes": slopes[rows], "position": stored[0].num_tokens}
            dense = dense_attention(
                each.keys[layer, :, head], each.values[layer, :, head], queries[item, :, rows],
                starts[item], stops[item], tokens[~sketched], softcap, **bias,
            )  # fmt: skip
            dense = tuple(np.ascontiguousarray(part, np.float32) for part in dense)
            if used:
                batch, memory = _batch(used, layer, head, queries[item : item + 1], starts[item], stops[item])
                batch.softcap = softcap
                if slopes is not None:
                    batch.alibi_slopes = np.asarray(slopes, np.float32)
                    batch.query_position = np.full((1, queries.shape[1]), stored[0].num_tokens)
                part, chosen = _sketched(batch, memory, compression, used, starts[item], stops[item], dense[1])
                num_chosen += chosen
                dense = merge_states(*dense, *part)
            out[item, :, rows], lse[item, :, rows] = dense
    return (out, lse), num_chosen


def _batch(used, layer, head, queries, start, stop):
    layouts = [layout(count) for _, count, *_ in used]
    memory = [np.ascontiguousarray(pages[layer][head]) for *_, pages in used]
    index = [
        dma.address_of(pages) + PAGE * np.arange(of.index_pages)
        for pages, of in zip(memory, layouts, strict=True)
    ]

    def before(counts):
        return np.concatenate([[0], np.cumsum(counts)])

    batch = SketchBatch(
        page_size=PAGE,
        head_dim=HEAD_DIM,
        group_size=GROUP,
        index_pages=np.concatenate(index).astype(np.uint64),
        segment_first_page=before([of.index_pages for of in layouts]),
        segment_first_unit=before([of.refinement_pages for of in layouts]),
        segment_num_tokens=np.array([of.num_tokens for of in layouts]),
        segment_first_token=np.array([first * GROUP_TOKENS for first, *_ in used]),
        segment_item=np.zeros(len(used), np.int32),
        segment_kv_head=np.full(len(used), head, np.int32),
        queries=rotate(queries),
        visible_start=start[None],
        visible_stop=stop[None],
        scale=HEAD_DIM**-0.5,
    )
    return batch, memory


def _sketched(batch, memory, compression, used, start, stop, other_lse):
    """((out, lse) of what segments stand for, number of refined units) of one item and head"""
    num_queries = batch.queries.shape[1]
    out = np.empty((batch.num_units, num_queries, GROUP, HEAD_DIM), np.float32)
    lse = np.empty((batch.num_units, num_queries, GROUP), np.float32)
    reference.sketch_units(batch, UnitRange(0, batch.num_segments), out, lse)
    dense_pages = 0
    unit_tokens = layout(1).unit_tokens
    for first, count, *_ in used:
        low = max(first * GROUP_TOKENS, int(start.min()))
        high = min((first + count) * GROUP_TOKENS, int(stop.max()))
        dense_pages += 2 * (-(-high // ROWS) - low // ROWS)
    limit = units_within(compression, dense_pages, len(batch.index_pages), batch.num_units)
    scanned = scan.Scan.of(batch)  # units of nearly the same share: whichever the drive takes is right
    scan.score_units(batch, scan.RoundedQueries.of(batch), UnitRange(0, batch.num_segments), scanned)
    shares = scanned.lse.reshape(len(lse), -1)
    chosen = choose_units(shares, limit, other_lse.reshape(-1), run_of(unit_tokens))
    chosen = chosen[~np.isneginf(shares[chosen]).all(axis=1)]
    segment = batch.unit_segment(chosen)
    pages = [
        dma.address_of(memory[s]) + PAGE * (layout(used[s][1]).index_pages + unit - batch.segment_first_unit[s])
        for s, unit in zip(segment, chosen, strict=True)
    ]
    if len(chosen):
        reference.refined_units(batch, UnitRange(0, len(chosen)), chosen, np.array(pages, np.uint64), out, lse)
    zeros = np.zeros(len(lse), np.int32)
    merged, merged_lse = merge_units(out, lse, zeros, zeros, 1, 1)
    return (unrotate(merged[0]), merged_lse[0]), len(chosen)


def blank(namespace, lba) -> None:
    """A block of zeros."""
    write(namespace, lba, np.zeros(PAGE, np.uint8))
