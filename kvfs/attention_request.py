"""Building one attention command: what the drive is asked, as the vendor command's records."""

from dataclasses import dataclass

import numpy as np

from kvfs.attention_scores import Scoring
from kvfs.layout import GroupLayout
from kvfs.metadata import GroupRow
from spdk_glue.vendor_command import (
    ANSWER_HEADER,
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    DTYPE_OF_NAME,
    EXPLICIT_RANGES,
    GROUP_EXTENT,
    LINEAR_BIAS,
    TOKEN_RANGE,
)


@dataclass(frozen=True)
class DrivePart:
    """What one item reads on the drive: the groups that hold tokens [0, num_tokens)."""

    groups: list[GroupRow]
    num_tokens: int


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
) -> np.ndarray:
    """uint8: the data of ATTENTION_SUBMIT.

    queries: [num_items, num_queries, num_query_heads, head_dim] of `query_dtype`, C-contiguous
    starts, stops: int64 [num_items, num_queries], visible positions; past num_tokens they are cut
    """
    geometry = layout.geometry
    group_tokens = geometry.group_tokens
    num_items, num_queries = starts.shape
    limits = np.array([part.num_tokens for part in parts], np.int64)[:, None]
    starts, stops = np.minimum(starts, limits), np.clip(stops, 0, limits)
    items = []
    extents: list[tuple[int, int, int]] = []
    for part, first_token, stop_token, start, stop in zip(
        parts,
        starts.min(axis=1).tolist(),
        stops.max(axis=1).tolist(),
        starts[:, -1].tolist(),
        stops[:, -1].tolist(),
        strict=True,
    ):
        first_group, stop_group = first_token // group_tokens, -(-stop_token // group_tokens)
        wanted = _extents(part.groups, first_group, stop_group)
        num_tokens = min(part.num_tokens, max(stop_group, first_group) * group_tokens)
        items.append((len(extents), len(wanted), first_group, num_tokens, start, stop, 0, 0))
        extents.extend(wanted)
    ranges = np.empty(0, TOKEN_RANGE)
    same = num_queries == 1 or bool((starts == starts[:, -1:]).all() and (stops == stops[:, -1:]).all())
    if not same:
        ranges = np.empty(num_items * num_queries, TOKEN_RANGE)
        ranges["start"], ranges["stop"] = starts.reshape(-1), stops.reshape(-1)
    tables = [np.array(items, ATTENTION_ITEM), np.array(extents, GROUP_EXTENT), ranges]
    flags = 0 if same else EXPLICIT_RANGES
    if scoring.slopes is not None:
        flags |= LINEAR_BIAS
        tables += [scoring.slopes.astype("<f4"), scoring.positions.astype("<u4").reshape(-1)]
    queries_offset = ATTENTION_HEADER.itemsize + sum(table.nbytes for table in tables)
    fields = {
        "magic": ATTENTION_MAGIC,
        "version": ATTENTION_VERSION,
        "flags": flags,
        "num_items": num_items,
        "num_extents": len(extents),
        "queries_offset": queries_offset,
        "group_tokens": group_tokens,
        "num_layers": geometry.num_layers,
        "layer": layer,
        "num_kv_heads": geometry.num_kv_heads,
        "group_size": geometry.gqa_group_size,
        "head_dim": geometry.head_dim,
        "num_queries": num_queries,
        "dtype": DTYPE_OF_NAME[geometry.dtype],
        "query_dtype": DTYPE_OF_NAME[query_dtype],
        "reserved0": 0,
        "scale": scoring.scale,
        "softcap": scoring.softcap,
        "reserved": b"",
    }
    # a record at once: one field at a time costs a third of all this function does
    header = np.array([tuple(fields[name] for name in ATTENTION_HEADER.names)], ATTENTION_HEADER)
    # alignment of the parts inside: every record is a multiple of 4 bytes long
    descriptor = np.empty(queries_offset + queries.nbytes, np.uint8)
    offset = 0
    for part in (header, *tables, queries.reshape(-1)):
        descriptor[offset : offset + part.nbytes] = part.view(np.uint8)
        offset += part.nbytes
    return descriptor


def parse_answer(answer: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(out float32 `shape`, lse float32 `shape[:3]`) of an ATTENTION_FETCH's data."""
    num_rows = shape[0] * shape[1] * shape[2]
    values = answer[ANSWER_HEADER.itemsize :].view(np.float32)
    return values[: num_rows * shape[3]].reshape(shape), values[num_rows * shape[3] :].reshape(shape[:3])
