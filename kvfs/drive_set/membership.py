"""What each drive of a set says of the set, and which of what they say is true.

The record lies in the drive's own catalogue. Changes of the set are generations: a change is written to the
drives one after another, so a crash leaves some a generation behind; the newest is the truth, and the others
catch up.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from kvfs.errors import NotInSet
from kvfs.space.background_policy import OFF, Background
from kvfs.space.space_catalogue import Quota


@dataclass(frozen=True)
class Membership:
    """set_id, drive_id: random; generation: of the set's changes, from 1 on
    drives: id to location, as last known, in the order in which heads are dealt out
    files: id of the drive with the ordinary files; leaving: ids of drives that get nothing new
    behind: ids of drives that were away when objects were deleted
    quotas, background: see space/set_caps.py
    """

    set_id: str
    drive_id: str
    generation: int
    drives: dict[str, str]
    files: str
    leaving: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    quotas: tuple[Quota, ...] = ()
    background: Background = OFF

    def encode(self) -> bytes:
        fields = asdict(self)
        for name in ("behind", "quotas"):  # absent as those know it who know no such things
            if not fields[name]:
                del fields[name]
        if not self.background.is_on:
            del fields["background"]
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, record: bytes, location: str) -> "Membership":
        """Raises NotInSet for a record that makes no sense."""
        try:
            fields = json.loads(record)
            tuples = {name: tuple(fields.get(name, ())) for name in ("leaving", "behind")}
            quotas = tuple(Quota(**quota) for quota in fields.get("quotas", ()))
            background = Background(**fields.get("background", {}))
            return cls(**{**fields, **tuples, "quotas": quotas, "background": background})
        except (ValueError, TypeError, KeyError) as error:
            raise NotInSet(location, f"its record of the set makes no sense: {error}") from error

    def of(self, drive_id: str) -> "Membership":
        """The same, as another drive has it."""
        return replace(self, drive_id=drive_id)


def new_id() -> str:
    return secrets.token_hex(8)


def new_set(locations: Sequence[str]) -> Membership:
    """A new set's first generation, as its first drive has it."""
    drives = {new_id(): location for location in locations}
    first = next(iter(drives))
    return Membership(new_id(), first, 1, drives, files=first)


def agree(found: dict[str, Membership | None]) -> Membership:
    """The truth about the set of these drives, by location. Raises NotInSet for the one that does not fit."""
    by_drive: dict[str, str] = {}
    newest: Membership | None = None
    for location, membership in found.items():
        if membership is None:
            raise NotInSet(
                location, "not one of a set of drives: add it with kvfsctl drive add, or open it alone"
            )
        if newest is not None and membership.set_id != newest.set_id:
            raise NotInSet(location, f"of another set than {next(iter(found))}")
        twin = by_drive.setdefault(membership.drive_id, location)
        if twin != location:
            raise NotInSet(location, f"the same drive as {twin}, or a copy of it: name it once")
        if newest is None or membership.generation > newest.generation:
            newest = membership
    if newest is None:
        raise NotInSet("a set of drives", "names none: it takes at least one")
    for drive_id, location in by_drive.items():
        if drive_id not in newest.drives:
            raise NotInSet(location, "was taken out of this set: leave it out, or format it to use it again")
    locations = {drive_id: by_drive.get(drive_id, known) for drive_id, known in newest.drives.items()}
    return replace(newest, drives=locations)
