"""Under which settings a part of a sequence publishes: those of the sequence, and which heads it has."""

from typing import NamedTuple

from kvfs.drive_set.part_record import PartPlace


def part_settings(place: PartPlace, settings: str) -> str:
    """As the part's drive has them: [first head, stop head, settings]. settings: JSON of a mapping."""
    return f"[{place.first_head},{place.stop_head},{settings}]"


class Whole(NamedTuple):
    """What a part's scope is of: the set's model, the first of the part's heads, the sequence's settings."""

    model: str
    first_head: int
    settings: str


def whole_of(part_model: str, settings: str) -> Whole:
    """What of a drive's model and settings is the set's."""
    first_head, _, of_sequence = settings[1:-1].split(",", 2)
    return Whole(part_model.rpartition("/")[0], int(first_head), of_sequence)
