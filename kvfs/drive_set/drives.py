"""What administrators do with the drives of a set that is in use: add, drain, bring back, do without."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from kvfs.drive_set.member import Member
from kvfs.drive_set.membership import Membership, new_id
from kvfs.drive_set.moving import PartMove
from kvfs.drive_set.part_record import PartRecord
from kvfs.drive_set.recovery import found_parts
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.errors import DriveMissing, InvalidArgument, KvfsError, NotInSet, OutOfSpace
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)
STEP_SECONDS = 0.2  # of copying, after which whoever drains is told how far it is


@dataclass(frozen=True)
class Progress:
    """Of a drain: bytes moved since the last one, bytes still there."""

    moved_bytes: int
    left_bytes: int
    is_done: bool


class Drives:
    """Of a DriveSet, which is given. Drives are named by location or id."""

    def __init__(self, drive_set):
        self._set = drive_set
        self._moves: dict[str, PartMove] = {}  # under way, by the drive that is left

    def states(self) -> list[dict]:
        """Each drive's state, room and latency: see counters.py."""
        return self._set.counters()["drives"]

    def _find(self, drive: str) -> Member:
        for member in self._set._members.values():
            same_file = os.path.realpath(drive) == os.path.realpath(member.location)
            if drive in (member.location, member.drive_id) or same_file:
                return member
        known = ", ".join(member.location for member in self._set._members.values())
        raise InvalidArgument(f"{drive} is no drive of this set; there are {known}")

    # the set's own record

    def _write(self, membership: Membership, first: Member | None = None) -> None:
        """A new generation, on `first` and then on all others; durable when this returns."""
        members = [member for member in self._set._members.values() if member.drive_id in membership.drives]
        ordered = sorted(members, key=lambda member: member is not first)
        for member in ordered:
            if member.lost is None:
                self._write_to(member, membership)
        self._set.membership = membership
        self._set._objects.share()
        self._set._on_change(membership)

    def _write_to(self, member: Member, membership: Membership | None) -> None:
        with member.in_use("its record of the set") as store, store._lock:
            record = None if membership is None else membership.of(member.drive_id).encode()
            store._catalogue.set_membership(record)
            store._sync_if_needed()

    def _next(self, **changes) -> Membership:
        membership = self._set.membership
        changed = replace(membership, generation=membership.generation + 1, **changes)
        return replace(changed, behind=tuple(drive for drive in changed.behind if drive in changed.drives))

    # adding

    def add(self, location: str) -> None:
        """Take an empty drive into the set: new sequences use it from here on.

        Raises NotInSet for one with sequences or files on it, of a set already, or with other blocks; what
        kvfs.open raises.
        """
        with self._set._lock:
            self._set._check_open()
            places = [os.path.realpath(member.location) for member in self._set._members.values()]
            if os.path.realpath(location) in places:
                raise NotInSet(location, "is in this set already")
            store = self._set._open_drive(location)
            try:
                member = self._new_member(location, store)
            except BaseException:
                store.close()
                raise
            membership = self._next(drives={**self._set.membership.drives, member.drive_id: location})
            self._set._members[member.drive_id] = member
            self._set._look_after(member)
            try:
                self._write_to(member, membership)
                self._write(membership)
                for model in self._set._models.values():
                    store._add_model(model.name, model.geometry)
                self._set._take_policies(member)
                self._set._objects.add(member)
            except BaseException:
                if self._set.membership is not membership:
                    del self._set._members[member.drive_id]
                    store.close()
                raise

    def _new_member(self, location: str, store) -> Member:
        record, ours = store._catalogue.membership(), self._set.membership
        drive_id = new_id()
        if record is not None:
            known = Membership.decode(record, location)
            if known.set_id != ours.set_id or known.drive_id in ours.drives:
                raise NotInSet(location, "is one of a set already: format it to use it in this one")
            if known.generation > ours.generation:
                drive_id = known.drive_id  # a crash while it was added has left it the only one to know
            for part in found_parts(drive_id, store._catalogue):
                store.delete_sequence(part.row.name)  # it has left: what a crash has kept on it is elsewhere
            store.drop_objects()
            store.flush()  # before the record of the set, or a crash may bring them back with that
        has_objects = any(usage.objects for usage in store.object_usage())
        if store.catalogue_rows() or has_objects or store._catalogue.files.num_inodes() > 1:
            raise NotInSet(location, "is not empty: move what is on it away, or format it")
        block_bytes = store._namespace.block_bytes
        if block_bytes != self._set._block_bytes:
            why = f"has blocks of {block_bytes} bytes, this set's drives have {self._set._block_bytes}"
            raise NotInSet(location, why)
        store.drop_prefixes()  # whose they were, and of which heads, counts no more
        return Member(drive_id, location, store)

    # draining

    def drain(self, drive: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Move everything from a drive to the others, then take it out of the set, which is in use meanwhile.

        progress: called with (bytes moved, of how many). It can be ended at any time, and begun again.

        Raises InvalidArgument, OutOfSpace, DriveLost.
        """
        moved = 0
        while True:
            done = self.drain_step(drive)
            moved += done.moved_bytes
            if progress is not None:
                progress(moved, moved + done.left_bytes)
            if done.is_done:
                return

    def drain_step(self, drive: str) -> Progress:
        """Some hundred milliseconds of draining. The set is free for others between any two copies."""
        with self._set._lock:
            self._set._check_open()
            member = self._find(drive)
            self._begin_to_leave(member)
        moved, until = 0, time.monotonic() + STEP_SECONDS
        while True:
            with self._set._lock:
                left = self._on(member)
                if not left:
                    self._leave(member)
                    return Progress(moved, 0, True)
                moved += self._copy_some(member, left)
                if time.monotonic() > until:
                    return Progress(moved, self._left_bytes(member), False)

    def _begin_to_leave(self, member: Member) -> None:
        if member.lost is not None:
            raise InvalidArgument(f"{member.location} is lost: bring it back, or forget what is on it")
        if not [
            m for m in self._set._live if m is not member and m.drive_id not in self._set.membership.leaving
        ]:
            raise InvalidArgument(f"{member.location} is the last drive of the set: there is nowhere to go")
        if member.drive_id == self._set.membership.files and self._has_files(member):
            raise InvalidArgument(
                f"{member.location} has the set's ordinary files, which stay on one drive: move them away first"
            )
        if member.drive_id not in self._set.membership.leaving:
            self._write(self._next(leaving=(*self._set.membership.leaving, member.drive_id)))

    def _has_files(self, member: Member) -> bool:
        """Whether there are any, or a mount where some may be made."""
        with member.in_use("the set's ordinary files") as store, store._lock:
            return store._files is not None or store._catalogue.files.num_inodes() > 1

    def _on(self, member: Member) -> list[tuple[PartRecord, int]]:
        return [
            (record, index)
            for _, record in sorted(self._set._placed.items())
            for index, place in enumerate(record.parts)
            if place.drive_id == member.drive_id
        ]

    def _left_bytes(self, member: Member) -> int:
        """Of keys and values: what forks share counts for each."""
        total = 0
        for record, index in self._on(member):
            place = record.parts[index]
            model = self._set._models[record.model]
            share = (place.stop_head - place.first_head) / model.num_kv_heads
            total += int(self._set.sequence(record.name).num_tokens * model.token_bytes * share)
        move = self._moves.get(member.drive_id)
        return max(0, total - (move.done_bytes if move is not None else 0))

    def _copy_some(self, member: Member, left: list[tuple[PartRecord, int]]) -> int:
        """One step of the move under way, or of the next one; bytes copied."""
        move = self._moves.get(member.drive_id)
        if move is not None and (move.is_obsolete or move.target.lost is not None):
            self._moves.pop(member.drive_id).abandon()
            move = None
        if move is None:
            record, index = left[0]
            sequence = self._set.sequence(record.name)
            move = PartMove(self._set, sequence, index, self._target(member, sequence))
            self._moves[member.drive_id] = move
        before = move.done_bytes
        try:
            is_over = move.step()
        except BaseException:
            self._moves.pop(member.drive_id).abandon()
            raise
        if is_over:
            del self._moves[member.drive_id]
        return max(0, move.done_bytes - before)

    def _target(self, member: Member, sequence: SetSequence) -> Member:
        """Where there is most room, best where the sequence has no part yet."""
        has_part = {place.drive_id for place in sequence._record.parts}
        candidates = sorted(self._set._candidates(), key=lambda c: (c.drive_id in has_part, c.load))
        if not candidates:
            raise OutOfSpace(0, 0)
        return self._set._members[candidates[0].drive_id]

    def _leave(self, member: Member) -> None:
        """Nothing is on the drive any more: the others forget it, then it forgets them."""
        membership = self._set.membership
        drives = {
            drive_id: known for drive_id, known in membership.drives.items() if drive_id != member.drive_id
        }
        files = membership.files if membership.files != member.drive_id else next(iter(drives))
        leaving = tuple(drive_id for drive_id in membership.leaving if drive_id != member.drive_id)
        for other in self._set._live:
            if other is not member:
                self._set._flush_members([other])  # names that moved are durable before the drive goes
        self._write(self._next(drives=drives, files=files, leaving=leaving))
        del self._set._members[member.drive_id]
        with member.in_use("nothing any more") as store:
            store.drop_objects()
            store.flush()
            self._write_to(member, None)
            store.close()
        log.info("drive %s has left the set", member.location)

    def stay(self, drive: str) -> None:
        """End a drain before it is through: the drive takes new sequences again; what has moved stays there."""
        with self._set._lock:
            member = self._find(drive)
            move = self._moves.pop(member.drive_id, None)
            if move is not None:
                move.abandon()
            leaving = tuple(d for d in self._set.membership.leaving if d != member.drive_id)
            if leaving != self._set.membership.leaving:
                self._write(self._next(leaving=leaving))

    # lost drives

    def bring_back(self, drive: str, location: str | None = None) -> None:
        """Open a lost drive again, where it was or at another location, and take up what it holds.

        Parts that it has stored are brought to one length with the others of their sequences; what those had
        not flushed before it was lost stays as far as all have it.

        Raises NotInSet for another drive, and what kvfs.open raises.
        """
        with self._set._lock:
            self._set._check_open()
            member = self._find(drive)
            if member.lost is None:
                raise InvalidArgument(f"{member.location} is not lost")
            location = location or member.location
            member.let_go()
            try:
                store = self._set._open_drive(location)
            except (KvfsError, NvmeError) as error:
                raise DriveMissing(self._set.path, [location], " ".join(str(error).split())) from error
            try:
                record = store._catalogue.membership()
                known = Membership.decode(record, location) if record is not None else None
                if known is None or (known.set_id, known.drive_id) != (
                    self._set.membership.set_id,
                    member.drive_id,
                ):
                    raise NotInSet(location, f"is not the drive that was at {member.location}")
            except BaseException:
                store.close()
                raise
            with self._set._objects.lock:
                try:
                    self._set._objects.rejoin(member, store)
                except BaseException:
                    store._abandon()
                    raise
                member.come_back(store)
            member.location = location
            self._set._rejoin(member)

    def forget(self, sequence: str) -> None:
        """Delete a sequence of which drives with parts are lost; what they hold goes when they are back.

        Raises NoSuchSequence.
        """
        with self._set._lock:
            found = self._set.sequence(sequence)
            self._set._forgotten.add(found.id)
            self._set._delete(found)

    def remove_lost(self, drive: str) -> None:
        """Go on without a lost drive for good: sequences with parts on it are deleted.

        Raises InvalidArgument for one that is not lost, or that has the ordinary files.
        """
        with self._set._lock:
            member = self._find(drive)
            if member.lost is None:
                raise InvalidArgument(f"{member.location} is not lost: drain it")
            for record in list(self._set._placed.values()):
                if any(place.drive_id == member.drive_id for place in record.parts):
                    with suppress(KvfsError, NvmeError):
                        self._set._delete(self._set.sequence(record.name))
            membership = self._set.membership
            drives = {d: known for d, known in membership.drives.items() if d != member.drive_id}
            files = membership.files if membership.files != member.drive_id else next(iter(drives))
            leaving = tuple(d for d in membership.leaving if d != member.drive_id)
            self._write(self._next(drives=drives, files=files, leaving=leaving))
            del self._set._members[member.drive_id]
            member.let_go()
