"""The store: models and sequences on one drive, and attention over them."""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from accel.merge import merge_states
from accel.workers import load_worker
from kvfs.allocator import Allocator, Extent
from kvfs.arrays import float_array, to_query
from kvfs.attention_request import build_descriptor, parse_answer
from kvfs.block_owners import BlockOwners
from kvfs.check import (
    Report,
    check_allocator,
    check_catalogue,
    check_extents,
    check_flash,
    check_payloads,
)
from kvfs.embedded_drive import (
    CollectorOptions,
    Drive,
    DriveConfig,
    Geometry,
    close_drive,
    format_drive,
    open_drive,
)
from kvfs.errors import (
    EmptySequence,
    InvalidArgument,
    ModelMismatch,
    NoSuchModel,
    NoSuchSequence,
    NotADrive,
    OutOfSpace,
    SequenceExists,
    StoreClosed,
)
from kvfs.group_image import ImagePool
from kvfs.host_attention import attend_tails
from kvfs.layout import DEFAULT_GROUP_TOKENS, GroupLayout, KvGeometry
from kvfs.metadata import Catalogue, GroupRow, ModelRow
from kvfs.metadata_vfs import Volume
from kvfs.placement import PlacementPolicy
from kvfs.sequence import PLACEMENT_KV, Sequence
from kvfs.sizes import parse_size
from kvfs.write_amplification import write_amplification
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import ATTENTION_COUNTERS_LOG, FLASH_HEALTH_LOG, LogPage
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import COMPACT, GROUP_EXTENT, SEAL_HEADER, SEAL_MAGIC, answer_bytes

DEFAULT_CACHE_BYTES = 256 << 20
DEFAULT_TAIL_BYTES = 1 << 30
SPILLING_BYTES = 32 << 20  # on its way to flash at most, before append waits
MAX_NAME_BYTES = 255  # a sequence will be a folder of the mount


@dataclass(frozen=True)
class Model:
    """A model known to a store: its name and the shape of its KV cache."""

    id: int
    name: str
    geometry: KvGeometry
    layout: GroupLayout

    def __getattr__(self, field: str):
        # num_layers, head_dim and so on read as the model's own; the geometry stays the one truth
        if field.startswith("_"):
            raise AttributeError(field)
        return getattr(self.geometry, field)


class Store:
    """A store on an open drive, which it closes in the end. Use as a context manager, or call `close`.

    Safe to call from several threads.
    """

    def __init__(
        self,
        drive: Drive,
        path: str | os.PathLike,
        *,
        worker: str = "numba",
        writeback_tokens: int | None = None,
        tail_bytes: int = DEFAULT_TAIL_BYTES,
    ):
        """path: for messages. Raises NotADrive, InvalidArgument."""
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._closed = False
        self._sequences: dict[str, Sequence] = {}
        self._spilling: deque[tuple[Sequence, int, int]] = deque()
        self._spilling_bytes = 0
        self._attended: list[Sequence] = []  # sequences of the attend call under way: their tails must stay
        self._image_pool = ImagePool(SPILLING_BYTES)
        self._writeback_tokens = DEFAULT_GROUP_TOKENS if writeback_tokens is None else writeback_tokens
        self._tail_bytes = tail_bytes
        with ExitStack() as stack:
            self._drive = drive
            stack.callback(close_drive, drive, self.path)
            if self._writeback_tokens < 1:
                raise InvalidArgument(f"writeback_tokens is at least 1, not {writeback_tokens}")
            self._worker = load_worker(worker)
            self._namespace = Namespace(self._drive.transport)
            self._volume = Volume.open(self._namespace, path)
            self._catalogue = Catalogue(self._volume, self._namespace.block_bytes, path)
            self._models: dict[str, Model] = {}
            try:
                self._load_catalogue()
            except BaseException:
                self._catalogue.abandon()
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
        group_tokens: int = DEFAULT_GROUP_TOKENS,
    ) -> Model:
        """The model of this name, added if it is new.

        Raises InvalidArgument for an impossible shape, ModelMismatch if the name has another one.
        """
        with self._lock:
            self._check_open()
            _check_name(name, "model")
            geometry = KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens)
            known = self._models.get(name)
            if known is None:
                return self._remember_model(self._catalogue.add_model(name, geometry))
            differences = {
                field: (getattr(known.geometry, field), getattr(geometry, field))
                for field in KvGeometry.__dataclass_fields__
                if getattr(known.geometry, field) != getattr(geometry, field)
            }
            if differences:
                raise ModelMismatch(name, differences)
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
        _check_name(name, "sequence")
        if self._catalogue.sequence(name) is not None:
            raise SequenceExists(name)

    def create_sequence(self, model: Model, name: str) -> Sequence:
        """An empty sequence. Raises SequenceExists."""
        with self._lock:
            self._check_open()
            if not isinstance(model, Model) or self._models.get(model.name) is not model:
                raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")
            self._check_new_name(name)
            sequence = Sequence(self, model, self._catalogue.create_sequence(model.id, name))
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
        if first_lba is None and self._allocator.has_held:
            self._sync()  # what was freed may be reused once that is durable
            first_lba = self._allocator.allocate(num_lbas)
        if first_lba is None:
            block_bytes = self._namespace.block_bytes
            raise OutOfSpace(num_lbas * block_bytes, self._allocator.largest_free_lbas * block_bytes)
        return first_lba

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

    def _note_spill(self, sequence: Sequence, layer: int, num_bytes: int) -> None:
        self._spilling.append((sequence, layer, num_bytes))
        self._spilling_bytes += num_bytes

    def _limit_spilling(self, num_bytes: int) -> None:
        """Wait for the oldest spills until `num_bytes` more stay within SPILLING_BYTES."""
        while self._spilling and self._spilling_bytes + num_bytes > SPILLING_BYTES:
            sequence, layer, oldest_bytes = self._spilling.popleft()
            self._spilling_bytes -= oldest_bytes
            if not sequence._deleted:
                sequence._complete_oldest_spill(layer)

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

    # durability

    def _sync(self) -> None:
        """Make the catalogue durable, then let go of what it no longer names."""
        self._catalogue.sync()
        released = self._allocator.release()
        if released:
            self._namespace.deallocate(released)

    def _sync_if_needed(self) -> None:
        if not self._catalogue.is_durable:
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

    # attention

    def attend(self, layer: int, queries, sequences, *, causal=True, token_ranges=None, scale=None):
        """Attention of each sequence's queries over its stored tokens of one layer.

        queries: [num_sequences, num_queries, num_query_heads, head_dim], NumPy or torch; float16 and
            bfloat16 cross the link as they are, anything else as float32
        causal: the queries are the layer's last `num_queries` tokens, and each sees itself and what came
            before; False: each sees all tokens
        token_ranges: int64 [num_sequences, num_queries, 2], the visible positions [start, stop) of each
            query instead: sliding windows, left padding, only the past
        scale: of scores, head_dim ** -0.5 by default

        Returns (out float32 of queries' shape, lse float32 [num_sequences, num_queries,
        num_query_heads]); lse is the natural log of the sum of exponentials, -inf (and out zero) where a
        query sees nothing. Stored NaN and infinity propagate as IEEE arithmetic has it.

        Raises EmptySequence, InvalidArgument; NvmeStatusError naming the block if one is corrupt.
        """
        with self._lock:
            self._check_open()
            sequences = [sequences] if isinstance(sequences, Sequence) else list(sequences)
            model = self._check_sequences(sequences)
            geometry = model.geometry
            shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
            meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
            queries = float_array(queries, "queries", shape, meaning)
            if queries.shape[1] < 1:
                raise InvalidArgument("queries hold no query")
            layer = sequences[0]._check_layer(layer)
            self._attended = sequences
            for sequence in sequences:
                sequence._use()
                if sequence._layers[layer].num_tokens == 0:
                    raise EmptySequence(sequence.name, layer)
                sequence._complete_spills(layer)
            starts, stops = _visible(sequences, layer, queries.shape[1], causal, token_ranges)
            scale = geometry.head_dim**-0.5 if scale is None else float(scale)
            if not np.isfinite(scale):
                raise InvalidArgument(f"scale is a finite number, not {scale}")
            return self._attend(model, layer, queries, sequences, starts, stops, scale)

    def _check_sequences(self, sequences: list[Sequence]) -> Model:
        if not sequences:
            raise InvalidArgument("attend needs at least one sequence")
        for sequence in sequences:
            if not isinstance(sequence, Sequence) or sequence._store is not self:
                raise InvalidArgument(f"{sequence!r} is not a sequence of this store")
            sequence._check_usable()
            if sequence.model is not sequences[0].model:
                raise InvalidArgument(
                    f"one call attends over one model: {sequence.name!r} is of {sequence.model.name!r},"
                    f" {sequences[0].name!r} of {sequences[0].model.name!r}"
                )
        return sequences[0].model

    def _attend(self, model: Model, layer, queries, sequences, starts, stops, scale):
        limit = self._items_per_command(model, queries)
        if len(sequences) > limit:
            parts = [
                self._attend(
                    model,
                    layer,
                    queries[i : i + limit],
                    sequences[i : i + limit],
                    starts[i : i + limit],
                    stops[i : i + limit],
                    scale,
                )
                for i in range(0, len(sequences), limit)
            ]
            return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        wire_queries, query_dtype = to_query(queries)
        tails = [sequence._layers[layer] for sequence in sequences]
        spilled = np.array([tail.num_spilled for tail in tails])[:, None]
        sees_flash = bool((np.minimum(stops, spilled) > starts).any())
        sees_tail = bool((stops > np.maximum(starts, spilled)).any())
        ticket = None
        if sees_flash or not sees_tail:
            parts = [sequence._drive_part(layer) for sequence in sequences]
            descriptor = build_descriptor(
                model.layout, layer, wire_queries, query_dtype, parts, starts, stops, scale
            )
            ticket = self._namespace.attention_submit(descriptor)
        if sees_tail:  # while the drive works
            host_queries = np.ascontiguousarray(queries, np.float32)
            out, lse = attend_tails(self._worker, model.layout, tails, host_queries, starts, stops, scale)
        if ticket is None:
            return out, lse
        size = answer_bytes(*queries.shape)
        answer = parse_answer(self._namespace.attention_fetch(ticket, size), queries.shape)
        return merge_states(*answer, out, lse) if sees_tail else answer

    def _items_per_command(self, model: Model, queries: np.ndarray) -> int:
        """How many sequences fit in one command of this drive."""
        capabilities = self._namespace.attention
        if queries.shape[1] > int(capabilities["max_queries"]):
            raise InvalidArgument(f"at most {int(capabilities['max_queries'])} queries, not {queries.shape[1]}")
        per_item = 8 * (queries[0].size + queries.shape[1] * queries.shape[2])
        return max(
            1, min(int(capabilities["max_items"]), int(capabilities["max_transfer_bytes"]) // (2 * per_item))
        )

    # what can be seen

    def counters(self) -> dict:
        """Counters of all layers since the drive was opened, as nested plain dicts."""
        with self._lock:
            self._check_open()
            flash = self._namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]
            attention = self._namespace.log_page(LogPage.ATTENTION_COUNTERS, ATTENTION_COUNTERS_LOG)[0]
            smart = FlashAdmin(self._namespace).smart()
            page_size = int(flash["page_size"])
            waf = write_amplification(flash)
            block_bytes = self._namespace.block_bytes
            return {
                "waf": waf,
                "link": self._drive.transport.counters.as_dict(),
                "flash": {
                    "bytes_read": int(flash["media_pages_read"]) * page_size,
                    "bytes_written": int(flash["media_pages_programmed"]) * page_size,
                    "host_bytes_written": int(flash["host_pages_written"]) * page_size,
                    "waf": waf["total"],
                    "available_spare_percent": int(smart["available_spare"]),
                    "percentage_used": int(smart["percentage_used"]),
                    **_plain(flash),
                },
                "attention": _plain(attention),
                "space": {
                    "capacity_bytes": (self._namespace.num_lbas - self._volume.first_data_lba) * block_bytes,
                    "free_bytes": self._allocator.free_lbas * block_bytes,
                    "metadata_bytes": self._volume.first_data_lba * block_bytes,
                },
            }

    def check(self) -> list[str]:
        """What is damaged, one line each: the drive's map, the catalogue, its blocks, every page on flash.

        A drive that is damaged further than opens is looked into by kvfs.inspection.
        """
        with self._lock:
            self._check_open()
            self.flush()
            report = Report()
            owners = BlockOwners(self._volume, self._catalogue, self._namespace.block_bytes)
            check_flash(FlashAdmin(self._namespace), owners.owner, report)
            check_catalogue(self._catalogue, owners, report)
            in_memory = self._extents_in_memory()
            first = self._volume.first_data_lba
            named = check_extents(self._namespace, owners, first, in_memory, report)
            check_allocator(self._allocator.free_extents, named, report)
            check_payloads(self._namespace, owners.owner, report)
            return [problem.text for problem in report.problems if problem.is_damage]

    def _extents_in_memory(self) -> list[Extent]:
        """Handed out or held back, and named by no row."""
        new = [
            (group.base_lba, group.num_lbas)
            for sequence in self._sequences.values()
            for group in sequence._groups
            if group.id is None
        ]
        return new + self._allocator.held_extents


def _plain(record: np.void) -> dict:
    """A log page's fields as plain Python values."""
    return {
        name: record[name].tolist() if isinstance(record[name], np.ndarray) else record[name].item()
        for name in record.dtype.names
    }


def _check_name(name: str, kind: str) -> None:
    good = isinstance(name, str) and name and name not in (".", "..") and "/" not in name and "\0" not in name
    if not good or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidArgument(f"a {kind} name is 1 to {MAX_NAME_BYTES} bytes without '/' or NUL, not {name!r}")


def _visible(sequences, layer: int, num_queries: int, causal: bool, token_ranges):
    """Visible positions of each query: int64 [num_sequences, num_queries] starts and stops."""
    limits = np.array([sequence._layers[layer].num_tokens for sequence in sequences], np.int64)[:, None]
    if token_ranges is not None:
        ranges = np.asarray(token_ranges)
        if ranges.shape != (len(sequences), num_queries, 2) or ranges.dtype.kind not in "iu":
            raise InvalidArgument(
                f"token_ranges is integers of shape {(len(sequences), num_queries, 2)}, not {ranges.shape}"
            )
        starts, stops = ranges[..., 0].astype(np.int64), ranges[..., 1].astype(np.int64)
        if (starts < 0).any() or (stops > limits).any():
            raise InvalidArgument(f"token_ranges lie within 0 and the layer's tokens ({int(limits.min())})")
        return starts, stops
    starts = np.zeros((len(sequences), num_queries), np.int64)
    behind = np.arange(num_queries - 1, -1, -1, dtype=np.int64) if causal else np.zeros(num_queries, np.int64)
    if causal and num_queries > int(limits.min()):
        raise InvalidArgument(f"{num_queries} causal queries over {int(limits.min())} tokens")
    return starts, limits - behind


def format(
    path,
    size="1GiB",
    *,
    geometry: Geometry | None = None,
    page_size: int = 4096,
    spare_percent: int = 7,
    parity: bool = False,
) -> None:
    """Make an empty drive in a new file.

    size: bytes, or text such as "8GiB"; the file is sparse and grows as it is written
    geometry: the flash's channels, dies, planes and blocks; None: by size and the options that follow
    spare_percent: of the flash, 1 to 50, kept from the logical blocks so that collection stays cheap
    parity: a die's worth of each row is parity, so that a lost page, or die, can be given back

    Raises DriveExists, MediaFailure, InvalidArgument.
    """
    try:
        options = {"page_size": page_size, "spare_percent": spare_percent, "parity": int(parity)}
        format_drive(path, parse_size(size), geometry, **options)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    drive = open_drive(path, DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="reference"))
    try:
        format_volume(drive, path)
    except ValueError as error:
        drive.close()
        os.unlink(path)
        raise InvalidArgument(str(error)) from error
    drive.close()


def format_volume(drive: Drive, path, metadata_lbas: tuple[int, int] | None = None) -> None:
    """Make an empty store on an open drive. metadata_lbas: blocks for the database and its log.

    Raises ValueError if the drive is too small.
    """
    namespace = Namespace(drive.transport)
    volume = Volume.format(namespace, metadata_lbas)
    Catalogue(volume, namespace.block_bytes, path, create=True).close()


def open(
    path,
    *,
    cache_bytes: int | str = DEFAULT_CACHE_BYTES,
    num_workers: int | None = None,
    worker: str = "numba",
    writeback_tokens: int | None = None,
    tail_bytes: int | str = DEFAULT_TAIL_BYTES,
    collection: str = "greedy",
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Open the drive in a file.

    cache_bytes: the drive's DRAM cache; num_workers: its compute threads, None for one per CPU; worker:
    "numba" or "reference"; writeback_tokens: how many tokens per sequence, layer and head wait in host
    memory before they are written, None for a whole token group; tail_bytes: host memory for such tokens of
    all sequences, beyond which those not used longest are stored and leave memory (what one call works on
    stays, however large); collection: how the drive chooses what to collect, "greedy", "cost-benefit" or
    "d-choices"; progress: called with (done, all) while a drive without a checkpoint is scanned.

    Raises NotADrive, DriveBusy (with the pid), MediaFailure, InvalidArgument.
    """
    try:
        config = DriveConfig(
            cache_bytes=parse_size(cache_bytes),
            num_workers=num_workers,
            worker=worker,
            collector=CollectorOptions(policy=collection),
            progress=progress,
        )
        tail_limit = parse_size(tail_bytes)
        load_worker(worker)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    except KeyError as error:
        raise InvalidArgument(str(error.args[0])) from error
    return Store(
        open_drive(path, config),
        path,
        worker=worker,
        writeback_tokens=writeback_tokens,
        tail_bytes=tail_limit,
    )
