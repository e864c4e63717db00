"""Derived data of sequences: what the drive made of sealed token groups for sparse attention."""

from dataclasses import dataclass

from spdk_glue.vendor_command import Derive


@dataclass(frozen=True)
class DerivedSegment:
    """Of the groups [first_group, first_group + num_groups) of a sequence; see spdk_glue.derived_layout.

    id: of its row in the catalogue; None before it has one
    """

    derive: Derive
    first_group: int
    num_groups: int
    base_lba: int
    id: int | None = None
