"""A sequence: the KV of one request's tokens, in all layers of a model.

Groups that are full are immutable, so forks share them. What a truncation or a fork leaves of a partly
filled group is read back into the tail: blocks that durable metadata names are never written again.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs import head_rows, tail_record, token_rows
from kvfs.arrays import Pair, output_arrays
from kvfs.derived import DerivedSegment
from kvfs.errors import InvalidArgument
from kvfs.growing_sequence import GrowingSequence
from kvfs.head_pieces import HeadRows
from kvfs.head_rows import HeadBatch
from kvfs.layout import GroupLayout, KvGeometry
from kvfs.metadata import GroupRow, SequenceRow
from kvfs.model import Model
from kvfs.prefix.reuse import PublishedSequence, suspecting
from kvfs.sealing.interface import SealedSequence
from kvfs.sequence_attributes import TENANT, check_attribute, check_names
from kvfs.sequence_version import History, Version
from kvfs.tail import LayerTail
from kvfs.telemetry.requests import request

if TYPE_CHECKING:
    from kvfs.store import Store

PLACEMENT_TAIL = 1
PLACEMENT_KV = 4  # and up: see placement.py


class Sequence(GrowingSequence, PublishedSequence, SealedSequence):
    """Made by Store.create_sequence, Store.sequence and fork; valid until deleted or the store closes."""

    def __init__(self, store: "Store", model: Model, row: SequenceRow):
        self._store = store
        self.model = model
        self._row = row
        self._layout: GroupLayout = model.layout
        self._groups: list[GroupRow] = store._catalogue.groups(row.id)
        self._groups_changed_from = len(self._groups)  # positions from here on differ from the catalogue
        self._unnamed_segments: list[DerivedSegment] = []  # of groups that may have no row yet
        self._known_segments: tuple[int, dict] = (-1, {})  # see derived_segments
        self._tokens = store._catalogue.tokens(row.id)
        self._tokens_changed_from = len(self._tokens)
        self._layers: list[LayerTail] | None = None  # None: not in memory, all of it is on flash
        self._bytes_spilled = 0  # since this object was made
        self._dirty = False
        self._state_notes: dict[str, bytes] = {}  # attributes that hold of the tokens as they are stored next
        self._deleted = False
        self._history = History()

    def __repr__(self) -> str:
        return f"<Sequence {self.name!r} of {self.model.name!r}, {self.num_tokens} tokens>"

    @property
    def _geometry(self) -> KvGeometry:
        return self.model.geometry

    @property
    def store(self) -> "Store":
        """The store that it is in."""
        return self._store

    @property
    def id(self) -> int:
        """Another sequence may have it once this one is deleted."""
        return self._row.id

    @property
    def name(self) -> str:
        return self._row.name

    @property
    def created_ns(self) -> int:
        return self._row.created_ns

    @property
    def changed_ns(self) -> int:
        """When tokens were last appended or cut off, in ns since the epoch."""
        return self._row.changed_ns

    @property
    def is_deleted(self) -> bool:
        return self._deleted

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has."""
        layers = self._layers  # which another thread may unload meanwhile
        return self._row.num_tokens if layers is None else min(tail.num_tokens for tail in layers)

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [any number]: token ids given to append_tokens. Kept beside the KV, not checked against it."""
        return self._tokens.copy()

    @property
    def num_token_ids(self) -> int:
        return len(self._tokens)

    def version(self) -> Version:
        """What the sequence holds now, in complete tokens."""
        with self._store._lock:
            return Version(self.num_tokens, self._history.epoch)

    def holds(self, version: Version) -> bool:
        """Whether the tokens of a version are all still there, unchanged."""
        with self._store._lock:
            return not self._deleted and self._history.holds(version)

    def layer_tokens(self, layer: int) -> int:
        """Tokens that one layer has; layers differ while a model's forward pass runs."""
        layer = self._geometry.check_layer(layer)
        layers = self._layers
        return self._row.num_tokens if layers is None else layers[layer].num_tokens

    def _changed(self) -> None:
        self._dirty = True
        self._row.changed_ns = time.time_ns()

    def _check_usable(self) -> None:
        self._store._check_open()
        if self._deleted:
            raise InvalidArgument(f"sequence {self.name!r} was deleted")

    def _use(self) -> None:
        """Check that the sequence can be used, and have its tail in memory."""
        self._check_usable()
        if self._layers is None:
            self._layers = self._new_tails(self._row.num_spilled)
            try:
                if self._row.num_tokens > self._row.num_spilled:
                    self._load_tail_record()
            except BaseException:
                self._clear_tails()  # or the next use would take what there is for all
                raise
        self._store._used(self)

    def _new_tails(self, num_tokens: int) -> list[LayerTail]:
        pool = self._store._image_pool
        return [LayerTail(self._layout, pool, num_tokens) for _ in range(self._geometry.num_layers)]

    @property
    def _can_unload(self) -> bool:
        """Whether the tail is in memory and none of it would be lost: no layer is ahead of the others."""
        return self._layers is not None and len({tail.num_tokens for tail in self._layers}) == 1

    def _unload(self) -> None:
        """Let go of the tail's memory. What is only there is stored first; durable after the next sync."""
        if self._layers is not None and self._dirty:
            self._store_state()
        self._clear_tails()

    def _clear_tails(self) -> None:
        for tail in self._layers or ():
            tail.clear()
        self._layers = None

    # reading

    @request("read", of="_store")
    @suspecting
    def read(
        self, layer: int, start: int = 0, stop: int | None = None, out: Pair | None = None
    ) -> tuple[Any, Any]:
        """(keys, values) of tokens [start, stop) of a layer: [num_tokens, num_kv_heads, head_dim] as stored.

        out: the caller's arrays (keys, values) to be written to, of the model's dtype, writable and contiguous;
        they are returned. Without it NumPy arrays are. Of a quantized model float16: what is on flash, or on
        its way there, as its codes say it.
        """
        with self._store._lock:
            self._use()
            layer = self._geometry.check_layer(layer)
            limit = self._layers[layer].num_tokens
            stop = limit if stop is None else stop
            if not 0 <= start <= stop <= limit:
                raise InvalidArgument(f"tokens [{start}, {stop}) of a layer that has {limit}")
            shape = (stop - start, self._geometry.num_kv_heads, self._geometry.head_dim)
            targets = output_arrays(out, ("keys", "values"), (shape, shape), self._geometry.numpy_dtype)
            self._complete_spills(layer)
            self._read_into(layer, start, stop, *targets)
            return tuple(targets if out is None else out)

    @suspecting
    def read_heads(self, pieces: Items[HeadRows]) -> memoryview:
        """The rows of each piece one after another, as bytes of the storage dtype.

        The store is free for others while flash is read.
        """
        while True:
            with self._store._lock:
                self._use()
                for piece in pieces:
                    head_rows.check(self._layout, self._layers, piece)
                epoch = self._history.epoch
                batch = HeadBatch(self._layout, self._groups, self._layers, pieces)
            if not batch.extents:
                return batch.rows()
            self._store._namespace.read_scattered(batch.extents)
            # Without the lock, which an attention may hold: what is cut off or deleted is noted before its
            # blocks are let go, and they become another's after the next sync only.
            self._check_usable()
            if self._history.epoch == epoch:
                return batch.rows()

    def _read_layer(self, layer: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (stop - start, self._geometry.num_kv_heads, self._geometry.head_dim)
        keys, values = (np.empty(shape, self._geometry.numpy_dtype) for _ in range(2))
        self._read_into(layer, start, stop, keys, values)
        return keys, values

    def _read_into(self, layer: int, start: int, stop: int, keys: np.ndarray, values: np.ndarray) -> None:
        tail = self._layers[layer]
        on_flash = min(stop, tail.num_spilled)
        if start < on_flash:
            drive = self._store._namespace
            token_rows.read(drive, self._layout, self._groups, layer, start, on_flash, keys, values)
        if on_flash < stop:
            first = max(start, on_flash)
            tail.read(first, stop, keys[first - start :], values[first - start :])

    # attributes

    def attributes(self) -> dict[str, bytes]:
        """What users and kvfs note about the sequence, by name; see sequence_attributes.py."""
        with self._store._lock:
            self._check_usable()
            return self._store._catalogue.attributes(self._row.id)

    def set_attribute(self, name: str, value: bytes) -> None:
        """Durable after the next flush. Raises InvalidArgument."""
        with self._store._lock:
            self._check_usable()
            check_attribute(name, value)
            check_names({*self._store._catalogue.attributes(self._row.id), name})
            if name == TENANT:
                self._store._space.reserve_move(self, value.decode())
            self._store._catalogue.set_attribute(self._row.id, name, value)
            self._store._space.moved(self)

    def remove_attribute(self, name: str) -> None:
        """Forget an attribute if there is one."""
        with self._store._lock:
            self._check_usable()
            if name == TENANT:
                self._store._space.reserve_move(self, "")
            self._store._catalogue.remove_attribute(self._row.id, name)
            self._store._space.moved(self)

    # durability

    @request("flush", of="_store")
    def flush(self) -> None:
        """Everything appended so far, in complete tokens, survives a kill or a power cut from here on."""
        with self._store._lock:
            self._check_usable()
            if self._dirty:
                self._use()  # token ids may have come while the tail was not in memory
                self._store_state()
            self._store._sync_if_needed()  # a fork may have stored this sequence's state without a sync

    def _store_state(self) -> None:
        """Write the tail record and the catalogue's rows; durable after the store's next sync."""
        self._wait_for_spills()
        num_tokens = self.num_tokens
        spilled = min(tail.num_spilled for tail in self._layers)
        group_tokens, per_page = self._geometry.group_tokens, self._layout.tokens_per_page
        if spilled > num_tokens:
            position, row = divmod(num_tokens, group_tokens)
            spilled = position * group_tokens + row - row % per_page
        tail_lba, tail_lbas = self._write_tail_record(spilled, num_tokens)
        row = replace(
            self._row, num_tokens=num_tokens, num_spilled=spilled, tail_lba=tail_lba, tail_lbas=tail_lbas
        )
        named = -(-spilled // group_tokens)
        changed = min(self._groups_changed_from, named)
        try:
            with self._store._catalogue.transaction():
                stored, freed = self._store._catalogue.store_sequence(
                    row, self._groups[:named], changed, self._tokens, self._tokens_changed_from
                )
                for name, value in self._state_notes.items():
                    self._store._catalogue.set_attribute(row.id, name, value)
        except BaseException:
            if tail_lbas:
                self._store._allocator.hold(tail_lba, tail_lbas)
            raise
        if self._row.tail_lbas:
            self._store._allocator.hold(self._row.tail_lba, self._row.tail_lbas)
        self._row = row
        self._groups[:named] = stored
        self._groups_changed_from = named
        self._tokens_changed_from = len(self._tokens)
        self._state_notes.clear()
        for extent in freed:
            self._store._allocator.hold(*extent)
        # a part group may be on flash though this store spills none: another writeback_tokens, or a repair
        on_flash = -(-max(tail.num_spilled for tail in self._layers) // group_tokens)
        self._drop_groups(max(on_flash, *(self._groups_of(tail.num_tokens) for tail in self._layers)))
        self._store._sealing.groups_stored(self)
        self._store._space.settle(self)
        self._dirty = False

    def _write_tail_record(self, start: int, stop: int) -> tuple[int, int]:
        """Tokens [start, stop) of all layers; (first LBA, number of LBAs) of where they are."""
        if start == stop:
            return 0, 0
        buffer = tail_record.new_buffer(self._geometry, stop - start, self._store._namespace.block_bytes)
        num_lbas = buffer.nbytes // self._store._namespace.block_bytes
        first_lba = self._store._allocate(num_lbas)
        record = tail_record.view(self._geometry, buffer, stop - start)
        for layer in range(self._geometry.num_layers):
            record[layer, 0], record[layer, 1] = self._read_layer(layer, start, stop)
        self._store._namespace.write(first_lba, buffer, PLACEMENT_TAIL)
        return first_lba, num_lbas

    def _load_tail_record(self) -> None:
        buffer = self._store._namespace.read(self._row.tail_lba, self._row.tail_lbas)
        num_tokens = self._row.num_tokens - self._row.num_spilled
        for tail, rows in zip(self._layers, tail_record.view(self._geometry, buffer, num_tokens), strict=True):
            tail.refill(*rows)

    # shortening and sharing

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens. Raises InvalidArgument if a layer has fewer."""
        with self._store._lock:
            self._use()
            if not isinstance(num_tokens, (int, np.integer)) or not 0 <= num_tokens <= self.num_tokens:
                raise InvalidArgument(f"a sequence of {self.num_tokens} tokens cannot keep {num_tokens!r}")
            # the record of what is left of a group may be larger than the group, of quantized models
            num_groups = num_tokens // self._geometry.group_tokens
            self._store._space.reserve(self, num_groups, [num_tokens])
            self._keep(num_tokens, self._cut_layers(num_tokens))

    def _cut_layers(self, num_tokens: int) -> list[LayerTail]:
        """The first half of a truncation, which may fail: tails that end at `num_tokens`."""
        self._wait_for_spills()
        return [self._cut_layer(layer, num_tokens) for layer in range(self._geometry.num_layers)]

    def _keep(self, num_tokens: int, layers: list[LayerTail]) -> None:
        """The other half, which does not."""
        self._clear_tails()
        self._layers = layers
        self._drop_groups(num_tokens // self._geometry.group_tokens)
        self._tokens = self._tokens[:num_tokens]
        self._tokens_changed_from = min(self._tokens_changed_from, num_tokens)
        self._history.cut(num_tokens)
        self._changed()

    def _cut_layer(self, layer: int, num_tokens: int) -> LayerTail:
        """A tail that ends at `num_tokens`: whole groups stay on flash, the rest is in memory."""
        whole = num_tokens - num_tokens % self._geometry.group_tokens
        old = self._layers[layer]
        if old.num_spilled < whole:
            whole = old.num_spilled - old.num_spilled % self._geometry.group_tokens
        tail = LayerTail(self._layout, self._store._image_pool, whole)
        tail.refill(*self._read_layer(layer, whole, num_tokens))
        return tail

    def _drop_groups(self, keep: int) -> None:
        if len(self._groups) > keep:
            self._store._sealing.groups_dropped(self, keep)
        for group in self._groups[keep:]:
            if group.id is None:  # no metadata ever named it, so none will give it back
                self._store._allocator.hold(group.base_lba, group.num_lbas)
        del self._groups[keep:]
        self._groups_changed_from = min(self._groups_changed_from, keep)

    def fork(self, name: str) -> "Sequence":
        """A new sequence with the same tokens. Whole groups are shared, nothing of them is copied.

        It has this one's attributes too, except those that say how long to keep it.
        """
        return self._fork(name, {})

    def _fork(self, name: str, attributes: dict[str, bytes]) -> "Sequence":
        """attributes: of the child, besides those it inherits."""
        with self._store._lock:
            self._use()
            self._store._check_new_name(name)
            if self._dirty:
                self._store_state()  # gives the shared groups their rows
            tenant = attributes.get(TENANT, self.attributes().get(TENANT, b"")).decode()
            self._store._space.reserve_new(self.model, tenant, self.num_tokens, self.id)
            child = None
            try:
                with self._store._catalogue.transaction():  # the name and what it holds, or neither
                    row = self._store._catalogue.create_sequence(self.model.id, name)
                    self._store._catalogue.inherit_attributes(row.id, self._row.id)
                    for attribute, value in attributes.items():
                        self._store._catalogue.set_attribute(row.id, attribute, value)
                    child = Sequence(self._store, self.model, row)
                    self._store._space.begin(child)
                    child._take_tokens(self)
                    child._store_state()
            except BaseException:
                if child is not None:
                    child._clear_tails()
                    self._store._space.forget(child)
                    if child._row.tail_lbas:  # written, and then the catalogue was full
                        self._store._allocator.hold(child._row.tail_lba, child._row.tail_lbas)
                raise
            self._store._sequences[name] = child
            return child

    def _take_tokens(self, parent: "Sequence") -> None:
        """Have a parent's whole groups, and copies of its other tokens in the tail."""
        num_tokens = parent.num_tokens
        whole = min(num_tokens, *(tail.num_spilled for tail in parent._layers))
        whole -= whole % self._geometry.group_tokens
        self._groups = parent._groups[: whole // self._geometry.group_tokens]
        self._groups_changed_from = 0
        self._layers = self._new_tails(whole)
        for layer, tail in enumerate(self._layers):
            tail.refill(*parent._read_layer(layer, whole, num_tokens))
        self._tokens = parent._tokens.copy()
        self._tokens_changed_from = 0
        self._dirty = True

    def compact(self) -> None:
        """Have the drive rewrite this sequence's whole groups so that each layer reads in long runs."""
        with self._store._lock:
            self._use()
            self._wait_for_spills()
            self._store._compact(self._layout, self._groups, self._placement_id)

    def _forget(self) -> None:
        """Give back what only memory knows of this sequence, which is being deleted."""
        for tail in self._layers or ():
            while tail.spills:  # whether they come to a good end is of no interest any more
                self._store._namespace.wait(tail.take_oldest_spill().pending)
        self._store._sealing.groups_dropped(self, 0)
        for group in self._groups:
            if group.id is None:
                self._store._allocator.hold(group.base_lba, group.num_lbas)
        self._clear_tails()
        self._deleted = True
