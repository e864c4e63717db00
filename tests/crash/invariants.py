"""No block is lost or named twice: free blocks, catalogue and flash agree."""

from collections import Counter

import numpy as np

from kvfs.drive_set.drive_set import DriveSet
from kvfs.store import Store

from .oracle import Lost


def check_space(store: Store | DriveSet) -> None:
    """Raises Lost unless every data block is in one place, and the flash maps no block that nobody owns.

    Owners: the catalogue, groups reserved for what has not been stored yet, blocks held until the catalogue
    that forgets them is durable. All else must be free. Of a set of drives this holds for each.
    """
    if isinstance(store, DriveSet):
        for member in store._live:
            check_space(member.store)
        return
    store._catalogue._end_batch()  # what files have changed is in rows then
    store._objects.write_rows()
    _check_sharing(store)
    allocator, first = store._allocator, store._volume.first_data_lba
    owners = np.zeros(store._namespace.num_lbas, np.int8)

    def own(extents) -> None:
        for start, count in extents:
            owners[start : start + count] += 1

    own(store._catalogue.used_extents())
    own(allocator._held)
    own(store._sealing.extents_in_memory())
    if store._files is not None:
        own(store._files.extents_in_memory())
    for sequence in store._sequences.values():
        own((group.base_lba, group.num_lbas) for group in sequence._groups if group.id is None)
    owned = owners > 0
    free = np.zeros_like(owned)
    for start, stop in zip(allocator._starts, allocator._stops, strict=True):
        if free[start:stop].any():
            raise Lost(f"blocks {start} to {stop - 1} are free twice")
        free[start:stop] = True
    if (owners > 1).any():
        raise Lost(f"block {np.argmax(owners > 1)} has two owners")
    if (owned & free).any():
        raise Lost(f"block {np.argmax(owned & free)} is in use and free")
    leaked = ~owned & ~free
    leaked[:first] = False
    if leaked.any():
        raise Lost(f"block {np.argmax(leaked)} is neither free nor in use: {np.count_nonzero(leaked)} leaked")
    mapped = store._drive.ftl.resolve(np.arange(len(owned))) >= 0
    mapped[:first] = False
    if (mapped & free).any():
        count = np.count_nonzero(mapped & free)
        raise Lost(f"flash keeps {count} blocks that nobody owns, block {np.argmax(mapped & free)} first")


def _check_sharing(store: Store) -> None:
    """A group that several sequences have is whole: else each would append to it."""
    catalogue = store._catalogue
    group_tokens = {row.id: row.geometry.group_tokens for row in catalogue.models()}
    rows = {row.id: row for row in catalogue.sequences()}
    links = list(catalogue.links())
    num_sharers = Counter(group_id for _, _, group_id, _, _ in links)
    for sequence_id, position, group_id, _, _ in links:
        row = rows[sequence_id]
        if num_sharers[group_id] > 1 and row.num_spilled < (position + 1) * group_tokens[row.model_id]:
            raise Lost(f"{row.name!r} shares group {group_id}, which it has a part of")
