"""Which placement identifier data get: what dies together should lie together on flash.

A drive erases a whole reclaim unit (its superblock) at a time, and copies what is still alive there first. A
sequence that is large against a reclaim unit fills units of its own, which empty at once when it goes. What
does not fill a unit shares one: short sequences with those expected to die in the same window of time, the
remainder of a long one, where its size is known, with few others. Wrong expectations cost copies, never data.
"""

from dataclasses import dataclass

PLACEMENT_IDS = 1 << 16  # NVMe: DSPEC has 16 bits
PLACEMENT_FILES = 2  # ordinary files
PLACEMENT_OBJECTS = 3  # keyed objects, of which those written together mostly go together
DEATH_CLASSES = 24  # windows ahead that are told apart: each keeps a unit open, of 64 that a drive offers
REMAINDER_IDS = 8  # so that two remainders that are written at one time seldom mix


@dataclass(frozen=True)
class Placement:
    """Where a sequence's data go: the first own_bytes to one identifier, the rest to another."""

    own_bytes: int
    own_id: int
    shared_id: int

    def identifier(self, offset_bytes: int) -> int:
        return self.own_id if offset_bytes < self.own_bytes else self.shared_id


@dataclass(frozen=True)
class PlacementPolicy:
    """reclaim_unit_bytes: what the drive erases at once
    first_id: identifiers below it are for metadata, tails and files
    horizon: how far ahead deaths are told apart, in the units of the caller's clock (seconds, bytes written);
        later ones share a class. A good value is twice the usual lifetime.
    """

    reclaim_unit_bytes: int
    first_id: int
    horizon: float

    def place(
        self, sequence_id: int, expected_bytes: int | None, now: float, expected_death: float | None
    ) -> Placement:
        """The placement of a sequence that begins now. None: not known, and taken for large."""
        first_own = self.first_id + REMAINDER_IDS + 2 * DEATH_CLASSES
        own_id = first_own + sequence_id % (PLACEMENT_IDS - first_own)
        if expected_bytes is None:
            return Placement(0, own_id, own_id)
        own_bytes = expected_bytes - expected_bytes % self.reclaim_unit_bytes
        return Placement(own_bytes, own_id, self._shared_id(sequence_id, now, expected_death))

    def _shared_id(self, sequence_id: int, now: float, expected_death: float | None) -> int:
        window = self.horizon / DEATH_CLASSES
        if expected_death is None or expected_death // window >= now // window + DEATH_CLASSES:
            return self.first_id + sequence_id % REMAINDER_IDS  # nothing speaks for an early end
        # twice as many numbers as windows ahead: one is used again long after its window
        death_class = int(expected_death // window) % (2 * DEATH_CLASSES)
        return self.first_id + REMAINDER_IDS + death_class
