"""From the locations of a set's drives, or its file, to an open DriveSet; and making a new set."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from kvfs.drive_set import set_file
from kvfs.drive_set.drive_set import DriveSet
from kvfs.drive_set.locations import locations_of
from kvfs.drive_set.member import Member
from kvfs.drive_set.membership import Membership, agree, new_set
from kvfs.errors import DriveBusy, DriveExists, DriveMissing, InvalidArgument, KvfsError, NotInSet
from kvfs.sealing.set_sealing import take_policies
from kvfs.store import Store
from spdk_glue.status import NvmeError
from spdk_glue.transports.url import is_nvme

log = logging.getLogger(__name__)
UNAVAILABLE = (KvfsError, NvmeError)


def open_set(path, open_drive: Callable[[str], Store], degraded: bool = False, **options) -> DriveSet:
    """path: a set's file or locations; open_drive: one of its drives, raising as kvfs.open does
    degraded: also without drives that cannot be opened; what they hold is an error when it is used

    options: see DriveSet. Raises DriveMissing, NotInSet, DriveBusy, CatalogueDamaged, and of a set with one
    drive what kvfs.open raises.
    """
    locations = locations_of(path)
    name = os.fspath(path) if set_file.is_set_file(path) else locations[0]
    with ExitStack() as stack:
        lock = None
        if set_file.is_set_file(path):
            lock = set_file.SetFileLock(path)
            stack.callback(lock.close)
        stores: dict[str, Store] = {}
        failed: dict[str, str] = {}
        for location in locations:
            try:
                stores[location] = open_drive(location)
            except (InvalidArgument, DriveBusy):
                raise  # what is wrong with the call, or in use elsewhere, is not missing
            except UNAVAILABLE as error:
                failed[location] = " ".join(str(error).split())
                continue
            stack.callback(stores[location].close)
        if not stores:
            raise DriveMissing(name, list(failed), next(iter(failed.values())))
        membership = agree({location: _membership(store, location) for location, store in stores.items()})
        members = _members(membership, stores, failed)
        lost = [member for member in members if member.lost is not None]
        if lost and not degraded:
            raise DriveMissing(name, [member.location for member in lost], lost[0].lost)
        _catch_up(membership, members)
        stack.pop_all()
    return _made(path, name, members, membership, open_drive, lock, options)


def _made(path, name, members, membership, open_drive, lock, options) -> DriveSet:
    if lock is None:
        return DriveSet(name, members, membership, open_drive, **options)

    def on_change(changed: Membership) -> None:
        set_file.write(path, list(changed.drives.values()))
        lock.replaced()

    return DriveSet(name, members, membership, open_drive, on_change=on_change, on_close=lock.close, **options)


def _membership(store: Store, location: str) -> Membership | None:
    record = store._catalogue.membership()
    return None if record is None else Membership.decode(record, location)


def _members(membership: Membership, stores: dict[str, Store], failed: dict[str, str]) -> list[Member]:
    """In the set's own order."""
    by_drive = {_membership(store, location).drive_id: location for location, store in stores.items()}
    members, failed = [], dict(failed)
    for drive_id, known in membership.drives.items():
        location = by_drive.get(drive_id)
        if location is not None:
            members.append(Member(drive_id, location, stores[location]))
            continue
        # which of those that could not be opened it is: by its name, else any
        where = known if known in failed else next(iter(failed), known)
        why = failed.pop(where, "it was not named, though it is one of the set")
        members.append(Member(drive_id, where, None, why))
    if failed:
        location, why = next(iter(failed.items()))
        raise NotInSet(location, f"cannot be opened, and no drive of the set is missing: {why}")
    return members


def _catch_up(membership: Membership, members: list[Member]) -> None:
    """What a crash or their absence has kept from some drives, or where they have been moved to."""
    live = [member for member in members if member.lost is None]
    known = {member.drive_id: _membership(member.store, member.location) for member in live}
    newest = next(m for m in live if known[m.drive_id].generation == membership.generation)
    for member in live:
        wanted = membership.of(member.drive_id)
        if known[member.drive_id] != wanted:
            if known[member.drive_id].generation < membership.generation:
                take_policies(member.store, newest.store)
            with member.store._lock:
                member.store._catalogue.set_membership(wanted.encode())
                member.store._sync_if_needed()


def join_new(locations: Sequence[str], open_drive: Callable[[str], Store]) -> None:
    """Make a set of drives that were just formatted."""
    membership = new_set(locations)
    for drive_id, location in membership.drives.items():
        with open_drive(location) as store:
            store._catalogue.set_membership(replace(membership, drive_id=drive_id).encode())


def check_formattable(locations: Sequence[str]) -> None:
    """Before anything is made: no file is there already. Raises DriveExists, NotInSet."""
    for location in locations_of(locations):
        if not is_nvme(location) and Path(location).exists():
            raise DriveExists(location)
