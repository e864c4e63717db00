"""Building one attention command: what the drive is asked, as the vendor command's records."""

from dataclasses import dataclass, field

import numpy as np

from kvfs.attention_scores import Scoring
from kvfs.derived import DerivedSegment
from kvfs.layout import GroupLayout
from kvfs.metadata import GroupRow
from kvfs.sparse import Sparse
from spdk_glue.vendor_command import (
    ANSWER_HEADER,
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    DERIVED_SEGMENT,
    DTYPE_OF_NAME,
    EXACT_IF_CACHED,
    EXPLICIT_RANGES,
    GROUP_EXTENT,
    LINEAR_BIAS,
    TOKEN_RANGE,
    SparseMethod,
    record_struct,
)

_HEADER, _ITEM, _EXTENT, _SEGMENT = (
    record_struct(of) for of in (ATTENTION_HEADER, ATTENTION_ITEM, GROUP_EXTENT, DERIVED_SEGMENT)
)


@dataclass(frozen=True)
class DrivePart:
    """What one item reads on the drive: groups that hold tokens [0, num_tokens), derived data of some."""

    groups: list[GroupRow]
    num_tokens: int
    segments: list[DerivedSegment] = field(default_factory=list)


def _extents(groups: list[GroupRow], first_group: int, stop_group: int) -> list[tuple[int, int, int]]:
    """GROUP_EXTENT records (base LBA, number of groups, 0) of neighbouring groups joined."""
    extents: list[list[int]] = []
    for group in groups[first_group:stop_group]:
        if extents and extents[-1][0] + extents[-1][1] * group.num_lbas == group.base_lba:
            extents[-1][1] += 1
        else:
            extents.append([group.base_lba, 1])
    return [(base, count, 0) for base, count in extents]


def build_descriptor(
    layout: GroupLayout,
    layer: int,
    queries: np.ndarray,
    query_dtype: str,
    parts: list[DrivePart],
    starts: np.ndarray,
    stops: np.ndarray,
    scoring: Scoring,
    sparse: Sparse | None = None,
) -> np.ndarray:
    """uint8: the data of ATTENTION_SUBMIT.

    queries: [num_items, num_queries, num_query_heads, head_dim] of `query_dtype`, C-contiguous
    starts, stops: int64 [num_items, num_queries], visible positions; past num_tokens they are cut
    sparse: of use where parts have segments
    """
    geometry = layout.geometry
    group_tokens = geometry.group_tokens
    num_items, num_queries = starts.shape
    ranges, flags = b"", 0
    if num_queries > 1:
        limits = np.array([part.num_tokens for part in parts], np.int64)[:, None]
        starts, stops = np.minimum(starts, limits), np.clip(stops, 0, limits)
        if (starts != starts[:, :1]).any() or (stops != stops[:, :1]).any():
            ranges, flags = np.empty(starts.size, TOKEN_RANGE), EXPLICIT_RANGES
            ranges["start"], ranges["stop"] = starts.reshape(-1), stops.reshape(-1)
    items = []
    extents: list[tuple[int, int, int]] = []
    segments: list[tuple[int, int, int, int, int]] = []
    for part, own_starts, own_stops in zip(parts, starts.tolist(), stops.tolist(), strict=True):
        first_token = min(part.num_tokens, *own_starts)
        stop_token = min(part.num_tokens, max(0, *own_stops))
        first_group, stop_group = first_token // group_tokens, -(-stop_token // group_tokens)
        if part.segments:  # their groups are all named, whether they are seen or not
            first_group = min(first_group, part.segments[0].first_group)
            stop_group = max(stop_group, part.segments[-1].first_group + part.segments[-1].num_groups)
            segments.extend(
                (one.base_lba, len(items), one.first_group, one.num_groups, 0) for one in part.segments
            )
        wanted = _extents(part.groups, first_group, stop_group)
        num_tokens = min(part.num_tokens, max(stop_group, first_group) * group_tokens)
        items.append((len(extents), len(wanted), first_group, num_tokens, first_token, stop_token, 0, 0))
        extents.extend(wanted)
    if segments and sparse.exact_if_cached:
        flags |= EXACT_IF_CACHED
    bias = []
    if scoring.slopes is not None:
        flags |= LINEAR_BIAS
        bias = [scoring.slopes.astype("<f4"), scoring.positions.astype("<u4")]
    tables = [
        *(_ITEM.pack(*item) for item in items),
        *(_EXTENT.pack(*extent) for extent in extents),
        *(_SEGMENT.pack(*segment) for segment in segments),
        ranges,
        *bias,
    ]
    fields = {
        "magic": ATTENTION_MAGIC,
        "version": ATTENTION_VERSION,
        "flags": flags,
        "num_items": num_items,
        "num_extents": len(extents),
        "queries_offset": _HEADER.size + sum(memoryview(table).nbytes for table in tables),
        "group_tokens": group_tokens,
        "num_layers": geometry.num_layers,
        "layer": layer,
        "num_kv_heads": geometry.num_kv_heads,
        "group_size": geometry.gqa_group_size,
        "head_dim": geometry.head_dim,
        "num_queries": num_queries,
        "dtype": DTYPE_OF_NAME[geometry.dtype],
        "query_dtype": DTYPE_OF_NAME[query_dtype],
        "num_segments": len(segments),
        "scale": scoring.scale,
        "softcap": scoring.softcap,
        "reserved": 0,
        **_sparse_fields(sparse if segments else None),
    }
    header = _HEADER.pack(*(fields[name] for name in ATTENTION_HEADER.names))
    # every record is a multiple of 4 bytes long, so its parts are aligned as they follow each other
    return np.frombuffer(bytearray().join((header, *tables, queries.view(np.uint8))), np.uint8)


def _sparse_fields(sparse: Sparse | None) -> dict:
    if sparse is None:
        sparse = Sparse(SparseMethod.DENSE)
    return {
        "sparse_method": sparse.method,
        "channels": sparse.channels,
        "tokens": sparse.tokens,
        "compression": sparse.compression,
        "target_error": sparse.target_error,
    }


def parse_answer(answer: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(out float32 `shape`, lse float32 `shape[:3]`) of an ATTENTION_FETCH's data."""
    num_rows = shape[0] * shape[1] * shape[2]
    values = answer[ANSWER_HEADER.itemsize :].view(np.float32)
    return values[: num_rows * shape[3]].reshape(shape), values[num_rows * shape[3] :].reshape(shape[:3])
