"""How much of the flash is offered as logical blocks, and over how many streams it is written.

Free space is what keeps collection cheap and possible at all. Besides the geometry's spare percent a drive
keeps back whole superblocks: one that may be open and nearly empty for each stream of the caller, for
collection and for metadata, and three that stay free so that collection and the metadata log can always open
the next, even after a crash in the middle of both. Then closed superblocks always hold at least the spare as
garbage, so collection always gains. Bad blocks eat into the spare; parity takes one die's worth off everything.
"""

from ftl.geometry import Geometry

STREAMS_MAX = 64
# Open superblocks of collection and metadata, and GC_RESERVE.
INTERNAL_SUPERBLOCKS = 5
# Superblocks the caller's streams leave free: for collection to copy into, for the metadata log,
# and one lost to a crash.
GC_RESERVE = 3


def num_streams(geometry: Geometry) -> int:
    """Placement streams for the caller: an eighth of a small drive's superblocks, a 16th of a large one's."""
    return max(2, min(8, geometry.num_superblocks // 8), min(STREAMS_MAX, geometry.num_superblocks // 16))


def kept_back(geometry: Geometry) -> int:
    """Superblocks that may be open or have to be free."""
    return num_streams(geometry) + INTERNAL_SUPERBLOCKS


def num_lbas(geometry: Geometry) -> int:
    """Logical blocks that a drive of this geometry can always hold and overwrite.

    Raises ValueError if the flash is too small to hold any.
    """
    usable = geometry.num_pages * (100 - geometry.spare_percent) // 100
    found = usable - kept_back(geometry) * geometry.pages_per_superblock
    if geometry.parity:
        found = found * (geometry.num_dies - 1) // geometry.num_dies
    if found < 1:
        raise ValueError(f"num_superblocks: {geometry.num_superblocks} leave no room for data")
    return found


def spare_left(geometry: Geometry, usable_pages: int) -> float:
    """Share, 0 to 1, of the pages beyond the logical blocks that are left when `usable_pages` are good."""
    total = geometry.num_pages
    if geometry.parity:
        total = total * (geometry.num_dies - 1) // geometry.num_dies
    blocks = num_lbas(geometry)
    return max(0.0, (usable_pages - blocks) / (total - blocks))
