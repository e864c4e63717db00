"""How much of the flash is offered as logical blocks, and over how many streams it is written.

Free space is what keeps collection cheap and possible at all. Besides 7% of over-provisioning a drive keeps
back whole superblocks: one that may be open and nearly empty for each stream of the caller, for collection
and for metadata, and three that stay free so that collection and the metadata log can always open the
next, even after a crash in the middle of both.
Then closed superblocks always hold at least the 7% as garbage, so collection always gains.
"""

from ftl.geometry import Geometry

OVER_PROVISIONING = 0.07
STREAMS_MAX = 8
# Open superblocks of collection and metadata, and GC_RESERVE.
INTERNAL_SUPERBLOCKS = 5
# Superblocks the caller's streams leave free: for collection to copy into, for the metadata log,
# and one lost to a crash.
GC_RESERVE = 3


def num_streams(geometry: Geometry) -> int:
    """Placement streams for the caller: 2 to 8, fewer on small drives."""
    return max(2, min(STREAMS_MAX, geometry.num_superblocks // 8))


def num_lbas(geometry: Geometry) -> int:
    """Logical blocks that a drive of this geometry can always hold and overwrite.

    Raises ValueError if the flash is too small to hold any.
    """
    kept_back = num_streams(geometry) + INTERNAL_SUPERBLOCKS
    found = int(geometry.num_pages * (1 - OVER_PROVISIONING)) - kept_back * geometry.pages_per_superblock
    if found < 1:
        raise ValueError(f"num_superblocks: {geometry.num_superblocks} leave no room for data")
    return found
