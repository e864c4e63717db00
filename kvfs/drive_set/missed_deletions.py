"""Deletions of objects that a drive may not have durably: it was away, or has not been flushed since."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_MISSED = 1 << 16  # of a drive: beyond, all its objects count as deleted


class Deletion(NamedTuple):
    """Of a key; without one of a whole cache; without a name of all caches. identity: JSON."""

    cache: str | None = None
    identity: str = "{}"
    key: bytes | None = None


EVERYTHING = Deletion()


class MissedDeletions:
    """By drive. Used under a lock of the user's."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Deletion, None]] = defaultdict(dict)

    def of(self, drive_id: str) -> list[Deletion]:
        """In the order in which they came."""
        return [*self._of[drive_id]]

    def note(self, drive_id: str, deletion: Deletion) -> None:
        missed = self._of[drive_id]
        missed.pop(deletion, None)  # it counts from now on
        missed[deletion] = None
        if len(missed) > MAX_MISSED:
            missed.clear()
            missed[EVERYTHING] = None

    def settled(self, drive_id: str, deletions: Iterable[Deletion]) -> None:
        """The drive has these durably."""
        for deletion in deletions:
            self._of[drive_id].pop(deletion, None)

    def with_any(self, cache: str, identity: str, targets: Sequence[tuple[bytes, str]]) -> list[str]:
        """Drives that may still have, durably, an object of one of these keys that is to go to another drive.

        targets: (key, drive)
        """
        found = []
        for drive_id, missed in self._of.items():
            of_all = {Deletion(cache), EVERYTHING} & missed.keys()
            moved = (Deletion(cache, identity, key) for key, target in targets if target != drive_id)
            if missed and any(of_all or deletion in missed for deletion in moved):
                found.append(drive_id)
        return found
