"""Without parity, every data page says what was written before it in its superblock.

So a page that is gone, with its OOB, is known all the same: the flash claimed a write that it did not do, or
did elsewhere, or the die is dead. Opening maps the LBA to where the page was, and reading it is an error.
Otherwise an older version would show through, and nothing would tell.
"""

import numpy as np
from numba import njit

from ftl.layout import MAX_DISTANCE, OOB_MAGIC, PAGE_OOB, PREVIOUS_PAGE, PageKind

LOWER_HALF, HALF = np.uint64(0xFFFF_FFFF), np.uint64(32)


@njit(nogil=True, cache=True)
def _link(records, linked, last):
    lba_plus_1, version, number = last
    for index in range(len(records)):
        own, follows = records[index], linked[index]
        follows.lba_plus_1 = lba_plus_1
        follows.version = version & LOWER_HALF
        follows.distance = min(own.program_number - number, np.uint64(MAX_DISTANCE))
        lba_plus_1, version = own.lba + np.uint64(1), own.sequence_number  # LBA_NONE comes out as none
        number = own.program_number
    last[:] = lba_plus_1, version, number


class PageChain:
    """What the last page of a superblock was; nothing, at first."""

    def __init__(self) -> None:
        self._last = np.zeros(3, np.uint64)  # LBA + 1, version and program number

    def link(self, records: np.ndarray) -> None:
        """Note in PAGE_OOB [n] of pages about to be programmed, numbered already, what each of them follows."""
        _link(records, records.view(PREVIOUS_PAGE), self._last)


def _key(lba_plus_1: np.ndarray, version: np.ndarray) -> np.ndarray:
    return lba_plus_1 << HALF ^ version.astype(np.uint64) & LOWER_HALF


def keys(records: np.ndarray) -> np.ndarray:
    """uint64 [n]: of data pages, equal for those of one LBA in one version."""
    return _key(records["lba"] + np.uint64(1), records["sequence_number"])


def _are_elsewhere(data: np.ndarray, previous: np.ndarray, missed: np.ndarray) -> np.ndarray:
    """bool [n]: of pages that are missed where others name them, those that lie in a wrong place.

    What has the same version and another program number is another copy, and may be torn.
    """
    is_elsewhere = np.isin(_key(previous["lba_plus_1"], previous["version"])[missed], keys(data))
    distance = previous["distance"][missed]
    is_exact = (distance > 0) & (distance < MAX_DISTANCE)
    # program numbers are given once
    is_same = np.isin(data["program_number"][missed] - distance, data["program_number"])
    return is_elsewhere & (is_same | ~is_exact)


def vanished(records: np.ndarray, holds: np.ndarray, is_bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(PAGE_OOB [n], int64 [n] indices) of data pages that others name and that are not there.

    records: PAGE_OOB [pages_per_superblock]; holds: which of them do; is_bad: which lie on bad blocks. What is
    returned has the highest program number and the session that it can have had, and of its version the lower
    half.
    """
    own = np.flatnonzero(holds & (records["kind"] == PageKind.DATA))
    data, previous = records[own], records[own].view(PREVIOUS_PAGE)
    named = _key(previous["lba_plus_1"], previous["version"])
    missed = np.flatnonzero((previous["lba_plus_1"] != 0) & (named != np.roll(keys(data), 1)))
    missed = missed[~_are_elsewhere(data, previous, missed)]
    # before the page that names it, behind all others that do not
    last_gone = np.maximum.accumulate(np.where(holds, -1, np.arange(len(records))))
    indices = last_gone[own[missed]]
    missed, indices = missed[indices >= 0], indices[indices >= 0]
    found = np.zeros(len(missed), PAGE_OOB)
    found["magic"], found["kind"] = OOB_MAGIC, PageKind.DATA
    found["lba"] = previous["lba_plus_1"][missed] - np.uint64(1)
    found["sequence_number"] = previous["version"][missed]
    for name in ("program_number", "durable_program_number", "session"):
        found[name] = data[name][missed]
    found["program_number"] -= np.maximum(previous["distance"][missed], 1)
    if is_bad.any():
        # A batch that failed was written elsewhere, and any page of it may be missing here. It was the last one
        # here, or what follows it begins another chain.
        begun = own[previous["lba_plus_1"] == 0].max(initial=-1)
        was_accepted = found["program_number"] <= records["durable_program_number"][holds].max(initial=0)
        is_gone = ~is_bad[indices] & was_accepted & (own[missed] > begun)
        found, indices = found[is_gone], indices[is_gone]
    return found, indices


def complete_versions(records: np.ndarray, next_sequence_number: int) -> None:
    """Give what `vanished` returned the upper half of their versions: those next to the newest."""
    newest = np.uint64(next_sequence_number)
    distance = (records["sequence_number"] - newest).astype(np.uint32).astype(np.int32)
    records["sequence_number"] = np.maximum(distance.astype(np.int64) + next_sequence_number, 1)
