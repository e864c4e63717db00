"""A SEAL_GROUPS' data, checked field by field. Any bytes may come; what is not right is refused before anything
is done."""

from dataclasses import dataclass

import numpy as np

from accel.descriptor import HEAD_DIM_MAX, HEAD_DIM_MIN, HEAD_DIM_STEP, MAX_GROUP_TOKENS
from spdk_glue.derived_layout import DerivedLayout, groups_per_segment
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import (
    DERIVE_HEADER,
    DTYPE_NAME,
    GROUP_EXTENT,
    INT4_CHANNELS,
    SEAL_HEADER,
    SEAL_MAGIC,
    SEAL_VERSION,
    SEAL_VERSION_IN_PLACE,
    Derive,
    KvDtype,
    pages_per_head,
    tokens_per_page,
)

_LBA = np.dtype("<u8")
_MAX_PLACEMENT_ID = 0xFFFF
_VERSION = {
    Derive.COMPACT: SEAL_VERSION_IN_PLACE,
    Derive.CHANNEL_MAJOR_KEYS: SEAL_VERSION,
    Derive.SKETCH: SEAL_VERSION,
}


@dataclass(frozen=True)
class Segment:
    """bases: int64 [num_groups], the groups' first LBAs; target: the first LBA of what is derived of them."""

    bases: np.ndarray
    target: int


@dataclass(frozen=True)
class SealRequest:
    """bases: int64 [num_groups], first LBAs of all groups. What follows is of no use where they are
    compacted."""

    derive: Derive
    num_layers: int
    layer_lbas: int
    placement_id: int
    bases: np.ndarray
    page_size: int
    num_kv_heads: int = 0
    head_dim: int = 0
    dtype: KvDtype = KvDtype.FLOAT16
    group_tokens: int = 0
    segments: tuple[Segment, ...] = ()

    def layer_lbas_of(self, bases: np.ndarray, layer: int) -> np.ndarray:
        """int64: LBAs of a layer of groups, group by group."""
        return (bases[:, None] + layer * self.layer_lbas + np.arange(self.layer_lbas)).reshape(-1)

    def layout(self, segment: Segment) -> DerivedLayout:
        """Of the layers that the command names."""
        return DerivedLayout(
            self.derive,
            self.page_size,
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            len(segment.bases) * self.group_tokens,
        )

    @classmethod
    def read(cls, data: np.ndarray, page_size: int, num_lbas: int) -> "SealRequest":
        """Raises CommandFailed(INVALID_DESCRIPTOR)."""
        reader = _Reader(data.copy())  # the host may write to its buffer meanwhile
        header = reader.take(SEAL_HEADER, 1, "its header")[0]
        _demand(header["magic"] == SEAL_MAGIC, "magic")
        derive = next((known for known in _VERSION if known == header["derive"]), None)
        _demand(derive is not None, "derive")
        _demand(header["version"] == _VERSION[derive], "version")
        _demand(not any(header["reserved"].tobytes()), "reserved")
        _demand(header["placement_id"] <= _MAX_PLACEMENT_ID, "placement_id")
        num_layers, layer_lbas = int(header["num_layers"]), int(header["layer_lbas"])
        _demand(1 <= num_layers * layer_lbas <= num_lbas, "num_layers or layer_lbas")
        extents = reader.take(GROUP_EXTENT, int(header["num_extents"]), "num_extents")
        bases = _bases(extents, num_layers * layer_lbas, num_lbas)
        common = (derive, num_layers, layer_lbas, int(header["placement_id"]), bases, page_size)
        if derive == Derive.COMPACT:
            return cls(*common)
        shape = reader.take(DERIVE_HEADER, 1, "DERIVE_HEADER")[0]
        num_kv_heads, head_dim, dtype, group_tokens = _check_shape(shape, derive, page_size, layer_lbas)
        per_segment = int(shape["groups_per_segment"])
        largest = groups_per_segment(derive, page_size, head_dim, dtype, group_tokens)
        _demand(1 <= per_segment <= largest, "groups_per_segment")
        _demand(len(bases) > 0, "num_extents")
        starts = range(0, len(bases), per_segment)
        targets = reader.take(_LBA, len(starts), "targets")
        segments = tuple(
            Segment(bases[start : start + per_segment], int(min(target, num_lbas)))
            for start, target in zip(starts, targets, strict=True)
        )
        request = cls(*common, num_kv_heads, head_dim, dtype, group_tokens, segments)
        request._check_targets(num_lbas)
        return request

    def _check_targets(self, num_lbas: int) -> None:
        """They lie on the drive, apart from each other and from the groups."""
        group_lbas = self.num_layers * self.layer_lbas
        taken = [(int(base), group_lbas, False) for base in self.bases]
        for segment in self.segments:
            size = self.layout(segment).num_lbas
            _demand(segment.target + size <= num_lbas, "target beyond the drive")
            taken.append((segment.target, size, True))
        reach, reached_by_target = 0, False  # of what begins before
        for first, count, is_target in sorted(taken):
            _demand(first >= reach or not (is_target or reached_by_target), "target overlaps")
            if first + count > reach:
                reach, reached_by_target = first + count, is_target


def _check_shape(shape: np.void, derive: Derive, page_size: int, layer_lbas: int):
    head_dim, group_tokens, num_kv_heads = (
        int(shape[name]) for name in ("head_dim", "group_tokens", "num_kv_heads")
    )
    _demand(shape["dtype"] in DTYPE_NAME, "dtype")
    dtype = KvDtype(shape["dtype"])
    _demand(HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX and head_dim % HEAD_DIM_STEP == 0, "head_dim")
    _demand(dtype != KvDtype.INT4 or head_dim % INT4_CHANNELS == 0, "head_dim of int4")
    _demand(1 <= group_tokens <= MAX_GROUP_TOKENS, "group_tokens")
    _demand(shape["reserved"] == 0, "reserved")
    _demand(tokens_per_page(page_size, head_dim, dtype) >= 1, "head_dim")
    per_head = pages_per_head(page_size, head_dim, dtype, group_tokens)
    _demand(num_kv_heads >= 1 and num_kv_heads * 2 * per_head == layer_lbas, "num_kv_heads or layer_lbas")
    return num_kv_heads, head_dim, dtype, group_tokens


def _bases(extents: np.ndarray, group_lbas: int, num_lbas: int) -> np.ndarray:
    """int64: the first LBA of each group."""
    beyond = "extent beyond the drive"
    counts = extents["num_groups"].astype(np.int64)
    _demand(bool((extents["base_lba"] < num_lbas).all()), beyond)
    # no group need be named twice: together they are no more than the drive holds
    _demand(int(counts.sum()) <= num_lbas // group_lbas, beyond)
    first = extents["base_lba"].astype(np.int64)
    _demand(bool((first + counts * group_lbas <= num_lbas).all()), beyond)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within * group_lbas


class _Reader:
    def __init__(self, data: np.ndarray):
        self._data = data
        self._offset = 0

    def take(self, record: np.dtype, count: int, what: str) -> np.ndarray:
        start, stop = self._offset, self._offset + count * record.itemsize
        _demand(stop <= self._data.nbytes, f"too short for {what}")
        self._offset = stop
        return self._data[start:stop].view(record)


def _demand(condition: bool, detail: str) -> None:
    if not condition:
        raise CommandFailed(Status.INVALID_DESCRIPTOR, detail=detail)
