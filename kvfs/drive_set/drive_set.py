"""A store over several drives, each a complete store of its own.

The set deals out the KV heads of a sequence, gives all drives their part of each call before it waits for any,
and puts their answers together. What it knows is on the drives: membership.py, part_record.py, recovery.py.
Parts of the class: taking_up.py, flushing.py, set_attention.py.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from kvfs.drive_set.counters import set_counters
from kvfs.drive_set.drives import Drives
from kvfs.drive_set.flushing import Flushing
from kvfs.drive_set.member import Member
from kvfs.drive_set.membership import Membership
from kvfs.drive_set.part_record import History as PartHistory
from kvfs.drive_set.part_record import Layout, PartPlace, PartRecord, new_uid
from kvfs.drive_set.returning import Returning
from kvfs.drive_set.set_attention import SetAttention
from kvfs.drive_set.set_objects import SetObjects, SetObjectStore
from kvfs.drive_set.set_prefixes import SetPrefixes, SetPrefixReuse
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.drive_set.spreading import Candidate, spread
from kvfs.drive_set.taking_up import TakingUp
from kvfs.errors import (
    DriveLost,
    InvalidArgument,
    KvfsError,
    NoSuchModel,
    NoSuchSequence,
    NotInSet,
    SequenceExists,
    StoreClosed,
)
from kvfs.layout import KvGeometry, default_group_tokens
from kvfs.metadata import SequenceRow
from kvfs.model import Model, check_name
from kvfs.sealing.interface import derives_of, names_of
from kvfs.sealing.set_sealing import SetSealing
from kvfs.sequence_attributes import SET_PART, SET_STATE, check_attribute
from kvfs.space.background import EVERY_SECONDS, BackgroundEvictor
from kvfs.space.set_caps import SetCaps
from kvfs.space.set_space import SetSpace
from kvfs.store import Store
from kvfs.telemetry.requests import Requests
from kvfs.telemetry.set_telemetry import VisibleSet
from spdk_glue.request_id import carried
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)

OpenDrive = Callable[[str], Store]
MAX_THREADS = 64


class DriveSet(
    SetPrefixReuse, SetObjectStore, SetSealing, SetSpace, TakingUp, Flushing, SetAttention, VisibleSet
):
    """As kvfs.Store. Safe to call from several threads. Use as a context manager, or call `close`.

    drives: what administrators do with them, see drives.py
    """

    def __init__(
        self,
        path: str | os.PathLike,
        members: Sequence[Member],
        membership: Membership,
        open_drive: OpenDrive,
        *,
        in_threads: bool = True,
        evict_every_s: float | None = EVERY_SECONDS,
        on_change: Callable[[Membership], None] = lambda membership: None,
        on_close: Callable[[], None] = lambda: None,
    ):
        """path: for messages; members: open, in the order of the membership; they are the set's from here on

        in_threads: False: everything happens in the caller's, one drive after another, and nothing unasked
        evict_every_s: see kvfs.open
        on_change: told of a new membership; on_close: called at the end

        Raises NotInSet, CatalogueDamaged.
        """
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._closed = False
        self._requests = Requests()
        self.membership = membership
        self._members: dict[str, Member] = {member.drive_id: member for member in members}
        self._open_drive = open_drive
        self._in_threads = in_threads
        # as many threads as have been busy at once, at most one for each of many drives
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="kvfs-drive-set")
        self._on_change, self._on_close = on_change, on_close
        self._models: dict[str, Model] = {}
        self._placed: dict[str, PartRecord] = {}  # every sequence's first record, by name
        self._sequences: dict[str, SetSequence] = {}  # those that are open
        self._layouts: Counter[tuple[str, Layout]] = Counter()  # of all sequences, with the model's name
        self._forgotten: set[int] = set()  # deleted while a drive with parts was lost
        self._freed_names: dict[str, Member] = {}  # not yet durably free on these drives
        self._turn = 0  # whose answer is fetched first
        self.drives = Drives(self)
        self._prefixes = SetPrefixes(self)
        self._objects = SetObjects(self)
        self._space = SetCaps(self)
        self._returning = Returning(self)
        try:
            self._check_formats()
            self._learn_models()
            self._recover()
            self._objects.take_up()
        except BaseException:
            self._close_members(abandon=True)
            raise
        for member in members:
            self._look_after(member)
        self._evictor = BackgroundEvictor(self, evict_every_s if in_threads else None)
        self._evictor.begin()

    def __enter__(self) -> "DriveSet":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed

    # drives

    def _look_after(self, member: Member) -> None:
        """Once it is lost, also if it is already, it is waited for."""
        if self._in_threads:
            member.on_lost = self._returning.begin
            self._returning.begin()

    def _member(self, place: PartPlace) -> Member:
        return self._members[place.drive_id]

    @property
    def _live(self) -> list[Member]:
        return [member for member in self._members.values() if member.lost is None]

    @property
    def _block_bytes(self) -> int:
        return self._live[0].store._namespace.block_bytes

    def _check_formats(self) -> None:
        if not self._live:
            raise NotInSet(self.path, "none of its drives can be used")
        for member in self._live:
            found = member.store._namespace.block_bytes
            if found != self._block_bytes:
                first = self._live[0].location
                why = (
                    f"has blocks of {found} bytes, {first} of {self._block_bytes}: they go into different sets"
                )
                raise NotInSet(member.location, why)

    def _at_once(self, jobs: Sequence[Callable[[], object]]) -> list:
        """What the jobs give; each drive has its own thread. All have ended when the first error is raised."""
        if len(jobs) <= 1 or not self._in_threads:
            return [job() for job in jobs]
        futures = [self._threads.submit(carried(job)) for job in jobs[1:]]
        results: list = []
        error: BaseException | None = None
        for run in [jobs[0], *(future.result for future in futures)]:
            try:
                results.append(run())
            except BaseException as raised:
                error = error or raised
        if error is not None:
            raise error
        return results

    @property
    def _file_store(self) -> Store:
        """The store of the drive with the ordinary files. Raises DriveLost."""
        member = self._members[self.membership.files]
        if member.lost is not None:
            raise DriveLost(member.location, "the set's ordinary files", member.lost)
        return member.store

    # models

    def add_model(
        self,
        name: str,
        *,
        num_layers: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float16",
        group_tokens: int | None = None,
        seal: Iterable[str] | None = None,
    ) -> Model:
        """See Store.add_model."""
        with self._lock:
            self._check_open()
            check_name(name, "model")
            if group_tokens is None:
                group_tokens = default_group_tokens(dtype, head_dim, self._block_bytes)
            geometry = KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens)
            derives = None if seal is None else derives_of(seal)
            model = self._know_model(name, geometry)
            if derives is not None:
                self.set_sealing(model, names_of(derives))
            return model

    def model(self, name: str) -> Model:
        with self._lock:
            self._check_open()
            if name not in self._models:
                raise NoSuchModel(name)
            return self._models[name]

    def models(self) -> list[Model]:
        with self._lock:
            self._check_open()
            return sorted(self._models.values(), key=lambda model: model.name)

    def _part_model(self, member: Member, model: Model, place: PartPlace) -> Model:
        """The model with a part's heads, on its drive."""
        num_heads = place.stop_head - place.first_head
        whole = model.geometry
        geometry = replace(whole, num_kv_heads=num_heads, num_query_heads=num_heads * whole.gqa_group_size)
        with member.in_use(f"model {model.name!r}") as store:
            part = store._add_model(f"{model.name}/{num_heads}", geometry)
            names = store.sealing(store.model(model.name))
            if store.sealing(part) != names:
                store.set_sealing(part, names)
            return part

    # sequences

    def _check_new_name(self, name: str) -> None:
        check_name(name, "sequence")
        if name in self._placed:
            raise SequenceExists(name)

    def _claim_name(self, name: str, member: Member) -> None:
        """Before a name is used on another drive than it was freed on, that is durable: a crash must not bring
        two of one name."""
        freed_on = self._freed_names.get(name)
        if freed_on not in (None, member) and freed_on.lost is None:
            with freed_on.in_use(f"a sequence that was called {name!r}") as store, store._lock:
                store._sync_if_needed()
            del self._freed_names[name]

    def create_sequence(
        self, model: Model, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> SetSequence:
        """An empty sequence, from the first with these attributes. Raises SequenceExists, InvalidArgument."""
        attributes = attributes or {}
        for attribute, value in attributes.items():
            check_attribute(attribute, value)
        with self._lock:
            self._check_open()
            self._check_own(model)
            self._check_new_name(name)
            places = spread(model.num_kv_heads, self._candidates())
            record = PartRecord(new_uid(), name, model.name, 0, 0, places)

            def create(index: int, part_record: PartRecord):
                noted = {SET_PART: part_record.encode(), **(attributes if index == 0 else {})}
                member = self._member(places[index])
                part_model = self._part_model(member, model, places[index])
                return member.store.create_sequence(part_model, part_record.member_name, noted)

            return self._make(model, record, create)

    def _layouts_of(self, model: Model) -> list[Layout]:
        """Where sequences of a model are."""
        return [layout for name, layout in self._layouts if name == model.name]

    def _candidates(self) -> list[Candidate]:
        found = []
        for member in self._live:
            if member.drive_id not in self.membership.leaving:
                free_bytes = member.store._allocator.free_lbas * self._block_bytes
                found.append(Candidate(member.drive_id, free_bytes, member.num_heads))
        if not found:
            raise InvalidArgument("every drive of the set is lost or leaving: add one")
        return found

    def _make(self, model: Model, record: PartRecord, make_part: Callable) -> SetSequence:
        """A new sequence, of all parts or none; the first part comes last."""
        self._claim_name(record.name, self._member(record.parts[0]))
        parts: list = [None] * len(record.parts)
        try:
            for index in reversed(range(len(parts))):
                place = record.parts[index]
                with self._member(place).in_use(f"part of new sequence {record.name!r}"):
                    parts[index] = make_part(index, record.of(index))
        except BaseException:
            for part in filter(None, parts):
                with suppress(KvfsError, NvmeError):  # what stays is dropped when the set is opened
                    part.store.delete_sequence(part.name)
            raise
        sequence = SetSequence(self, model, record, parts, PartHistory())
        self._placed[record.name] = record
        self._sequences[record.name] = sequence
        self._count(record, 1)
        self._space.begin(sequence)
        return sequence

    def sequence(self, name: str) -> SetSequence:
        """An existing sequence. Raises NoSuchSequence."""
        with self._lock:
            self._check_open()
            if name not in self._sequences:
                record = self._placed.get(name)
                if record is None:
                    raise NoSuchSequence(name)
                self._sequences[name] = self._opened(record)
            self._space.used(self._sequences[name].id, is_new_use=True)
            return self._sequences[name]

    def _opened(self, record: PartRecord) -> SetSequence:
        parts, newest = [], PartHistory()
        for index, place in enumerate(record.parts):
            member = self._member(place)
            if member.lost is not None:
                parts.append(None)
                continue
            with member.in_use(f"part of sequence {record.name!r}") as store:
                part = store.sequence(record.of(index).member_name)
                history = PartHistory.decode(part.attributes().get(SET_STATE))
            newest = max(newest, history, key=lambda history: history.epoch)
            parts.append(part)
        if not any(parts):
            place = record.parts[0]
            raise DriveLost(self._member(place).location, f"sequence {record.name!r}", self._member(place).lost)
        return SetSequence(self, self.model(record.model), record, parts, newest)

    def sequences(self) -> list[SetSequence]:
        """All sequences, by name. Opens each; `catalogue_rows` is the cheap way to list many."""
        with self._lock:
            self._check_open()
            return [self.sequence(name) for name in sorted(self._placed)]

    def catalogue_rows(self) -> list[SequenceRow]:
        """As Store.catalogue_rows: of every sequence what its drives have stored; no blocks."""
        with self._lock:
            self._check_open()
            stored = {}
            for member in self._live:
                with member.in_use("sequences") as store:
                    stored[member.drive_id] = {row.name: row for row in store.catalogue_rows()}
            return [
                row
                for name in sorted(self._placed)
                if (row := self._row(self._placed[name], stored)) is not None
            ]

    def _row(self, record: PartRecord, stored: dict[str, dict[str, SequenceRow]]) -> SequenceRow | None:
        names = [(place.drive_id, record.of(i).member_name) for i, place in enumerate(record.parts)]
        rows = [stored[drive_id][name] for drive_id, name in names if name in stored.get(drive_id, ())]
        if not rows:
            return None
        return SequenceRow(
            record.uid,
            self._models[record.model].id,
            record.name,
            rows[0].created_ns,
            max(row.changed_ns for row in rows),
            min(row.num_tokens for row in rows),
            min(row.num_spilled for row in rows),
            0,
            0,
        )

    def delete_sequence(self, name: str) -> None:
        """Forget a sequence; its blocks are free once the catalogues are durable.

        Raises NoSuchSequence; DriveLost if a part of it is on a lost drive: see Drives.forget.
        """
        self.delete_sequences([name])

    def delete_sequences(self, names: Iterable[str]) -> None:
        """The same of many, one by one: a drive that fails meanwhile is of one sequence only. Raises
        NoSuchSequence or DriveLost with nothing deleted, where that is known before."""
        with self._lock:
            sequences = [self.sequence(name) for name in dict.fromkeys(names)]
            for sequence in sequences:
                sequence._check_whole()
            for sequence in sequences:
                self._delete(sequence)

    def _delete(self, sequence: SetSequence) -> None:
        """All parts that can be reached, whatever one of them says."""
        record, error = sequence._record, None
        for index, place in enumerate(record.parts):
            member = self._member(place)
            if member.lost is not None:
                continue
            try:
                with member.in_use(sequence._holding(place)) as store:
                    store.delete_sequence(record.of(index).member_name)
            except (KvfsError, NvmeError) as raised:
                error = error or raised
        sequence._deleted = True
        del self._placed[record.name]
        self._sequences.pop(record.name, None)
        self._count(record, -1)
        self._space.forget(record.uid)
        if sequence._move is not None:
            sequence._move.abandon()
        self._freed_names[record.name] = self._member(record.parts[0])
        if error is not None:
            raise error

    def rename_sequence(self, old_name: str, new_name: str) -> None:
        """Raises NoSuchSequence, SequenceExists."""
        with self._lock:
            sequence = self.sequence(old_name)
            self._check_new_name(new_name)
            sequence._check_whole()
            first = self._member(sequence._record.parts[0])
            self._claim_name(new_name, first)
            record = replace(sequence._record, name=new_name)
            self._note_record(sequence, record)
            del self._placed[old_name], self._sequences[old_name]
            self._placed[new_name], self._sequences[new_name] = record, sequence
            self._freed_names[old_name] = first
            self._space.rename(record.uid, new_name)

    def _replaced(self, sequence: SetSequence, record: PartRecord) -> None:
        """A part of a sequence is elsewhere now, which its first part has noted already."""
        self._count(sequence._record, -1)
        self._placed[record.name] = sequence._record = record
        self._count(record, 1)
        self._note_record(sequence, record)

    def _note_record(self, sequence: SetSequence, record: PartRecord) -> None:
        """A sequence's new record: on its first part, where it counts; on others for when that is lost."""
        for index, place in enumerate(record.parts):
            member = self._member(place)
            if member.lost is not None:
                continue
            with member.in_use(sequence._holding(place)) as store, store._lock:
                row = sequence._parts[index]._row
                store._catalogue.set_attribute(row.id, SET_PART, record.of(index).encode())
            if index == 0:
                sequence._record = record

    # what can be seen

    def counters(self) -> dict:
        """As Store.counters: sums over the drives; `drives` has what each one is and does."""
        with self._lock:
            self._check_open()
            return set_counters(self)

    def check(self) -> list[str]:
        """What is damaged, one line each: all that Store.check says of each drive; drives that are lost; parts
        that do not belong together."""
        with self._lock:
            self._check_open()
            found = []
            for member in self._members.values():
                if member.lost is not None:
                    found.append(f"{member.location}: lost: {member.lost}")
                    continue
                with member.in_use("its sequences") as store:
                    found += [f"{member.location}: {line}" for line in store.check()]
            for name in sorted(self._placed):
                found += self._check_parts(self._placed[name])
            return found

    def _check_parts(self, record: PartRecord) -> list[str]:
        lost = [place for place in record.parts if self._member(place).lost is not None]
        if lost:
            where = ", ".join(self._member(place).location for place in lost)
            return [f"sequence {record.name!r}: {len(lost)} of {len(record.parts)} parts are on lost {where}"]
        lengths = {part.num_tokens for part in self.sequence(record.name)._parts}
        if len(lengths) > 1:
            return [f"sequence {record.name!r}: its parts have {sorted(lengths)} tokens"]
        return []
