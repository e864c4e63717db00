"""What processes that are gone have left on a drive: sequences that were to go with them."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfs.owner_process import OwnerState, described, owner_state
from kvfs.sequence_attributes import IMPORTING, OWNER

if TYPE_CHECKING:
    from kvfs.metadata import Catalogue, SequenceRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leftover:
    """A sequence. owner: in words; is_certain: nobody can be using it any more."""

    name: str
    num_tokens: int
    owner: str
    is_certain: bool


def leftover_of(name: str, num_tokens: int, owner: bytes) -> Leftover | None:
    """None while its owner runs."""
    state = owner_state(owner)
    if state is OwnerState.ALIVE:
        return None
    return Leftover(name, num_tokens, described(owner), state is OwnerState.GONE)


def leftovers_of(catalogue: "Catalogue") -> list[Leftover]:
    """By name."""
    owners = catalogue.values_of(OWNER)
    found = (leftover_of(row.name, row.num_tokens, owners[row.id]) for row in catalogue.sequences_with(OWNER))
    return sorted((each for each in found if each is not None), key=lambda each: each.name)


def left_when_opened(catalogue: "Catalogue", in_set: bool) -> "list[SequenceRow]":
    """What nobody can want when a drive is opened: half imports, and what was to go with processes that are
    gone. Of a drive of a set only the former: a part does not go alone."""
    rows = {row.id: row for row in catalogue.sequences_with(IMPORTING)}
    if not in_set:
        owners = catalogue.values_of(OWNER)
        for row in catalogue.sequences_with(OWNER) if owners else ():
            if owner_state(owners[row.id]) is OwnerState.GONE:
                log.info("sequence %s was left by %s, which is gone", row.name, described(owners[row.id]))
                rows[row.id] = row
    return list(rows.values())
