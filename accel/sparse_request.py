"""The sparse part of an attention descriptor, checked: its method, its parameters, its derived data."""

import math
from dataclasses import dataclass

import numpy as np

from spdk_glue.derived_layout import DerivedLayout, groups_per_segment
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import (
    COMPRESSION_MAX,
    EXACT_IF_CACHED,
    TARGET_ERROR_MAX,
    Derive,
    KvDtype,
    SparseMethod,
)

DERIVE_OF = {SparseMethod.SPARF: Derive.CHANNEL_MAJOR_KEYS, SparseMethod.SKETCH: Derive.SKETCH}
_PARAMETERS = ("channels", "tokens", "compression", "target_error")


@dataclass(frozen=True)
class SparseRequest:
    """How a command reads less than all pages; see spdk_glue.vendor_command.

    segments: DERIVED_SEGMENT [num_segments], by item, then by group, none over another
    exact_if_cached: dense instead where all pages of tokens are in the cache
    """

    method: SparseMethod
    channels: int
    tokens: int
    compression: float
    target_error: float
    segments: np.ndarray
    layout_of: list[DerivedLayout]  # each segment's
    exact_if_cached: bool


def _demand(condition: bool, detail: str) -> None:
    if not condition:
        raise CommandFailed(Status.INVALID_DESCRIPTOR, detail=detail)


def check_parameters(header: dict) -> None:
    """Those of the header alone. Raises CommandFailed(INVALID_DESCRIPTOR) naming the field at fault."""
    method = header["sparse_method"]
    _demand(method in set(SparseMethod), "sparse_method")
    _demand(method == SparseMethod.SKETCH or not header["flags"] & EXACT_IF_CACHED, "flags")
    _demand(header["reserved"] == 0, "reserved")
    used: tuple[str, ...] = ()
    if method == SparseMethod.DENSE:
        _demand(header["num_segments"] == 0, "num_segments")
    elif method == SparseMethod.SPARF:
        used = ("channels", "tokens")
        _demand(1 <= header["channels"] <= header["head_dim"], "channels")
        _demand(header["tokens"] >= 1, "tokens")
    else:
        compression, target_error = header["compression"], header["target_error"]
        used = ("compression",) if compression else ("target_error",)  # one of them; NaN is true
        if compression:
            _demand(1 <= compression <= COMPRESSION_MAX, "compression")
        else:
            _demand(0 < target_error <= TARGET_ERROR_MAX, "target_error")
    for name in _PARAMETERS:
        _demand(name in used or header[name] == 0, name)
    _demand(math.isfinite(header["compression"]), "compression")


def sparse_request(
    header: dict, segments: np.ndarray, items: np.ndarray, extents: np.ndarray, page_size: int, num_lbas: int
) -> SparseRequest | None:
    """None if all pages are to be read. items, extents: checked. Raises as check_parameters."""
    method = SparseMethod(header["sparse_method"])
    if method == SparseMethod.DENSE:
        return None
    shape = (
        page_size,
        header["num_layers"],
        header["num_kv_heads"],
        header["head_dim"],
        KvDtype(header["dtype"]),
    )
    layout_of = _check_segments(
        DERIVE_OF[method], shape, header["group_tokens"], segments, items, extents, num_lbas
    )
    parameters = (header[name] for name in _PARAMETERS)
    return SparseRequest(method, *parameters, segments, layout_of, bool(header["flags"] & EXACT_IF_CACHED))


def _check_segments(derive, shape, group_tokens, segments, items, extents, num_lbas) -> list[DerivedLayout]:
    """The segments' layouts. shape: what DerivedLayout takes between `derive` and num_tokens."""
    if not len(segments):
        return []
    item = segments["item"].astype(np.int64)
    first, count = segments["first_group"].astype(np.int64), segments["num_groups"].astype(np.int64)
    _demand(not segments["reserved"].any(), "segment reserved")
    _demand(bool((item < len(items)).all()), "segment item")
    page_size, _, _, head_dim, dtype = shape
    longest = groups_per_segment(derive, page_size, head_dim, dtype, group_tokens)
    _demand(bool(((count >= 1) & (count <= longest)).all()), "segment num_groups")
    follows = (item[1:] > item[:-1]) | ((item[1:] == item[:-1]) & (first[1:] >= (first + count)[:-1]))
    _demand(bool(follows.all()), "segments out of order or overlapping")
    groups_before = np.concatenate([[0], np.cumsum(extents["num_groups"].astype(np.int64))])
    first_extent = items["first_extent"].astype(np.int64)
    groups = groups_before[first_extent + items["num_extents"]] - groups_before[first_extent]
    start = items["first_group"].astype(np.int64)
    within = (start[item] <= first) & (first + count <= (start + groups)[item])
    _demand(bool(within.all()), "segment beyond its item's extents")
    layouts = {
        int(number): DerivedLayout(derive, *shape, int(number) * group_tokens) for number in np.unique(count)
    }
    found = [layouts[number] for number in count.tolist()]
    room = num_lbas - np.array([layout.num_lbas for layout in found], np.int64)
    _demand(
        bool((room >= 0).all() and (segments["base_lba"] <= room.astype(np.uint64)).all()), "segment base_lba"
    )
    return found
