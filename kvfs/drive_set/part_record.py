"""What the parts of a sequence say of themselves, and which tokens they have in common.

A part is an ordinary sequence of one drive, with some of the KV heads. Two attributes tell what it is part of:
`set.part` which, and `set.state` where its stored tokens stand in the sequence's history. The part with head 0
is the first: its record is the truth about the sequence's name and where the other parts are.

Every part is stored by itself, so after a crash they may stand at different points of the history. Appending
never changes a token: two parts differ beyond the shorter one only, or beyond the deepest truncation that one
of them has not seen. An epoch begins with each truncation; a part notes those it has seen since all parts
agreed.
"""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from kvfs.errors import CatalogueDamaged


class PartPlace(NamedTuple):
    """KV heads [first_head, stop_head) are on a drive, as its copy number `copy` of this part."""

    first_head: int
    stop_head: int
    drive_id: str
    copy: int = 0


Layout = tuple[PartPlace, ...]  # all heads of a sequence, in their order; of what no copy counts: copy 0


@dataclass(frozen=True)
class PartRecord:
    """uid: of the sequence, whatever it is called; index: which of the parts this is."""

    uid: int
    name: str
    model: str
    index: int
    copy: int
    parts: tuple[PartPlace, ...]

    @property
    def member_name(self) -> str:
        """What the part is called on its drive."""
        return f"{self.uid:016x}-{self.index}-{self.copy}"

    @property
    def layout(self) -> Layout:
        """Where a sequence would be that has its groups."""
        return tuple(place._replace(copy=0) for place in self.parts)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, value: bytes) -> "PartRecord":
        """Raises CatalogueDamaged."""
        try:
            fields = json.loads(value)
            return cls(**{**fields, "parts": tuple(PartPlace(*part) for part in fields["parts"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CatalogueDamaged(f"part of a sequence without a good record: {error}") from error

    def of(self, index: int) -> "PartRecord":
        """The same sequence's record for another part."""
        return replace(self, index=index, copy=self.parts[index].copy)

    def with_part(self, index: int, place: PartPlace) -> "PartRecord":
        parts = (*self.parts[:index], place, *self.parts[index + 1 :])
        return replace(self, parts=parts, copy=parts[self.index].copy)


def new_uid() -> int:
    return secrets.randbits(63) or 1


class Cut(NamedTuple):
    """A truncation: the epoch that it began, and what it left."""

    epoch: int
    num_tokens: int
    num_token_ids: int


@dataclass
class History:
    """The truncations of a sequence: of `cuts` those that not all parts are known to have stored."""

    epoch: int = 0
    cuts: list[Cut] = field(default_factory=list)

    def cut(self, num_tokens: int, num_token_ids: int) -> None:
        self.epoch += 1
        while self.cuts and self.cuts[-1].num_tokens >= num_tokens:
            self.cuts.pop()  # a deeper or later one says all that it says
        self.cuts.append(Cut(self.epoch, num_tokens, num_token_ids))

    def settled(self) -> None:
        """All parts have stored what is now."""
        self.cuts.clear()

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, value: bytes | None) -> "History":
        """Raises CatalogueDamaged."""
        if value is None:
            return cls()
        try:
            fields = json.loads(value)
            return cls(int(fields["epoch"]), [Cut(*cut) for cut in fields["cuts"]])
        except (ValueError, TypeError, KeyError) as error:
            raise CatalogueDamaged(f"part of a sequence without a good state: {error}") from error


@dataclass(frozen=True)
class PartState:
    """What one part has stored."""

    history: History
    num_tokens: int
    num_token_ids: int

    @property
    def order(self) -> tuple[int, int, int]:
        """Grows along the sequence's history: within an epoch nothing becomes less."""
        return self.history.epoch, self.num_tokens, self.num_token_ids


class Common(NamedTuple):
    """What all parts can be brought to: so many tokens, with the first so many token ids of part `ids_of`."""

    num_tokens: int
    num_token_ids: int
    ids_of: int


def in_common(states: Sequence[PartState]) -> Common:
    """The newest point of the history that every part has the tokens of; never older than the oldest part's,
    but for a truncation that came after it."""
    oldest = min(range(len(states)), key=lambda index: states[index].order)
    newest = max(range(len(states)), key=lambda index: states[index].order)
    start = states[oldest]
    unseen = [cut for cut in states[newest].history.cuts if cut.epoch > start.history.epoch]
    # what was left grows along the list: the first cut is the deepest; it may have taken token ids only
    if unseen and unseen[0].num_tokens <= start.num_tokens:
        return Common(unseen[0].num_tokens, unseen[0].num_token_ids, newest)
    return Common(start.num_tokens, start.num_token_ids, oldest)


def are_even(states: Iterable[PartState]) -> bool:
    return len({state.order for state in states}) == 1
