"""The store: models and sequences on one drive, and attention over them."""

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import takewhile

import apsw
import numpy as np

from accel.merge import merge_states
from accel.workers import load_worker
from kvfs.allocator import Allocator, Extent
from kvfs.arrays import float_array
from kvfs.attention import Attention, Call, Start, at_once, common_model, finish, visible, windows
from kvfs.attention_scores import head_array, scoring_of, with_sinks
from kvfs.block_owners import BlockOwners
from kvfs.check import (
    Report,
    check_allocator,
    check_catalogue,
    check_extents,
    check_flash,
    check_payloads,
)
from kvfs.counters import drive_counters
from kvfs.embedded_drive import AttachedDrive, Drive, close_drive
from kvfs.errors import (
    CatalogueDamaged,
    DriveOfSet,
    EmptySequence,
    InvalidArgument,
    NoSuchModel,
    NoSuchSequence,
    NotADrive,
    OutOfSpace,
    SequenceExists,
    StoreClosed,
)
from kvfs.group_image import ImagePool
from kvfs.layout import GroupLayout, KvGeometry, default_group_tokens
from kvfs.metadata import Catalogue, GroupRow, ModelRow
from kvfs.metadata_vfs import Volume
from kvfs.model import Model, check_name, check_same_geometry
from kvfs.placement import PlacementPolicy
from kvfs.sequence import PLACEMENT_KV, Sequence
from kvfs.sequence_attributes import IMPORTING, check_attribute
from kvfs.spilling import SPILLING_BYTES, SpillQueue
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import FLASH_HEALTH_LOG, LogPage
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import COMPACT, GROUP_EXTENT, SEAL_HEADER, SEAL_MAGIC

DEFAULT_CACHE_BYTES = 256 << 20
DEFAULT_TAIL_BYTES = 1 << 30
PLENTY = 16  # times what is taken in advance


class Store:
    """A store on an open drive, which it closes in the end. Use as a context manager, or call `close`.

    Safe to call from several threads.
    """

    def __init__(
        self,
        drive: Drive | AttachedDrive,
        path: str | os.PathLike,
        *,
        worker: str = "numba",
        writeback_tokens: int | None = None,
        tail_bytes: int = DEFAULT_TAIL_BYTES,
        in_set: bool = False,
    ):
        """path: for messages; in_set: also a drive that is one of a set. Raises NotADrive, DriveOfSet,
        InvalidArgument."""
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._closed = False
        self._sequences: dict[str, Sequence] = {}
        self._spills = SpillQueue()
        self._attended: list[Sequence] = []  # sequences of attend calls under way: their tails must stay
        self._image_pool = ImagePool(SPILLING_BYTES)
        self._writeback_tokens = writeback_tokens
        self._tail_bytes = tail_bytes
        with ExitStack() as stack:
            self._drive = drive
            stack.callback(close_drive, drive, self.path)
            if writeback_tokens is not None and writeback_tokens < 1:
                raise InvalidArgument(f"writeback_tokens is at least 1, not {writeback_tokens}")
            self._namespace = Namespace(self._drive.transport)
            self._attention = Attention(self._namespace, load_worker(worker))
            self._volume = Volume.open(self._namespace, path)
            self._catalogue = Catalogue(self._volume, self._namespace.block_bytes, path)
            self._models: dict[str, Model] = {}
            self._files = None  # the file system, where one serves files from this store
            try:
                if self._catalogue.membership() is not None and not in_set:
                    raise DriveOfSet(self.path)
                self._load_catalogue()
            except BaseException as error:
                self._catalogue.abandon()
                if isinstance(error, CatalogueDamaged):
                    raise NotADrive(self.path, str(error)) from error
                raise
            self._placement = PlacementPolicy(self._reclaim_unit_bytes(), PLACEMENT_KV, horizon=1)
            self._stack = stack.pop_all()

    def _reclaim_unit_bytes(self) -> int:
        """What the drive erases at once."""
        health = self._namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]
        return int(health["num_pages"]) // int(health["num_superblocks"]) * int(health["page_size"])

    def _load_catalogue(self) -> None:
        for row in self._catalogue.models():
            self._remember_model(row)
        half_imported = self._catalogue.sequences_with(IMPORTING)
        if half_imported:
            for row in half_imported:
                self._catalogue.delete_sequence(row)
            self._catalogue.sync()  # before what it named is anybody's
        used = list(self._catalogue.used_extents())
        try:
            self._allocator = Allocator(self._volume.first_data_lba, self._namespace.num_lbas, used)
        except ValueError as error:
            raise NotADrive(self.path, f"the catalogue contradicts itself: {error}") from error
        # what was written before a power cut, but never named, is nobody's: the flash need not keep it
        self._namespace.deallocate(self._allocator.free_extents)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed

    # models

    def _remember_model(self, row: ModelRow) -> Model:
        layout = GroupLayout(row.geometry, self._namespace.block_bytes)
        model = self._models[row.name] = Model(row.id, row.name, row.geometry, layout)
        return model

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
        """The model of this name, added if it is new.

        dtype: "float16", "bfloat16", "float32", or quantized with a scale per channel of each page:
            "float8_e4m3", "int8", "int4" (head_dim a multiple of 32)
        group_tokens: tokens laid out together; by default 256, or as many as make 64 KiB of a quantized head

        Raises InvalidArgument for an impossible shape, ModelMismatch if the name has another one.
        """
        with self._lock:
            self._check_open()
            check_name(name, "model")
            if group_tokens is None:
                group_tokens = default_group_tokens(dtype, head_dim, self._namespace.block_bytes)
            geometry = KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens)
            return self._add_model(name, geometry)

    def _add_model(self, name: str, geometry: KvGeometry) -> Model:
        """Under any name: those of parts of a model, in a set of drives, have a slash."""
        with self._lock:
            known = self._models.get(name)
            if known is None:
                return self._remember_model(self._catalogue.add_model(name, geometry))
            check_same_geometry(name, known.geometry, geometry)
            return known

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

    # sequences

    def _check_new_name(self, name: str) -> None:
        check_name(name, "sequence")
        if self._catalogue.sequence(name) is not None:
            raise SequenceExists(name)

    def create_sequence(
        self, model: Model, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> Sequence:
        """An empty sequence, from the first with these attributes. Raises SequenceExists, InvalidArgument."""
        attributes = attributes or {}
        for attribute, value in attributes.items():
            check_attribute(attribute, value)
        with self._lock:
            self._check_open()
            if not isinstance(model, Model) or self._models.get(model.name) is not model:
                raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")
            self._check_new_name(name)
            with self._catalogue.transaction():
                row = self._catalogue.create_sequence(model.id, name)
                for attribute, value in attributes.items():
                    self._catalogue.set_attribute(row.id, attribute, value)
            sequence = Sequence(self, model, row)
            self._sequences[name] = sequence
            return sequence

    def sequence(self, name: str) -> Sequence:
        """An existing sequence. Raises NoSuchSequence."""
        with self._lock:
            self._check_open()
            if name not in self._sequences:
                row = self._catalogue.sequence(name)
                if row is None:
                    raise NoSuchSequence(name)
                model = next((model for model in self._models.values() if model.id == row.model_id), None)
                if model is None:
                    why = f"the catalogue has no model {row.model_id}, which sequence {name!r} is of"
                    raise NotADrive(self.path, why)
                self._sequences[name] = Sequence(self, model, row)
            return self._sequences[name]

    def sequences(self) -> list[Sequence]:
        """All sequences, by name. Opens each; `catalogue_rows` is the cheap way to list many."""
        with self._lock:
            return [self.sequence(row.name) for row in self.catalogue_rows()]

    def catalogue_rows(self):
        """The catalogue's row of every sequence, as of its last flush (metadata.SequenceRow)."""
        with self._lock:
            self._check_open()
            return self._catalogue.sequences()

    def delete_sequence(self, name: str) -> None:
        """Forget a sequence; its blocks are free once the catalogue is durable. Raises NoSuchSequence."""
        with self._lock:
            sequence = self.sequence(name)
            for extent in self._catalogue.delete_sequence(sequence._row):
                self._allocator.hold(*extent)
            sequence._forget()
            del self._sequences[name]

    def rename_sequence(self, old_name: str, new_name: str) -> None:
        """Raises NoSuchSequence, SequenceExists."""
        with self._lock:
            sequence = self.sequence(old_name)
            self._check_new_name(new_name)
            self._catalogue.rename_sequence(sequence._row.id, new_name)
            sequence._row.name = new_name
            self._sequences[new_name] = self._sequences.pop(old_name)

    # space and writing, for sequences

    def _allocate(self, num_lbas: int) -> int:
        first_lba = self._allocator.allocate(num_lbas)
        if first_lba is None and self._may_free:
            self._sync()  # what was freed may be reused once that is durable
            first_lba = self._allocator.allocate(num_lbas)
        if first_lba is None:
            block_bytes = self._namespace.block_bytes
            raise OutOfSpace(num_lbas * block_bytes, self._allocator.largest_free_lbas * block_bytes)
        return first_lba

    def _allocate_some(self, num_lbas: int, behind: int | None) -> list[Extent]:
        """As _allocate, in as many pieces as it takes; best from LBA `behind` on."""
        extents = self._allocator.allocate_some(num_lbas, behind)
        if extents is None and self._may_free:
            self._sync()
            extents = self._allocator.allocate_some(num_lbas, behind)
        if extents is None:
            block_bytes = self._namespace.block_bytes
            raise OutOfSpace(num_lbas * block_bytes, self._allocator.largest_free_lbas * block_bytes)
        return extents

    @property
    def _may_free(self) -> bool:
        return self._allocator.has_held or self._catalogue.batch.has_changes

    @property
    def _plenty_of_lbas(self) -> int:
        """How much may be taken in advance."""
        return self._allocator.free_lbas // PLENTY

    def _allocate_now(self, count: int, group_lbas: int) -> list[GroupRow]:
        """As many groups, up to `count`, as there is room for without freeing any."""
        bases = (self._allocator.allocate(group_lbas) for _ in range(count))
        return [GroupRow(None, base, group_lbas) for base in takewhile(lambda base: base is not None, bases)]

    def _allocate_groups(self, count: int, group_lbas: int) -> list[GroupRow]:
        groups: list[GroupRow] = []
        try:
            for _ in range(count):
                groups.append(GroupRow(None, self._allocate(group_lbas), group_lbas))
        except OutOfSpace:
            for group in groups:
                self._allocator.give_back(group.base_lba, group.num_lbas)
            raise
        return groups

    def _used(self, sequence: Sequence) -> None:
        """Note a use; while the tails take more than tail_bytes, those not used longest leave memory."""
        if sequence.name in self._sequences:
            self._sequences[sequence.name] = self._sequences.pop(sequence.name)  # newest last
        if self._image_pool.used_bytes <= self._tail_bytes:
            return
        for other in list(self._sequences.values()):
            if self._image_pool.used_bytes <= self._tail_bytes:
                break
            if other is not sequence and other._can_unload and other not in self._attended:
                other._unload()

    def _compact(self, layout: GroupLayout, groups: list[GroupRow], placement_id: int) -> None:
        if not groups:
            return
        header = np.zeros(1, SEAL_HEADER)
        header["magic"], header["version"], header["derive"] = SEAL_MAGIC, 1, COMPACT
        header["num_extents"], header["num_layers"] = len(groups), layout.geometry.num_layers
        header["layer_lbas"], header["placement_id"] = layout.layer_lbas, placement_id
        extents = np.zeros(len(groups), GROUP_EXTENT)
        extents["base_lba"] = [group.base_lba for group in groups]
        extents["num_groups"] = 1
        self._namespace.seal_groups(np.concatenate([header.view(np.uint8), extents.view(np.uint8)]))

    def _use_files(self, files) -> None:
        """A file system keeps what is not written yet here. Raises InvalidArgument for a second one."""
        self._check_open()
        if self._files is not None:
            raise InvalidArgument("the store has a file system already: two would not see each other's changes")
        self._files = files
        self._stack.callback(files.close)

    # durability

    def _sync(self) -> None:
        """Make the catalogue durable, then let go of what it no longer names."""
        self._catalogue.sync()
        released = self._allocator.release()
        if released:
            self._namespace.deallocate(released)

    def _sync_if_needed(self) -> None:
        if self._catalogue.has_changes:
            self._sync()

    def flush(self) -> None:
        """Everything appended to any sequence so far survives a kill or a power cut from here on."""
        with self._lock:
            self._check_open()
            for sequence in list(self._sequences.values()):
                if sequence._dirty:
                    sequence._use()
                    sequence._store_state()
            self._sync_if_needed()

    def close(self) -> None:
        """Flush and let go of the drive. Closing twice is allowed."""
        with self._lock:
            if self._closed:
                return
            try:
                self.flush()
                self._catalogue.close()
            except BaseException:
                self._catalogue.abandon()
                raise
            finally:
                self._closed = True
                self._stack.close()

    def _abandon(self) -> None:
        """Let go of a drive that has failed, without writing: what was not flushed is gone."""
        with self._lock:
            self._closed = True
            self._catalogue.abandon()
            self._stack.close()

    @property
    def _file_store(self) -> "Store":
        """The store with the ordinary files: of a set of drives one drive's, of one drive this."""
        return self

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
        """Attention of each sequence's queries over its stored tokens of one layer.

        queries: [num_sequences, num_queries, num_query_heads, head_dim], NumPy or torch; float16 and
            bfloat16 cross the link as they are, anything else as float32
        causal: the queries are the layer's last `num_queries` tokens, and each sees itself and what came
            before; False: each sees all tokens
        token_ranges: int64 [num_sequences, num_queries, 2], the visible positions [start, stop) of each
            query instead: sliding windows, left padding, only the past
        window: a query sees the last so many of these at most; and the first `sink_tokens` of them all the
            same, as streaming models want it (arXiv:2309.17453)
        scale: of scores, head_dim ** -0.5 by default
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118)
        alibi_slopes: [num_query_heads]; a score is lessened by slope * distance to the query (arXiv:2108.12409)
        query_positions: int64 [num_sequences, num_queries], where distances count from; by default the last
            token that the query may see
        sinks: [num_query_heads], the learnt score of a token without a value, which takes its share of the
            weights and of lse (gpt-oss)

        Returns (out float32 of queries' shape, lse float32 [num_sequences, num_queries,
        num_query_heads]); lse is the natural log of the sum of exponentials, -inf (and out zero) where a
        query sees nothing. Stored NaN and infinity propagate as IEEE arithmetic has it.

        Raises EmptySequence, InvalidArgument; NvmeStatusError naming the block if one is corrupt.
        """
        scores = (scale, softcap, alibi_slopes, query_positions)
        visibility = (causal, token_ranges, window, sink_tokens)
        return finish(self._attend(layer, queries, sequences, visibility, scores, sinks))

    def _attend(
        self, layer: int, queries, sequences, visibility, scores, sinks, start: Start = at_once
    ) -> Call:
        """See attend. visibility, scores: its arguments of these kinds, in its order."""
        causal, token_ranges, window, sink_tokens = visibility
        with self._lock:
            self._check_open()
            sequences = [sequences] if isinstance(sequences, Sequence) else list(sequences)
            model = common_model(sequences, self)
            geometry = model.geometry
            shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
            meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
            queries = float_array(queries, "queries", shape, meaning)
            if queries.shape[1] < 1:
                raise InvalidArgument("queries hold no query")
            layer = geometry.check_layer(layer)
            self._attended += sequences
            try:
                for sequence in sequences:
                    sequence._use()
                    if sequence._layers[layer].num_tokens == 0:
                        raise EmptySequence(sequence.name, layer)
                    sequence._end_finished_spills(layer)
                num_tokens = [sequence._layers[layer].num_tokens for sequence in sequences]
                ranges = visible(num_tokens, queries.shape[1], causal, token_ranges)
                scoring = scoring_of(geometry, *scores, ranges[1])
                sinks = None if sinks is None else head_array(sinks, "sinks", geometry)
                work = (model, layer, queries, sequences)
                recent, *first = windows(*ranges, window, sink_tokens)
                out, lse = yield from self._attention.call(*work, *recent, scoring, start)
                for starts, stops in first:
                    sink_state = finish(self._attention.call(*work, starts, stops, scoring))
                    out, lse = merge_states(out, lse, *sink_state)
                return (out, lse) if sinks is None else with_sinks(out, lse, sinks)
            finally:
                for sequence in sequences:
                    self._attended.remove(sequence)

    # what can be seen

    def counters(self) -> dict:
        """Counters of all layers since the drive was opened, as nested plain dicts."""
        with self._lock:
            self._check_open()
            block_bytes = self._namespace.block_bytes
            link = self._drive.transport.counters
            return {
                **drive_counters(self._namespace),
                "link": {} if link is None else link.as_dict(),
                "space": {
                    "capacity_bytes": (self._namespace.num_lbas - self._volume.first_data_lba) * block_bytes,
                    "free_bytes": self._allocator.free_lbas * block_bytes,
                    "metadata_bytes": self._volume.first_data_lba * block_bytes,
                },
                "memory": {"tail_bytes": self._image_pool.used_bytes},  # of tokens not on flash yet
            }

    def check(self) -> list[str]:
        """What is damaged, one line each: the drive's map, the catalogue, its blocks, every page on flash.

        A drive that is damaged further than opens is looked into by kvfs.inspection.
        """
        with self._lock:
            self._check_open()
            self.flush()
            report = Report()
            try:
                self._check(report)
            except (apsw.Error, CatalogueDamaged) as error:  # too damaged to be looked into further
                report.add("catalogue", f"catalogue: {error}")
            return [problem.text for problem in report.problems if problem.is_damage]

    def _check(self, report: Report) -> None:
        owners = BlockOwners(self._volume, self._catalogue, self._namespace.block_bytes)
        check_flash(FlashAdmin(self._namespace), owners.owner, report)
        check_catalogue(self._catalogue, owners, report)
        in_memory = self._extents_in_memory()
        first = self._volume.first_data_lba
        named = check_extents(self._namespace, owners, first, in_memory, report)
        check_allocator(self._allocator.free_extents, named, report)
        check_payloads(self._namespace, owners.owner, report)

    def _extents_in_memory(self) -> list[Extent]:
        """Handed out or held back, and named by no row."""
        new = [
            (group.base_lba, group.num_lbas)
            for sequence in self._sequences.values()
            for group in sequence._groups
            if group.id is None
        ]
        files = self._files.extents_in_memory() if self._files is not None else []
        return new + files + self._allocator.held_extents
