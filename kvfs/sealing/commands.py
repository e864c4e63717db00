"""SEAL_GROUPS commands of one segment, each short enough that others wait for it only briefly."""

from collections.abc import Iterator, Sequence

import numpy as np

from kvfs.layout import GroupLayout
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.vendor_command import (
    DERIVE_HEADER,
    DTYPE_OF_NAME,
    GROUP_EXTENT,
    SEAL_HEADER,
    SEAL_MAGIC,
    SEAL_VERSION,
    Derive,
)

COMMAND_BYTES = 2 << 20  # of token-major pages read by one command: a layer of a segment, or some


def derived_layout(layout: GroupLayout, derive: Derive, num_groups: int) -> DerivedLayout:
    geometry = layout.geometry
    return DerivedLayout(
        derive,
        layout.page_size,
        geometry.num_layers,
        geometry.num_kv_heads,
        geometry.head_dim,
        DTYPE_OF_NAME[geometry.dtype],
        num_groups * geometry.group_tokens,
    )


def seal_commands(
    layout: GroupLayout, derived: DerivedLayout, bases: Sequence[int], target: int, placement_id: int
) -> Iterator[np.ndarray]:
    """uint8: the data of each command. bases: first LBAs of the groups; target: of what is derived of them."""
    geometry = layout.geometry
    step = max(1, COMMAND_BYTES // (len(bases) * layout.image_bytes))
    for first in range(0, geometry.num_layers, step):
        header = np.zeros(1, SEAL_HEADER)
        header["magic"], header["version"], header["derive"] = SEAL_MAGIC, SEAL_VERSION, derived.derive
        header["num_extents"], header["num_layers"] = len(bases), min(step, geometry.num_layers - first)
        header["layer_lbas"], header["placement_id"] = layout.layer_lbas, placement_id
        extents = np.zeros(len(bases), GROUP_EXTENT)
        extents["base_lba"] = np.asarray(bases, np.uint64) + np.uint64(first * layout.layer_lbas)
        extents["num_groups"] = 1
        shape = np.zeros(1, DERIVE_HEADER)
        shape["num_kv_heads"], shape["head_dim"] = geometry.num_kv_heads, geometry.head_dim
        shape["dtype"], shape["group_tokens"] = DTYPE_OF_NAME[geometry.dtype], geometry.group_tokens
        shape["groups_per_segment"] = len(bases)
        targets = np.array([target + first * derived.layer_lbas], "<u8")
        yield np.concatenate([part.view(np.uint8) for part in (header, extents, shape, targets)])
