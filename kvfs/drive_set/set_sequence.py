"""A sequence of a set of drives: parts with some of the KV heads each, kept at one length."""

import operator
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs.arrays import Array, Pair, check_finite, float_array, output_arrays, to_storage, token_id_array
from kvfs.drive_set.part_record import History, PartPlace, PartRecord, new_uid
from kvfs.drive_set.part_settings import part_settings
from kvfs.errors import DriveLost, InvalidArgument
from kvfs.head_pieces import HeadRows
from kvfs.model import Model
from kvfs.prefix.hashing import settings_text
from kvfs.prefix.match import check_tenant
from kvfs.sealing.set_sealing import SealedSetSequence
from kvfs.sequence import Sequence
from kvfs.sequence_attributes import SET_PART, SET_STATE, TENANT, check_attribute
from kvfs.sequence_version import History as Versions
from kvfs.sequence_version import Version
from kvfs.telemetry.requests import request

if TYPE_CHECKING:
    from kvfs.drive_set.drive_set import DriveSet

_OWN_ATTRIBUTES = (SET_PART, SET_STATE)


class SetSequence(SealedSetSequence):
    """As kvfs.Sequence. Made by DriveSet; valid until deleted or the set closes.

    record: of its first part; parts: in the order of their heads, None where the drive is missing
    """

    def __init__(
        self,
        store: "DriveSet",
        model: Model,
        record: PartRecord,
        parts: list[Sequence | None],
        history: History,
    ):
        self._store = store
        self.model = model
        self._record = record
        self._parts = parts
        self._part_history = history
        self._versions = Versions()
        self._is_uneven = False  # a change has reached some parts and not others
        self._deleted = False
        self._move = None  # of a part to another drive, under way: moving.PartMove

    def __repr__(self) -> str:
        places = ", ".join(self._store._member(place).location for place in self._record.parts)
        return f"<Sequence {self.name!r} of {self.model.name!r}, {self.num_tokens} tokens, on {places}>"

    # facts

    @property
    def store(self) -> "DriveSet":
        """The store that it is in."""
        return self._store

    @property
    def id(self) -> int:
        return self._record.uid

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def _reachable(self) -> list[Sequence]:
        return [part for part in self._parts if part is not None]

    @property
    def created_ns(self) -> int:
        return self._reachable[0].created_ns

    @property
    def changed_ns(self) -> int:
        """When tokens were last appended or cut off, in ns since the epoch."""
        return max(part.changed_ns for part in self._reachable)

    @property
    def is_deleted(self) -> bool:
        return self._deleted

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has."""
        return min(part.num_tokens for part in self._reachable)

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [any number]: token ids given to append_tokens. Kept beside the KV, not checked against it."""
        return self._reachable[0].tokens

    @property
    def num_token_ids(self) -> int:
        return self._reachable[0].num_token_ids

    def version(self) -> Version:
        """What the sequence holds now, in complete tokens."""
        with self._store._lock:
            return Version(self.num_tokens, self._versions.epoch)

    def holds(self, version: Version) -> bool:
        """Whether the tokens of a version are all still there, unchanged."""
        with self._store._lock:
            return not self._deleted and self._versions.holds(version)

    def layer_tokens(self, layer: int) -> int:
        """Tokens that one layer has; layers differ while a model's forward pass runs."""
        return min(part.layer_tokens(layer) for part in self._reachable)

    # what all operations need

    def _check_usable(self) -> None:
        self._store._check_open()
        if self._deleted:
            raise InvalidArgument(f"sequence {self.name!r} was deleted")

    def _holding(self, place: PartPlace) -> str:
        """What a drive has of it, in words."""
        return f"KV heads {place.first_head} to {place.stop_head - 1} of sequence {self.name!r}"

    def _check_whole(self) -> None:
        """Raises DriveLost naming the drive that has a part and cannot be used."""
        for place in self._record.parts:
            member = self._store._member(place)
            if member.lost is not None:
                raise DriveLost(member.location, self._holding(place), member.lost)

    def _use(self) -> None:
        """Check that the sequence can be used, with all parts at one length."""
        self._check_usable()
        self._check_whole()
        if self._is_uneven:
            self._cut_to(self.num_tokens, self.tokens)
        self._store._space.used(self.id)

    def _on_parts(self, job: Callable[[Sequence, PartPlace], object]) -> list:
        """What a job gives for every part, on all drives at once."""

        def run(part, place):
            with self._store._member(place).in_use(self._holding(place)):
                return job(part, place)

        pairs = list(zip(self._parts, self._record.parts, strict=True))
        return self._store._at_once([lambda pair=pair: run(*pair) for pair in pairs])

    # growing

    @request("append", of="_store")
    def append(self, layer: int, keys: Array, values: Array) -> None:
        """As kvfs.Sequence.append: all drives take the tokens, or none does."""
        with self._store._lock:
            self._use()
            geometry = self.model.geometry
            layer = geometry.check_layer(layer)
            shape = (None, geometry.num_kv_heads, geometry.head_dim)
            meaning = "[num_tokens, num_kv_heads, head_dim]"
            keys = float_array(keys, "keys", shape, meaning, geometry.numpy_dtype)
            values = float_array(values, "values", (len(keys), *shape[1:]), meaning, geometry.numpy_dtype)
            if geometry.is_quantized:
                keys, values = (to_storage(rows, geometry.numpy_dtype) for rows in (keys, values))
                check_finite(keys, "keys", geometry.dtype)
                check_finite(values, "values", geometry.dtype)
            self._reserve(layer, len(keys))
            self._is_uneven = True
            for part, place in zip(self._parts, self._record.parts, strict=True):
                heads = slice(place.first_head, place.stop_head)
                with self._store._member(place).in_use(self._holding(place)):
                    part.append(layer, keys[:, heads], values[:, heads])
            self._is_uneven = False

    def append_tokens(self, token_ids: Array) -> None:
        """Keep token ids beside the KV: what a later prefill needs to know which tokens are here."""
        with self._store._lock:
            self._use()
            token_ids = token_id_array(token_ids)
            for part in self._parts:  # each, so that every part's stored state is one of the sequence's
                part.append_tokens(token_ids)

    def _reserve(self, layer: int, num_tokens: int) -> None:
        """Make sure of space for so many more tokens of a layer, that are to come in several appends."""
        with self._store._lock:
            self._use()
            self._store._space.reserve(self, self.model.geometry.check_layer(layer), num_tokens)
            for part, place in zip(self._parts, self._record.parts, strict=True):
                with self._store._member(place).in_use(self._holding(place)):
                    part._reserve(layer, num_tokens)

    def _reserve_ahead(self, layer: int, num_bytes: int) -> int:
        """As Sequence._reserve_ahead."""
        with self._store._lock:
            if self._deleted or self._store._space.quotas:
                return 0
            self._use()
            share = num_bytes // len(self._parts)
            return min(part._reserve_ahead(layer, share) for part in self._parts)

    # reading

    @request("read", of="_store")
    def read(
        self, layer: int, start: int = 0, stop: int | None = None, out: Pair | None = None
    ) -> tuple[Any, Any]:
        """As kvfs.Sequence.read, of all drives at once."""
        with self._store._lock:
            self._use()
            geometry = self.model.geometry
            layer = geometry.check_layer(layer)
            limit = self.layer_tokens(layer)
            start, stop = operator.index(start), limit if stop is None else operator.index(stop)
            if not 0 <= start <= stop <= limit:
                raise InvalidArgument(f"tokens [{start}, {stop}) of a layer that has {limit}")
            if len(self._parts) == 1:
                return self._on_parts(lambda part, _: part.read(layer, start, stop, out))[0]
            shape = (stop - start, geometry.num_kv_heads, geometry.head_dim)
            keys, values = output_arrays(out, ("keys", "values"), (shape, shape), geometry.numpy_dtype)

            def read(part, place):
                heads = slice(place.first_head, place.stop_head)
                keys[:, heads], values[:, heads] = part.read(layer, start, stop)

            self._on_parts(read)
            return (keys, values) if out is None else tuple(out)

    def read_heads(self, pieces: Items[HeadRows]) -> memoryview:
        """As kvfs.Sequence.read_heads. The set is free for others while flash is read."""
        while True:
            with self._store._lock:
                self._use()
                for piece in pieces:
                    if not 0 <= piece.head < self.model.num_kv_heads:
                        raise InvalidArgument(f"no layer {piece.layer} with KV head {piece.head}")
                parts, record = list(self._parts), self._record
            try:
                return self._read_heads(pieces, parts, record.parts)
            except InvalidArgument:
                if self._deleted or self._record is record:
                    raise  # else a part has moved meanwhile: it is elsewhere now

    def _read_heads(self, pieces, parts: list[Sequence], places: tuple[PartPlace, ...]) -> memoryview:
        of_part: dict[int, list[int]] = {}  # positions of pieces by the part that has them
        for position, piece in enumerate(pieces):
            index = next(
                i for i, place in enumerate(places) if place.first_head <= piece.head < place.stop_head
            )
            of_part.setdefault(index, []).append(position)

        def read(index: int) -> memoryview:
            place = places[index]
            wanted = [replace(pieces[p], head=pieces[p].head - place.first_head) for p in of_part[index]]
            with self._store._member(place).in_use(self._holding(place)):
                return parts[index].read_heads(wanted)

        found = self._store._at_once([lambda index=index: read(index) for index in of_part])
        if len(found) == 1:  # all of one drive: in the order that was asked for
            return found[0]
        row_bytes = self.model.layout.row_bytes
        sizes = [(piece.stop - piece.start) * row_bytes for piece in pieces]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        rows = bytearray(offsets[-1])
        for positions, data in zip(of_part.values(), found, strict=True):
            taken = 0
            for position in positions:
                rows[offsets[position] : offsets[position + 1]] = data[taken : taken + sizes[position]]
                taken += sizes[position]
        return memoryview(rows)

    # attributes, which are the first part's

    def _first(self) -> Sequence:
        self._check_usable()
        place = self._record.parts[0]
        member = self._store._member(place)
        if member.lost is not None:
            raise DriveLost(member.location, f"the attributes of sequence {self.name!r}", member.lost)
        return self._parts[0]

    def attributes(self) -> dict[str, bytes]:
        """What users and kvfs note about the sequence, by name; see sequence_attributes.py."""
        with self._store._lock:
            found = self._first().attributes()
            return {name: value for name, value in found.items() if name not in _OWN_ATTRIBUTES}

    def set_attribute(self, name: str, value: bytes) -> None:
        """Durable after the next flush. Raises InvalidArgument."""
        with self._store._lock:
            if name in _OWN_ATTRIBUTES:
                raise InvalidArgument(f"attribute {name} is the set's own")
            first = self._first()
            check_attribute(name, value)
            if name == TENANT:
                self._store._space.reserve_move(self, value.decode())
            first.set_attribute(name, value)
            self._store._space.note_attributes(self)

    def remove_attribute(self, name: str) -> None:
        """Forget an attribute if there is one."""
        with self._store._lock:
            if name in _OWN_ATTRIBUTES:
                raise InvalidArgument(f"attribute {name} is the set's own")
            first = self._first()
            if name == TENANT:
                self._store._space.reserve_move(self, "")
            first.remove_attribute(name)
            self._store._space.note_attributes(self)

    # durability

    @request("flush", of="_store")
    def flush(self) -> None:
        """Everything appended so far, in complete tokens, survives a kill or a power cut from here on."""
        with self._store._lock:
            self._use()
            self._store._flush_sequence(self)

    def _settled(self) -> None:
        """All parts have stored what is now."""
        self._part_history.settled()
        self._store._space.settle(self)

    # shortening and sharing

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens. Raises InvalidArgument if a layer has fewer."""
        with self._store._lock:
            self._use()
            if not isinstance(num_tokens, (int, np.integer)) or not 0 <= num_tokens <= self.num_tokens:
                raise InvalidArgument(f"a sequence of {self.num_tokens} tokens cannot keep {num_tokens!r}")
            self._store._space.reserve_cut(self, int(num_tokens))
            self._cut_to(int(num_tokens), self.tokens[:num_tokens])

    def _cut_to(self, num_tokens: int, token_ids: np.ndarray) -> None:
        """Bring all parts to these: whatever can fail does so before anything changes."""
        cut: dict[Sequence, list] = {}

        def cut_layers(part, _):
            part._use()
            cut[part] = part._cut_layers(num_tokens)

        try:
            self._on_parts(cut_layers)
        except BaseException:
            for tail in chain.from_iterable(cut.values()):
                tail.clear()
            raise
        self._part_history.cut(num_tokens, len(token_ids))
        for part in self._parts:
            part._keep(num_tokens, cut[part])
            if len(part._tokens) != len(token_ids):
                part._tokens, part._tokens_changed_from = token_ids.copy(), 0
        self._note_state()
        self._versions.cut(num_tokens)
        self._is_uneven = False
        if self._move is not None:
            self._move.cut(num_tokens)

    def _note_state(self) -> None:
        """What the parts' next stored states say of the truncations that they have seen."""
        note = self._part_history.encode()
        for part in self._parts:
            part._state_notes[SET_STATE] = note

    def fork(self, name: str) -> "SetSequence":
        """A new sequence with the same tokens. Whole groups are shared, nothing of them is copied.

        It has this one's attributes too, except those that say how long to keep it, and its parts are where
        this one's are.
        """
        with self._store._lock:
            self._use()
            self._store._check_new_name(name)
            record = PartRecord(new_uid(), name, self.model.name, 0, 0, self._record.layout)
            tenant = self.attributes().get(TENANT, b"").decode()
            self._store._space.reserve_new(self.model, record.layout, tenant, self.num_tokens, {self.id})

            def fork(index: int, part_record: PartRecord) -> Sequence:
                attributes = {SET_PART: part_record.encode()}
                return self._parts[index]._fork(part_record.member_name, attributes)

            return self._store._make(self.model, record, fork)

    def publish(self, tenant: str | None = None, settings: Mapping[str, Any] | None = None) -> int:
        """As kvfs.Sequence.publish: each drive notes what it has. What is found is what all of them have."""
        settings_json = settings_text(settings)
        with self._store._lock:
            self._use()
            if tenant is None:
                tenant = self.attributes().get(TENANT, b"").decode()
            check_tenant(tenant)
            return min(
                self._on_parts(lambda part, place: part._publish(tenant, part_settings(place, settings_json)))
            )

    def compact(self) -> None:
        """Have each drive rewrite its part's whole groups so that each layer reads in long runs."""
        with self._store._lock:
            self._use()
            self._on_parts(lambda part, _: part.compact())
