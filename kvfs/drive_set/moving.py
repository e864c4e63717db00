"""Moving one part of a sequence to another drive, in steps, while the sequence is in use.

The copy carries the mark of a half import until it is whole and durable, so a crash leaves nothing of it. Then
one transaction makes it the part: for the first part its own record, with a higher copy number than the one
before; for others the first part's record, which names the copy. Until that is durable the old copy is the
part, from then on the new one; the other is dropped, now or when the set is opened.
"""

from contextlib import suppress

from kvfs.drive_set.member import Member
from kvfs.drive_set.part_record import PartPlace, PartRecord
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.errors import KvfsError
from kvfs.sequence import Sequence
from kvfs.sequence_attributes import IMPORTING, SET_PART, SET_STATE
from spdk_glue.status import NvmeError

STEP_BYTES = 4 << 20  # copied at once: for so long other calls wait


class PartMove:
    """Of part `index`. copy: on its way to be it. done_bytes: copied so far. Everything here happens
    under the set's lock."""

    def __init__(self, drive_set, sequence: SetSequence, index: int, target: Member):
        self._set = drive_set
        self.sequence = sequence
        self.index = index
        self.target = target
        self._old_place = sequence._record.parts[index]
        newest = max(place.copy for place in sequence._record.parts)
        self._place = PartPlace(
            self._old_place.first_head, self._old_place.stop_head, target.drive_id, newest + 1
        )
        record = sequence._record.with_part(index, self._place).of(index)
        model = drive_set._part_model(target, sequence.model, self._place)
        with target.in_use(f"a copy of part of sequence {sequence.name!r}") as store:
            self.copy: Sequence = store.create_sequence(model, record.member_name, {IMPORTING: b""})
        self.is_switched = False
        sequence._move = self
        self._token_bytes = model.token_bytes
        tokens = STEP_BYTES // self._token_bytes
        group_tokens = sequence.model.group_tokens
        self._step_tokens = max(group_tokens, tokens - tokens % group_tokens)

    @property
    def _part(self) -> Sequence:
        return self.sequence._parts[self.index]

    @property
    def done_bytes(self) -> int:
        return self.copy.num_tokens * self._token_bytes

    @property
    def is_obsolete(self) -> bool:
        return self.sequence.is_deleted

    def step(self) -> bool:
        """Copy some tokens; whether the part is on the target now."""
        self.sequence._use()
        start = self.copy.num_tokens
        stop = min(start + self._step_tokens, self.sequence.num_tokens)
        is_last = stop == self.sequence.num_tokens
        layers = range(self.sequence.model.num_layers)
        stops = [self._part.layer_tokens(layer) if is_last else stop for layer in layers]
        self._set._space.reserve_copy(self.sequence, self.copy, stops)
        for layer in layers:
            self._copy_layer(layer, start, stops[layer])
        if is_last:
            self._switch()
        return is_last

    def _copy_layer(self, layer: int, start: int, stop: int) -> None:
        if start == stop:
            return
        with self._set._member(self._old_place).in_use(self.sequence._holding(self._old_place)):
            rows = self._part.read(layer, start, stop)
        with self.target.in_use(f"a copy of part of sequence {self.sequence.name!r}"):
            self.copy.append(layer, *rows)

    def cut(self, num_tokens: int) -> None:
        """The sequence was truncated."""
        if self.copy.num_tokens > num_tokens:
            with self.target.in_use(f"a copy of part of sequence {self.sequence.name!r}"):
                self.copy.truncate(num_tokens)

    def abandon(self) -> None:
        """Leave the part where it is, if it has not moved already."""
        if self.is_switched:
            return
        self.sequence._move = None
        self._set._space.settle(self.sequence)
        with suppress(KvfsError, NvmeError):  # what stays goes when the drive is opened again
            if not self.copy.is_deleted:
                self.target.store.delete_sequence(self.copy.name)

    def _switch(self) -> None:
        """The copy has all tokens: make it the part."""
        sequence, old = self.sequence, self._part
        publication = self._publication()
        record = sequence._record.with_part(self.index, self._place)
        with self.target.in_use(f"a copy of part of sequence {sequence.name!r}") as store, store._lock:
            self.copy.append_tokens(sequence.tokens)
            self.copy._state_notes[SET_STATE] = sequence._part_history.encode()
            if self.index == 0:
                for name, value in old.attributes().items():
                    if name not in (SET_PART, SET_STATE):
                        self.copy.set_attribute(name, value)
            if publication is not None:
                self.copy._publish(*publication)
            self.copy.flush()
            with store._catalogue.transaction():
                self.copy.remove_attribute(IMPORTING)
                self.copy.set_attribute(SET_PART, record.of(self.index).encode())
            if self.index == 0:
                self._is_switched(record)
            store._sync_if_needed()
        if self.index:
            place = sequence._record.parts[0]
            with self._set._member(place).in_use(sequence._holding(place)) as store, store._lock:
                sequence._parts[0].set_attribute(SET_PART, record.of(0).encode())
                self._is_switched(record)
                store._sync_if_needed()
        with self._set._member(self._old_place).in_use("a part that has moved") as store:
            store.delete_sequence(old.name)

    def _publication(self) -> tuple[str, str] | None:
        """(tenant, settings) that the part publishes with."""
        member, holding = self._set._member(self._old_place), self.sequence._holding(self._old_place)
        with member.in_use(holding) as store, store._lock:
            return store._catalogue.prefixes.publication(self._part._row.id)

    def _is_switched(self, record: PartRecord) -> None:
        """From here on the copy is the part; the old one stays until that is durable."""
        self.is_switched = True
        self.sequence._parts[self.index] = self.copy
        self.sequence._move = None
        self._set._replaced(self.sequence, record)
        self._set._space.settle(self.sequence)
