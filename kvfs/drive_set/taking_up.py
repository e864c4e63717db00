"""What is on the drives when a set is opened, or a drive comes back: models, sequences, parts to be cut."""

import logging
from dataclasses import replace

from kvfs.drive_set import recovery
from kvfs.drive_set.member import Member
from kvfs.drive_set.part_record import PartRecord, are_even, in_common
from kvfs.errors import CatalogueDamaged, NotADrive
from kvfs.layout import GroupLayout, KvGeometry
from kvfs.model import Model, check_same_geometry
from kvfs.sealing.set_sealing import take_policies

log = logging.getLogger(__name__)


class TakingUp:
    """A part of DriveSet."""

    def _learn_models(self) -> None:
        """All models that any drive knows are known to all."""
        for member in self._live:
            for model in member.store.models():
                if "/" not in model.name:
                    self._know_model(model.name, model.geometry)

    def _know_model(self, name: str, geometry: KvGeometry) -> Model:
        known = self._models.get(name)
        if known is not None:
            check_same_geometry(name, known.geometry, geometry)
        for member in self._live:
            with member.in_use(f"model {name!r}") as store:
                store._add_model(name, geometry)
        if known is None:
            layout = GroupLayout(geometry, self._block_bytes)
            known = self._models[name] = Model(
                1 + max((m.id for m in self._models.values()), default=0), name, geometry, layout
            )
        return known

    def _recover(self) -> None:
        """Find all sequences, drop what is left over, bring parts to one length."""
        parts = []
        for member in self._live:
            try:
                parts += recovery.found_parts(member.drive_id, member.store._catalogue)
            except CatalogueDamaged as error:
                raise NotADrive(member.location, str(error)) from error
        missing = {member.drive_id for member in self._members.values() if member.lost is not None}
        found = recovery.sort_out(parts, missing)
        for uid in self._forgotten & found.whole.keys():
            found.dropped += filter(None, found.whole.pop(uid)[1])
        for part in found.dropped:
            log.info("dropping what a crash left of sequence %r", part.record.name)
            self._members[part.drive_id].store.delete_sequence(part.row.name)
        self._placed.clear()
        uneven = []
        for record, kept in sorted(found.whole.values(), key=lambda pair: _age(pair[1])):
            record = self._with_free_name(record)
            self._placed[record.name] = record
            states = [part.state for part in kept if part is not None]
            if None not in kept and not are_even(states):
                uneven.append((record.name, states))
        self._count_heads()
        self._refresh_open()
        for name, states in uneven:
            common = in_common(states)
            sequence = self.sequence(name)
            token_ids = sequence._parts[common.ids_of].tokens[: common.num_token_ids]
            sequence._cut_to(common.num_tokens, token_ids)
            log.info("sequence %r: its parts were cut to the %d tokens all have", name, common.num_tokens)
        self._space.load()

    def _refresh_open(self) -> None:
        """Sequences that are open while a drive comes back get their parts on it; their users keep them."""
        by_uid = {record.uid: record for record in self._placed.values()}
        was_open, self._sequences = self._sequences, {}
        for sequence in was_open.values():
            record = by_uid.get(sequence.id)
            if record is None:
                sequence._deleted = True
                continue
            now = self._opened(record)
            # what the other drives took while it was away, a layer ahead of the others too, it does not have
            sequence._is_uneven = sequence._is_uneven or sequence._parts != now._parts
            if now.num_tokens < sequence.num_tokens:
                log.warning(
                    "sequence %r has %d tokens of %d: the others had not been flushed when a drive was lost",
                    record.name,
                    now.num_tokens,
                    sequence.num_tokens,
                )
            sequence._record, sequence._parts = record, now._parts
            newest = max(sequence._part_history, now._part_history, key=lambda history: history.epoch)
            sequence._part_history = newest
            self._sequences[record.name] = sequence

    def _rejoin(self, member: Member) -> None:
        """A drive has come back: it learns what it has missed, its parts belong to their sequences again."""
        self._check_formats()
        self._flush_members([other for other in self._live if other is not member])
        self._learn_models()
        self._take_policies(member)
        self._recover()
        self._prefixes.catch_up(member)
        self.drives._write(self.membership)
        self._objects.caught_up([member.drive_id])

    def _take_policies(self, member: Member) -> None:
        """What is sealed is as another drive has it."""
        source = next((other for other in self._live if other is not member), None)
        if source is not None:
            with source.in_use("sealing") as known, member.in_use("sealing") as store:
                take_policies(store, known)

    def _with_free_name(self, record: PartRecord) -> PartRecord:
        """Two of one name: an old record of a drive that was away, whose sequence is named anew."""
        if record.name not in self._placed:
            return record
        log.warning("two sequences are called %r: one is %r from now on", record.name, f"{record.uid:016x}")
        return replace(record, name=f"{record.uid:016x}")

    def _count_heads(self) -> None:
        for member in self._members.values():
            member.num_heads = 0
        self._layouts.clear()
        for record in self._placed.values():
            self._count(record, 1)

    def _count(self, record: PartRecord, sign: int) -> None:
        for place in record.parts:
            self._member(place).num_heads += sign * (place.stop_head - place.first_head)
        self._layouts[record.model, record.layout] += sign
        if not self._layouts[record.model, record.layout]:
            del self._layouts[record.model, record.layout]


def _age(parts) -> int:
    return min(part.row.created_ns for part in parts if part is not None)
