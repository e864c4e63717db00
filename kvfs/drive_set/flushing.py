"""When what a set holds is durable: all parts of a sequence, and all names on all drives."""

from collections.abc import Sequence

from kvfs.drive_set.member import Member
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.telemetry.requests import request


class Flushing:
    """A part of DriveSet."""

    @request("flush")
    def flush(self) -> None:
        """Everything appended to any sequence so far survives a kill or a power cut from here on.

        Raises DriveLost if a drive is found lost by it, once all others are flushed; of those that were lost
        before it says nothing.
        """
        with self._lock:
            self._check_open()
            self._even_out()
            self._space.store_uses()
            self._flush_members(self._live)
            self._objects.mark_behind()
            for sequence in self._sequences.values():
                if all(self._member(place).lost is None for place in sequence._record.parts):
                    sequence._settled()

    def _even_out(self) -> None:
        for sequence in self._sequences.values():
            if sequence._is_uneven and not any(self._member(p).lost for p in sequence._record.parts):
                sequence._use()

    def _flush_members(self, members: Sequence[Member]) -> None:
        def flush(member: Member) -> None:
            deleted = self._objects.noted(member)
            with member.in_use("what was not flushed of its sequences") as store:
                store.flush()
            self._objects.settled(member, deleted)

        self._at_once([lambda member=member: flush(member) for member in members])
        self._freed_names.clear()

    def _flush_sequence(self, sequence: SetSequence) -> None:
        """Its parts; all names: one that comes back has to be right everywhere; objects, as on one drive."""
        parts: dict[str, list] = {member.drive_id: [] for member in self._live}
        for part, place in zip(sequence._parts, sequence._record.parts, strict=True):
            parts[place.drive_id].append(part)

        def flush(member: Member, own: list) -> None:
            deleted = self._objects.noted(member)
            with member.in_use(f"part of sequence {sequence.name!r}" if own else "names") as store:
                for part in own:
                    part.flush()
                with store._lock:
                    store._sync_if_needed()
            self._objects.settled(member, deleted)

        busy = [
            (member, parts[member.drive_id])
            for member in self._live
            if parts[member.drive_id]
            or member.store._catalogue.has_changes
            or member.store._objects.has_changes
        ]
        self._at_once([lambda pair=pair: flush(*pair) for pair in busy])
        self._freed_names.clear()
        self._objects.mark_behind()
        sequence._settled()

    def close(self) -> None:
        """Flush and let go of the drives. Closing twice is allowed."""
        self._evictor.close()
        self._returning.end()
        with self._lock:
            if self._closed:
                return
            try:
                self._even_out()
                self._space.store_uses()
                self._objects.mark_behind()
            finally:
                self._closed = True
                self._close_members(abandon=False)

    def _close_members(self, abandon: bool) -> None:
        """Whatever one of them says, the others are closed."""

        def close(member: Member) -> None:
            if abandon or member.lost is not None:
                member.let_go()
            else:
                with member.in_use("what was not flushed of its sequences") as store:
                    store.close()

        try:
            self._at_once([lambda member=member: close(member) for member in self._members.values()])
        finally:
            self._threads.shutdown()
            self._on_close()
