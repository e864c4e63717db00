"""What is on the drives of a set when it is opened, sorted out: what makes a sequence, what is left over.

Each drive changes its own catalogue, so a crash leaves a creation, a deletion or a move half done:

- A sequence whose first part is there, and another is not though its drive is, was being made or deleted: it
  never was promised, or it was to go. Its parts are dropped.
- Parts whose first part is not there, though all drives are, are dropped for the same reason.
- Of several copies of a part that was being moved, the one that the first part's record names is it; of several
  first parts the one with the highest copy number.

Nothing of a sequence is dropped while a drive that may hold the rest of it is missing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvfs.drive_set.part_record import History, PartRecord, PartState
from kvfs.metadata import Catalogue, SequenceRow
from kvfs.sequence_attributes import SET_PART, SET_STATE


@dataclass(frozen=True)
class FoundPart:
    """A part as a drive has it stored."""

    drive_id: str
    row: SequenceRow
    record: PartRecord
    state: PartState

    @property
    def is_where_it_says(self) -> bool:
        """Whether its own record names this copy."""
        place = self.record.parts[self.record.index]
        return (place.drive_id, place.copy) == (self.drive_id, self.record.copy)


@dataclass
class Sorted:
    """whole: the true record of each sequence, and its parts by index: None for those on missing drives."""

    whole: dict[int, tuple[PartRecord, list[FoundPart | None]]] = field(default_factory=dict)
    dropped: list[FoundPart] = field(default_factory=list)


def found_parts(drive_id: str, catalogue: Catalogue) -> list[FoundPart]:
    """Raises CatalogueDamaged."""
    records, states = catalogue.values_of(SET_PART), catalogue.values_of(SET_STATE)
    token_ids = catalogue.num_token_ids()
    found = []
    for row in catalogue.sequences():
        if row.id not in records:
            continue  # nothing that a set made: left alone
        history = History.decode(states.get(row.id))
        state = PartState(history, row.num_tokens, token_ids.get(row.id, 0))
        found.append(FoundPart(drive_id, row, PartRecord.decode(records[row.id]), state))
    return found


def sort_out(parts: Iterable[FoundPart], missing: set[str]) -> Sorted:
    """missing: ids of drives of the set that are not there."""
    by_uid: dict[int, list[FoundPart]] = defaultdict(list)
    for part in parts:
        by_uid[part.record.uid].append(part)
    result = Sorted()
    for uid, found in by_uid.items():
        kept = _of_one(found, missing)
        if kept is None:
            result.dropped += found
            continue
        result.whole[uid] = kept
        result.dropped += [part for part in found if part not in kept[1]]
    return result


def _of_one(found: list[FoundPart], missing: set[str]) -> tuple[PartRecord, list[FoundPart | None]] | None:
    """The record of a sequence and its parts; None for what is no sequence, or none any more."""
    firsts = [part for part in found if part.record.is_first and part.is_where_it_says]
    if firsts:
        first = max(firsts, key=lambda part: part.record.copy)
        record = first.record
    elif missing:  # where the first part may be
        record = max((part.record for part in found), key=lambda record: max(p.copy for p in record.parts))
        record = record.of(0)
    else:
        return None
    parts = [
        next(
            (
                part
                for part in found
                if (part.record.index, part.drive_id, part.record.copy) == (index, place.drive_id, place.copy)
            ),
            None,
        )
        for index, place in enumerate(record.parts)
    ]
    for index, (part, place) in enumerate(zip(parts, record.parts, strict=True)):
        if part is None and place.drive_id not in missing:
            if firsts:
                return None
            # the record is an old one: the part has moved since, to a drive that is not there
            record = record.with_part(index, place._replace(drive_id=min(missing)))
    return record, parts
