"""The store: models and sequences on one drive, and attention over them."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import numpy as np

from accel.workers import host_worker
from kvfs.allocator import Allocator
from kvfs.attention import Attention
from kvfs.counters import drive_counters
from kvfs.embedded_drive import AttachedDrive, Drive, close_drive
from kvfs.errors import (
    CatalogueDamaged,
    DriveOfSet,
    InvalidArgument,
    NoSuchModel,
    NoSuchSequence,
    NotADrive,
    SequenceExists,
    StoreClosed,
)
from kvfs.group_image import ImagePool
from kvfs.layout import GroupLayout, KvGeometry, default_group_tokens
from kvfs.metadata import Catalogue, GroupRow, ModelRow, SequenceRow
from kvfs.metadata_vfs import Volume
from kvfs.model import Model, check_name, check_same_geometry
from kvfs.objects.object_cache import ObjectStore
from kvfs.objects.object_caches import ObjectCaches
from kvfs.placement import PlacementPolicy
from kvfs.prefix.index import PrefixIndex
from kvfs.prefix.reuse import PrefixReuse
from kvfs.sealing.background import BackgroundSealer
from kvfs.sealing.interface import SealingStore, derives_of
from kvfs.sealing.sealing import Sealing
from kvfs.sequence import PLACEMENT_KV, Sequence
from kvfs.sequence_attributes import check_attribute
from kvfs.space.background import EVERY_SECONDS, BackgroundEvictor
from kvfs.space.interface import SpaceStore
from kvfs.space.leftovers import left_when_opened
from kvfs.space.space import Space
from kvfs.spilling import SPILLING_BYTES, SpillQueue
from kvfs.store_attention import AttendingStore
from kvfs.store_blocks import BlocksOfStore
from kvfs.store_check import CheckedStore
from kvfs.telemetry.events import EVENTS
from kvfs.telemetry.requests import Requests, request
from kvfs.telemetry.visible_store import VisibleStore
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import COMPACT, GROUP_EXTENT, SEAL_HEADER, SEAL_MAGIC

DEFAULT_CACHE_BYTES = 256 << 20
DEFAULT_TAIL_BYTES = 1 << 30
ROWS_OF_SEQUENCE = 4  # that its deletion changes, beside those of its groups


class Store(
    BlocksOfStore,
    AttendingStore,
    PrefixReuse,
    ObjectStore,
    SealingStore,
    SpaceStore,
    VisibleStore,
    CheckedStore,
):
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
        seals_in_background: bool = True,
        evict_every_s: float | None = EVERY_SECONDS,
    ):
        """path: for messages; in_set: also a drive that is one of a set; seals_in_background: False: token
        groups are sealed where a caller asks for it, and only then; evict_every_s: see kvfs.open. Raises
        NotADrive, DriveOfSet, InvalidArgument."""
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._closed = False
        self._requests = Requests()
        EVENTS.attach()
        self._sequences: dict[str, Sequence] = {}
        self._spills = SpillQueue()
        self._attended: list[Sequence] = []  # sequences of attend calls under way: their tails must stay
        self._image_pool = ImagePool(SPILLING_BYTES)
        self._writeback_tokens = writeback_tokens
        self._tail_bytes = tail_bytes
        self._last_use = 0.0  # of any sequence, by time.monotonic
        with ExitStack() as stack:
            self._drive = drive
            stack.callback(close_drive, drive, self.path)
            if writeback_tokens is not None and writeback_tokens < 1:
                raise InvalidArgument(f"writeback_tokens is at least 1, not {writeback_tokens}")
            self._namespace = Namespace(self._drive.transport)
            self._attention = Attention(self._namespace, host_worker(worker))
            self._volume = Volume.open(self._namespace, path)
            self._catalogue = Catalogue(self._volume, self._namespace.block_bytes, path)
            self._prefixes = PrefixIndex(self._catalogue.prefixes, self._namespace)
            self._models: dict[str, Model] = {}
            self._files = None  # the file system, where one serves files from this store
            try:
                if self._catalogue.membership() is not None and not in_set:
                    raise DriveOfSet(self.path)
                self._load_catalogue(in_set)
                self._objects = ObjectCaches(self, self._catalogue.objects)
                self._sealing = Sealing(self, self._catalogue.derived)
                self._space = Space(self, self._catalogue.space, is_part=in_set)
            except BaseException as error:
                self._catalogue.abandon()
                if isinstance(error, CatalogueDamaged):
                    raise NotADrive(self.path, str(error)) from error
                raise
            self._placement = PlacementPolicy(self._reclaim_unit_bytes(), PLACEMENT_KV, horizon=1)
            self._stack = stack.pop_all()
        self._sealer = BackgroundSealer(self, self._sealing) if seals_in_background else None
        if self._sealer is not None:
            self._sealer.look_at_all([*self._sealing.wanted])
        self._evictor = BackgroundEvictor(self, evict_every_s)
        self._evictor.begin()

    def _load_catalogue(self, in_set: bool) -> None:
        for row in self._catalogue.models():
            self._remember_model(row)
        left = left_when_opened(self._catalogue, in_set)
        if left:
            for row in left:
                self._catalogue.delete_sequence(row)
            self._catalogue.sync()  # before what it named is anybody's
        space = self._volume.first_data_lba, self._namespace.num_lbas
        try:
            free = self._catalogue.free_space.load()
            if free is None:
                self._allocator = Allocator(*space, self._catalogue.used_extents_array())
            else:
                self._allocator = Allocator.of_free(*space, free)
        except ValueError as error:
            raise NotADrive(self.path, f"the catalogue contradicts itself: {error}") from error
        # what was written before a power cut, but never named, is nobody's: the flash need not keep it
        self._namespace.deallocate(self._allocator.free_extents)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
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
        seal: Iterable[str] | None = None,
    ) -> Model:
        """The model of this name, added if it is new.

        dtype: "float16", "bfloat16", "float32", or quantized with a scale per channel of each page:
            "float8_e4m3", "int8", "int4" (head_dim a multiple of 32)
        group_tokens: tokens laid out together; by default 256, or as many as make 64 KiB of a quantized head
        seal: what the drive makes of complete groups for sparse attention, as for set_sealing; None: as it is

        Raises InvalidArgument for an impossible shape, ModelMismatch if the name has another one.
        """
        with self._lock:
            self._check_open()
            check_name(name, "model")
            if group_tokens is None:
                group_tokens = default_group_tokens(dtype, head_dim, self._namespace.block_bytes)
            geometry = KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens)
            derives = None if seal is None else derives_of(seal)
            model = self._add_model(name, geometry)
            if derives is not None:
                self.set_sealing(model, derives)
            return model

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
            self._space.begin(sequence)
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
            self._space.used(self._sequences[name].id, is_new_use=True)
            return self._sequences[name]

    def sequences(self) -> list[Sequence]:
        """All sequences, by name. Opens each; `catalogue_rows` is the cheap way to list many."""
        with self._lock:
            return [self.sequence(row.name) for row in self.catalogue_rows()]

    def catalogue_rows(self) -> Iterator[SequenceRow]:
        """The catalogue's row of every sequence, as of its last flush (metadata.SequenceRow)."""
        with self._lock:
            self._check_open()
            return self._catalogue.sequences()

    def delete_sequence(self, name: str) -> None:
        """Forget a sequence; its blocks are free once the catalogue is durable. Raises NoSuchSequence."""
        self.delete_sequences([name])

    def delete_sequences(self, names: Iterable[str]) -> None:
        """The same of many, together much faster than one by one. Power that fails meanwhile leaves each of
        them whole, or nothing of it. Raises NoSuchSequence with nothing deleted."""
        with self._lock:
            sequences = [self.sequence(name) for name in dict.fromkeys(names)]
            for some in self._in_transactions(sequences):
                self._delete(some)

    def _in_transactions(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """As many together as the log has room for."""
        some: list[Sequence] = []
        num_changes = 0
        for sequence in sequences:
            more = ROWS_OF_SEQUENCE + len(sequence._groups)
            if some and num_changes + more > self._catalogue.batch.max_changes:
                yield some
                some, num_changes = [], 0
            some.append(sequence)
            num_changes += more
        if some:
            yield some

    def _delete(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._space.settle(sequence)  # whose it is, while the catalogue knows
        with self._catalogue.transaction():
            freed = [
                extent for sequence in sequences for extent in self._catalogue.delete_sequence(sequence._row)
            ]
        for extent in freed:
            self._allocator.hold(*extent)
        for sequence in sequences:
            sequence._forget()
            del self._sequences[sequence.name]
            self._space.forget(sequence)

    def rename_sequence(self, old_name: str, new_name: str) -> None:
        """Raises NoSuchSequence, SequenceExists."""
        with self._lock:
            sequence = self.sequence(old_name)
            self._check_new_name(new_name)
            self._catalogue.rename_sequence(sequence._row.id, new_name)
            sequence._row.name = new_name
            self._sequences[new_name] = self._sequences.pop(old_name)

    # space and writing, for sequences

    def _spilled(self, sequence: Sequence) -> None:
        """Groups of it may soon be complete on flash."""
        if self._sealer is not None and sequence.model.id in self._sealing.wanted:
            self._sealer.notice(sequence)

    def _used(self, sequence: Sequence) -> None:
        """Note a use; while the tails take more than tail_bytes, those not used longest leave memory."""
        self._last_use = time.monotonic()
        self._space.used(sequence.id)
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
        self._objects.write_rows()
        self._space.write_uses()
        self._catalogue.sync()
        released = self._allocator.release()
        if released:
            self._namespace.deallocate(released)

    def _sync_if_needed(self) -> None:
        if self._catalogue.has_changes or self._objects.has_changes:
            self._sync()

    @request("flush")
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
        self._evictor.close()
        if self._sealer is not None:
            self._sealer.close()
        with self._lock:
            if self._closed:
                return
            self._objects.close()
            try:
                self._objects.write_rows()
                self._space.write_uses()
                self.flush()
                if self._catalogue.was_changed and not self._extents_in_memory():
                    self._catalogue.free_space.store(self._allocator.free_extents)
                self._catalogue.close()
            except BaseException:
                self._catalogue.abandon()
                raise
            finally:
                self._closed = True
                self._stack.close()

    def _abandon(self) -> None:
        """Let go of a drive that has failed, without writing: what was not flushed is gone."""
        self._evictor.close(wait=False)
        if self._sealer is not None:
            self._sealer.close(wait=False)
        with self._lock:
            self._closed = True
            self._objects.close()
            self._catalogue.abandon()
            self._stack.close()

    @property
    def _file_store(self) -> "Store":
        """The store with the ordinary files: of a set of drives one drive's, of one drive this."""
        return self

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
                    "capacity_bytes": self._num_data_lbas * block_bytes,
                    "free_bytes": self._allocator.free_lbas * block_bytes,
                    "metadata_bytes": self._volume.first_data_lba * block_bytes,
                    "derived_bytes": self._sealing.num_lbas_in_all * block_bytes,  # can be given up at any time
                },
                "memory": {"tail_bytes": self._image_pool.used_bytes},  # of tokens not on flash yet
                "prefix": self._prefixes.counters.as_dict(),
                "objects": self._objects.counters(),
                "sealing": self._sealing.as_dict(),
                "eviction": self._space.counters(),
            }
