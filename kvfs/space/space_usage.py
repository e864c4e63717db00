"""What a drive's space is taken by, in two sums that both come to all of its flash.

`blocks`: what logical blocks are for, and the flash that is reserved beyond them. `pages`: what state the flash
is in. Garbage is in the second alone: it lies in pages whose blocks are free, or have newer pages elsewhere.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spdk_glue.flash_admin import FlashAdmin

if TYPE_CHECKING:
    from kvfs.store import Store


@dataclass(frozen=True)
class SpaceUsage:
    """Of one drive, in bytes.

    media_bytes: all flash
    blocks: groups, tails (records of tokens that fill no group yet), derived (made of groups, and given up when
        space is short), objects, files, catalogue (header, database and log, used or not), given_up (free after
        the next flush), free, reserved (flash beyond the logical blocks: parity, map, spare); together
        media_bytes
    pages: live, garbage (waits for collection), open (in superblocks being written, not live: room and
        garbage), erased, map (the translation layer's own), parity, bad; together media_bytes
    """

    drive: str
    media_bytes: int
    blocks: dict[str, int]
    pages: dict[str, int]


def space_usage(store: "Store") -> SpaceUsage:
    """With the store's lock."""
    store._objects.write_rows()  # what is in memory alone would be counted neither here nor there
    flash = FlashAdmin(store._namespace)
    health, superblocks = flash.health(), flash.superblocks()
    media_bytes = int(health["num_pages"]) * int(health["page_size"])
    block_bytes = store._namespace.block_bytes
    blocks = {name: lbas * block_bytes for name, lbas in _blocks(store).items()}
    blocks["reserved"] = media_bytes - store._namespace.num_lbas * block_bytes
    pages = {name: count * int(health["page_size"]) for name, count in _pages(health, superblocks).items()}
    return SpaceUsage(store.path, media_bytes, blocks, pages)


def _blocks(store: "Store") -> dict[str, int]:
    totals, allocator = store._catalogue.row_totals, store._allocator
    unnamed = sum(
        group.num_lbas for each in store._sequences.values() for group in each._groups if group.id is None
    )
    given_up = sum(count for _, count in allocator.held_extents) + store._objects.leaving_lbas
    blocks = {
        "groups": totals.of("group").num_lbas + unnamed,
        "tails": sum(each.num_lbas for each in totals.sequences().values()),
        "derived": store._sealing.num_lbas_in_all + store._sealing.num_lbas_under_way,
        "objects": totals.of("object").num_lbas + store._objects.under_way_lbas,
        "files": 0,
        "catalogue": store._volume.first_data_lba,
        "given_up": given_up,
        "free": allocator.free_lbas - sum(count for _, count in allocator.held_extents),
    }
    # rows of files follow what is in memory, by the batch: the allocator knows both
    blocks["files"] = store._namespace.num_lbas - sum(blocks.values())
    return blocks


def _pages(health: np.void, superblocks: np.ndarray) -> dict[str, int]:
    """health: FLASH_HEALTH_LOG; superblocks: SUPERBLOCK_RECORD [num_superblocks]."""
    per_superblock = int(health["num_pages"]) // int(health["num_superblocks"])
    per_erase_block = int(health["num_pages"]) // int(health["num_erase_blocks"])
    state = superblocks["state"]
    live = superblocks["valid_pages"].astype(np.int64)
    is_bad = state == b"bad"
    bad = np.where(is_bad, per_superblock - live, superblocks["bad_erase_blocks"] * per_erase_block)
    # of those of a drive without parity, or of which only the rest is good, nothing is left for it
    capacity = np.where(is_bad, live, np.minimum(superblocks["capacity_pages"], per_superblock - bad))
    rest = np.maximum(capacity - live, 0)
    parity = per_superblock - bad - live - rest

    def of(*names: bytes) -> int:
        return int(rest[np.isin(state, names)].sum())

    return {
        "live": int(live.sum()),
        "garbage": of(b"full", b"erasing", b"quarantined"),
        "open": of(b"open"),
        "erased": of(b"free"),
        "map": of(b"log"),
        "parity": int(parity.sum()),
        "bad": int(bad.sum() + rest[is_bad].sum()),
    }
