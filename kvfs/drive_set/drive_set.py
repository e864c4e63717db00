"""A store over several drives, each a complete store of its own.

The set deals out the KV heads of a sequence, gives all drives their part of each call before it waits for any,
and puts their answers together. What it knows is on the drives: membership.py, part_record.py, recovery.py.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np

from kvfs.arrays import float_array
from kvfs.attention import Asked, at_once, common_model, finish, range_array, visible, windows
from kvfs.attention_scores import head_array, scoring_of, with_sinks
from kvfs.drive_set import recovery
from kvfs.drive_set.counters import set_counters
from kvfs.drive_set.drives import Drives
from kvfs.drive_set.member import Member
from kvfs.drive_set.membership import Membership
from kvfs.drive_set.part_record import History as PartHistory
from kvfs.drive_set.part_record import PartPlace, PartRecord, are_even, in_common, new_uid
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.drive_set.shares import shares_of
from kvfs.drive_set.spreading import Candidate, spread
from kvfs.errors import (
    CatalogueDamaged,
    DriveLost,
    EmptySequence,
    InvalidArgument,
    KvfsError,
    NoSuchModel,
    NoSuchSequence,
    NotADrive,
    NotInSet,
    SequenceExists,
    StoreClosed,
)
from kvfs.layout import GroupLayout, KvGeometry, default_group_tokens
from kvfs.metadata import SequenceRow
from kvfs.model import Model, check_name, check_same_geometry
from kvfs.sequence_attributes import SET_PART, SET_STATE, check_attribute
from kvfs.store import Store
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)

OpenDrive = Callable[[str], Store]
MAX_THREADS = 64


class DriveSet:
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
        on_change: Callable[[Membership], None] = lambda membership: None,
        on_close: Callable[[], None] = lambda: None,
    ):
        """path: for messages; members: open, in the order of the membership; they are the set's from here on

        in_threads: False: everything happens in the caller's, one drive after another
        on_change: told of a new membership; on_close: called at the end

        Raises NotInSet, CatalogueDamaged.
        """
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._closed = False
        self.membership = membership
        self._members: dict[str, Member] = {member.drive_id: member for member in members}
        self._open_drive = open_drive
        self._in_threads = in_threads
        self._threads: ThreadPoolExecutor | None = None
        self._on_change, self._on_close = on_change, on_close
        self._models: dict[str, Model] = {}
        self._placed: dict[str, PartRecord] = {}  # every sequence's first record, by name
        self._sequences: dict[str, SetSequence] = {}  # those that are open
        self._forgotten: set[int] = set()  # deleted while a drive with parts was lost
        self._freed_names: dict[str, Member] = {}  # not yet durably free on these drives
        self._turn = 0  # whose answer is fetched first
        self.drives = Drives(self)
        try:
            self._check_formats()
            self._learn_models()
            self._recover()
        except BaseException:
            self._close_members(abandon=True)
            raise

    def __enter__(self) -> "DriveSet":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed

    # drives

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
        futures = [self._pool().submit(job) for job in jobs[1:]]
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

    def _pool(self) -> ThreadPoolExecutor:
        """As many threads as have been busy at once, at most one for each of many drives."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="kvfs-drive-set")
        return self._threads

    @property
    def _file_store(self) -> Store:
        """The store of the drive with the ordinary files. Raises DriveLost."""
        member = self._members[self.membership.files]
        if member.lost is not None:
            raise DriveLost(member.location, "the set's ordinary files", member.lost)
        return member.store

    # what was on the drives

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
            known = self._models[name] = Model(len(self._models) + 1, name, geometry, layout)
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
            sequence._record, sequence._parts = record, now._parts
            newest = max(sequence._part_history, now._part_history, key=lambda history: history.epoch)
            sequence._part_history = newest
            self._sequences[record.name] = sequence

    def _rejoin(self, member: Member) -> None:
        """A drive has come back: it learns what it has missed, its parts belong to their sequences again."""
        self._check_formats()
        self._flush_members([other for other in self._live if other is not member])
        self._learn_models()
        self._recover()
        self.drives._write(self.membership)

    def _with_free_name(self, record: PartRecord) -> PartRecord:
        """Two of one name: an old record of a drive that was away, whose sequence is named anew."""
        if record.name not in self._placed:
            return record
        log.warning("two sequences are called %r: one is %r from now on", record.name, f"{record.uid:016x}")
        return replace(record, name=f"{record.uid:016x}")

    def _count_heads(self) -> None:
        for member in self._members.values():
            member.num_heads = 0
        for record in self._placed.values():
            self._count(record, 1)

    def _count(self, record: PartRecord, sign: int) -> None:
        for place in record.parts:
            self._member(place).num_heads += sign * (place.stop_head - place.first_head)

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
    ) -> Model:
        """See Store.add_model."""
        with self._lock:
            self._check_open()
            check_name(name, "model")
            if group_tokens is None:
                group_tokens = default_group_tokens(dtype, head_dim, self._block_bytes)
            geometry = KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens)
            return self._know_model(name, geometry)

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
            return store._add_model(f"{model.name}/{num_heads}", geometry)

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
            if not isinstance(model, Model) or self._models.get(model.name) is not model:
                raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")
            self._check_new_name(name)
            places = spread(model.num_kv_heads, self._candidates())
            record = PartRecord(new_uid(), name, model.name, 0, 0, places)

            def create(index: int, part_record: PartRecord):
                noted = {SET_PART: part_record.encode(), **(attributes if index == 0 else {})}
                member = self._member(places[index])
                part_model = self._part_model(member, model, places[index])
                return member.store.create_sequence(part_model, part_record.member_name, noted)

            return self._make(model, record, create)

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
        with self._lock:
            sequence = self.sequence(name)
            sequence._check_whole()
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

    # durability

    def flush(self) -> None:
        """Everything appended to any sequence so far survives a kill or a power cut from here on.

        Raises DriveLost if a drive is found lost by it, once all others are flushed; of those that were lost
        before it says nothing.
        """
        with self._lock:
            self._check_open()
            self._even_out()
            self._flush_members(self._live)
            for sequence in self._sequences.values():
                if all(self._member(place).lost is None for place in sequence._record.parts):
                    sequence._settled()

    def _even_out(self) -> None:
        for sequence in self._sequences.values():
            if sequence._is_uneven and not any(self._member(p).lost for p in sequence._record.parts):
                sequence._use()

    def _flush_members(self, members: Sequence[Member]) -> None:
        def flush(member: Member) -> None:
            with member.in_use("what was not flushed of its sequences") as store:
                store.flush()

        self._at_once([lambda member=member: flush(member) for member in members])
        self._freed_names.clear()

    def _flush_sequence(self, sequence: SetSequence) -> None:
        """Its parts, and all names: a name that comes back has to be right on every drive."""
        parts: dict[str, list] = {member.drive_id: [] for member in self._live}
        for part, place in zip(sequence._parts, sequence._record.parts, strict=True):
            parts[place.drive_id].append(part)

        def flush(member: Member, own: list) -> None:
            with member.in_use(f"part of sequence {sequence.name!r}" if own else "names") as store:
                for part in own:
                    part.flush()
                with store._lock:
                    store._sync_if_needed()

        busy = [
            (member, parts[member.drive_id])
            for member in self._live
            if parts[member.drive_id] or member.store._catalogue.has_changes
        ]
        self._at_once([lambda pair=pair: flush(*pair) for pair in busy])
        self._freed_names.clear()
        sequence._settled()

    def close(self) -> None:
        """Flush and let go of the drives. Closing twice is allowed."""
        with self._lock:
            if self._closed:
                return
            try:
                self._even_out()
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
            if self._threads is not None:
                self._threads.shutdown()
            self._on_close()

    # attention

    def attend(
        self,
        layer: int,
        queries,
        sequences,
        *,
        causal=True,
        token_ranges=None,
        window=None,
        sink_tokens=0,
        scale=None,
        softcap=None,
        alibi_slopes=None,
        query_positions=None,
        sinks=None,
    ):
        """As kvfs.Store.attend: every drive has its part before the first is waited for."""
        with self._lock:
            self._check_open()
            sequences = [sequences] if isinstance(sequences, SetSequence) else list(sequences)
            geometry = common_model(sequences, self).geometry
            shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
            meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
            queries = float_array(queries, "queries", shape, meaning)
            if queries.shape[1] < 1:
                raise InvalidArgument("queries hold no query")
            layer = geometry.check_layer(layer)
            for sequence in sequences:
                sequence._use()
                if sequence.layer_tokens(layer) == 0:
                    raise EmptySequence(sequence.name, layer)
            # what is wrong is said of the whole, before any drive has its part
            num_tokens = [sequence.layer_tokens(layer) for sequence in sequences]
            ranges = visible(num_tokens, queries.shape[1], causal, token_ranges)
            windows(*ranges, window, sink_tokens)
            scoring_of(geometry, scale, softcap, alibi_slopes, query_positions, ranges[1])
            sinks = None if sinks is None else head_array(sinks, "sinks", geometry)
            if token_ranges is not None:
                token_ranges = range_array(token_ranges, *queries.shape[:2])
            if alibi_slopes is not None:
                alibi_slopes = head_array(alibi_slopes, "alibi_slopes", geometry)

            def work(share, start):
                of_items = [
                    None if array is None else np.asarray(array)[share.items]
                    for array in (token_ranges, query_positions)
                ]
                slopes = None if alibi_slopes is None else alibi_slopes[share.query_heads]
                visibility = (causal, of_items[0], window, sink_tokens)
                scores = (scale, softcap, slopes, of_items[1])
                part_queries = queries[share.items][:, :, share.query_heads]
                return share.member.store._attend(
                    layer, part_queries, share.parts, visibility, scores, None, start
                )

            out, lse = self._gather(shares_of(self, sequences, layer), work, queries.shape)
            return (out, lse) if sinks is None else with_sinks(out, lse, sinks)

    def _gather(self, shares, work: Callable, shape) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of all shares; `work` makes a share's call.

        Each drive is given its work by a thread of its own: what is small it computes there and then.
        """
        start = self._start if len(shares) > 1 and self._in_threads else at_once
        out, lse = np.empty(shape, np.float32), np.empty(shape[:-1], np.float32)
        calls = []
        try:
            for share in shares:
                with share.member.in_use(share.holding):
                    call = work(share, start)
                    next(call)
                calls.append(call)
            begun = time.perf_counter()  # what a drive has answered by now nobody waits for
            self._turn += 1
            first = self._turn % len(shares)
            for number in [*range(first, len(shares)), *range(first)]:
                share = shares[number]
                with share.member.in_use(share.holding):
                    answer = finish(calls[number])
                out[share.items, :, share.query_heads], lse[share.items, :, share.query_heads] = answer
                if number == first:
                    self._note_latency(share, time.perf_counter() - begun)
        except BaseException:
            for call in calls:
                with suppress(KvfsError, NvmeError):
                    call.close()
            raise
        return out, lse

    def _start(self, work: Callable[[], Asked]) -> Callable[[], Asked]:
        return self._pool().submit(work).result

    def _note_latency(self, share, seconds: float) -> None:
        if not share.num_bytes:
            return  # its tokens were in this process's memory
        member = share.member
        member.latency.note(seconds, share.num_bytes)
        others = [other.latency for other in self._live if other is not member]
        if member.latency.becomes_slow(others):
            log.warning(
                "drive %s is slow: it takes %.1f ms a call, %.1f times as long per byte as the others, which"
                " wait for it",
                member.location,
                member.latency.seconds * 1e3,
                member.latency.compare(others),
            )

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


def _age(parts) -> int:
    return min(part.row.created_ns for part in parts if part is not None)
