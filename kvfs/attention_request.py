"""Building one attention command: what the drive is asked, as the vendor command's records."""

from dataclasses import dataclass

import numpy as np

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
    TOKEN_RANGE,
)


@dataclass(frozen=True)
class DrivePart:
    """What one item reads on the drive: the groups that hold tokens [0, num_tokens)."""

    groups: list[GroupRow]
    num_tokens: int


def _extents(groups: list[GroupRow], first_group: int, stop_group: int) -> list[tuple[int, int]]:
    """(base LBA, number of groups) of neighbouring groups joined."""
    extents: list[list[int]] = []
    for group in groups[first_group:stop_group]:
        if extents and extents[-1][0] + extents[-1][1] * group.num_lbas == group.base_lba:
            extents[-1][1] += 1
        else:
            extents.append([group.base_lba, 1])
    return [(base, count) for base, count in extents]


def build_descriptor(
    layout: GroupLayout,
    layer: int,
    queries: np.ndarray,
    query_dtype: str,
    parts: list[DrivePart],
    starts: np.ndarray,
    stops: np.ndarray,
    scale: float,
) -> np.ndarray:
    """uint8: the data of ATTENTION_SUBMIT.

    queries: [num_items, num_queries, num_query_heads, head_dim] of `query_dtype`, C-contiguous
    starts, stops: int64 [num_items, num_queries], visible positions; past num_tokens they are cut
    """
    geometry = layout.geometry
    num_items, num_queries = starts.shape
    limits = np.array([part.num_tokens for part in parts], np.int64)[:, None]
    starts, stops = np.minimum(starts, limits), np.clip(stops, 0, limits)
    items = np.zeros(num_items, ATTENTION_ITEM)
    extents: list[tuple[int, int]] = []
    for index, part in enumerate(parts):
        first_group = int(starts[index].min()) // geometry.group_tokens
        stop_group = -(-int(stops[index].max()) // geometry.group_tokens)
        wanted = _extents(part.groups, first_group, stop_group)
        items[index]["first_extent"] = len(extents)
        items[index]["num_extents"] = len(wanted)
        items[index]["first_group"] = first_group
        items[index]["num_tokens"] = min(part.num_tokens, max(stop_group, first_group) * geometry.group_tokens)
        extents.extend(wanted)
    items["token_start"], items["token_stop"] = starts[:, -1], stops[:, -1]
    ranges = np.empty(0, TOKEN_RANGE)
    same = bool((starts == starts[:, -1:]).all() and (stops == stops[:, -1:]).all())
    if not same:
        ranges = np.empty(num_items * num_queries, TOKEN_RANGE)
        ranges["start"], ranges["stop"] = starts.reshape(-1), stops.reshape(-1)

    header = np.zeros(1, ATTENTION_HEADER)
    record = header[0]
    record["magic"] = ATTENTION_MAGIC
    record["version"] = ATTENTION_VERSION
    record["flags"] = 0 if same else EXPLICIT_RANGES
    record["num_items"] = num_items
    record["num_extents"] = len(extents)
    record["group_tokens"] = geometry.group_tokens
    record["num_layers"] = geometry.num_layers
    record["layer"] = layer
    record["num_kv_heads"] = geometry.num_kv_heads
    record["group_size"] = geometry.gqa_group_size
    record["head_dim"] = geometry.head_dim
    record["num_queries"] = num_queries
    record["dtype"] = DTYPE_OF_NAME[geometry.dtype]
    record["query_dtype"] = DTYPE_OF_NAME[query_dtype]
    record["scale"] = scale
    table = np.zeros(len(extents), GROUP_EXTENT)
    if extents:
        table["base_lba"], table["num_groups"] = np.array(extents, np.uint64).T
    queries_offset = header.nbytes + items.nbytes + table.nbytes + ranges.nbytes
    record["queries_offset"] = queries_offset

    # alignment of the parts inside: every record is a multiple of 8 bytes long
    descriptor = np.empty(queries_offset + queries.nbytes, np.uint8)
    offset = 0
    for part in (header, items, table, ranges, queries.reshape(-1)):
        descriptor[offset : offset + part.nbytes] = part.view(np.uint8)
        offset += part.nbytes
    return descriptor


def parse_answer(answer: np.ndarray, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(out float32 `shape`, lse float32 `shape[:3]`) of an ATTENTION_FETCH's data."""
    num_rows = shape[0] * shape[1] * shape[2]
    values = answer[ANSWER_HEADER.itemsize :].view(np.float32)
    return values[: num_rows * shape[3]].reshape(shape), values[num_rows * shape[3] :].reshape(shape[:3])
