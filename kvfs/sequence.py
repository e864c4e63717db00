"""A sequence: the KV of one request's tokens, in all layers of a model.

Groups that are full are immutable, so forks share them. What a truncation or a fork leaves of a partly
filled group is read back into the tail: blocks that durable metadata names are never written again.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from kvfs import head_rows, tail_record, token_rows
from kvfs.arrays import check_finite, float_array, to_storage, token_id_array
from kvfs.errors import InvalidArgument
from kvfs.head_rows import HeadBatch, HeadRows
from kvfs.layout import GroupLayout
from kvfs.metadata import GroupRow, SequenceRow
from kvfs.sequence_attributes import check_attribute, check_names
from kvfs.sequence_version import History, Version
from kvfs.tail import LayerTail, Spill
from spdk_glue.namespace import QUEUE_DEPTH

PLACEMENT_TAIL = 1
PLACEMENT_KV = 3  # and up: see placement.py
SPILL_BATCH_BYTES = 8 << 20  # written by one: long runs on flash, few hand-overs
SPILL_BATCH_EXTENTS = QUEUE_DEPTH // 2  # the rest for a group that goes out by head


class Sequence:
    """Made by Store.create_sequence, Store.sequence and fork; valid until deleted or the store closes."""

    def __init__(self, store, model, row: SequenceRow):
        self._store = store
        self.model = model
        self._row = row
        self._layout: GroupLayout = model.layout
        self._groups: list[GroupRow] = store._catalogue.groups(row.id)
        self._groups_changed_from = len(self._groups)  # positions from here on differ from the catalogue
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
    def _geometry(self):
        return self.model.geometry

    @property
    def store(self):
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

    # growing

    def append(self, layer: int, keys, values) -> None:
        """Add tokens to one layer.

        keys, values: [num_tokens, num_kv_heads, head_dim], NumPy or torch, any float type; rounded to the
        model's dtype; quantized later, page by page, if that has codes. NaN and infinity are stored as they
        are, and refused where they have no code. Writing to flash goes on in the background.

        Raises InvalidArgument for a wrong layer, shape, dtype or number; OutOfSpace with nothing appended.
        """
        with self._store._lock:
            self._use()
            layer = self._geometry.check_layer(layer)
            shape = (None, self._geometry.num_kv_heads, self._geometry.head_dim)
            meaning = "[num_tokens, num_kv_heads, head_dim]"
            keys = float_array(keys, "keys", shape, meaning)
            values = float_array(values, "values", (len(keys), *shape[1:]), meaning)
            dtype = self._geometry.numpy_dtype
            if self._geometry.is_quantized:
                keys, values = to_storage(keys, dtype), to_storage(values, dtype)
                check_finite(keys, "keys", self._geometry.dtype)
                check_finite(values, "values", self._geometry.dtype)
            tail = self._layers[layer]
            self._reserve_groups(tail.num_tokens + len(keys))
            self._changed()
            group_tokens = self._geometry.group_tokens
            start = 0
            due: list[tuple[int, np.ndarray]] = []
            while start < len(keys):
                count = min(group_tokens - tail.num_tokens % group_tokens, len(keys) - start)
                part = slice(start, start + count)
                tail.pack(to_storage(keys[part], dtype), to_storage(values[part], dtype))
                due.extend(self._due_extents(layer, tail))
                if len(due) * self._layout.image_bytes >= SPILL_BATCH_BYTES or len(due) >= SPILL_BATCH_EXTENTS:
                    self._spill(layer, tail, due)
                    due = []
                start += count
            if due:
                self._spill(layer, tail, due)

    def append_tokens(self, token_ids) -> None:
        """Keep token ids beside the KV: what a later prefill needs to know which tokens are here."""
        with self._store._lock:
            self._check_usable()
            self._tokens = np.concatenate([self._tokens, token_id_array(token_ids)])
            self._changed()

    def _reserve(self, layer: int, num_tokens: int) -> None:
        """Make sure of space for so many more tokens of a layer, that are to come in several appends."""
        with self._store._lock:
            self._use()
            self._reserve_groups(self._layers[self._geometry.check_layer(layer)].num_tokens + num_tokens)

    def _reserve_ahead(self, layer: int, num_bytes: int) -> int:
        """Have groups of up to so many bytes ready, where plenty are free; what nobody needs goes back with the
        next flush. Returns how many more tokens a layer takes without new space."""
        with self._store._lock:
            if self._deleted:  # by another since its tokens came
                return 0
            num_tokens, group_lbas = self.layer_tokens(layer), self._layout.group_lbas
            if len(self._groups) <= self._groups_of(num_tokens):
                num_lbas = min(num_bytes // self._store._namespace.block_bytes, self._store._plenty_of_lbas)
                self._groups.extend(self._store._allocate_now(num_lbas // group_lbas, group_lbas))
            # a part group that waits in the tail needs no space yet
            part_group = 0 if self._groups_of(1) else self._geometry.group_tokens - 1
            return len(self._groups) * self._geometry.group_tokens + part_group - num_tokens

    @property
    def _writeback_tokens(self) -> int:
        """Tokens of a layer that are worth a spill: by default a whole group."""
        return self._store._writeback_tokens or self._geometry.group_tokens

    def _groups_of(self, num_tokens: int) -> int:
        """How many `num_tokens` tokens need: a part group waits in the tail, unless it is spilled early."""
        if self._writeback_tokens < self._geometry.group_tokens:
            return -(-num_tokens // self._geometry.group_tokens)
        return num_tokens // self._geometry.group_tokens

    def _reserve_groups(self, num_tokens: int) -> None:
        """Allocate the groups that `num_tokens` tokens fill, all or none."""
        missing = self._groups_of(num_tokens) - len(self._groups)
        self._groups.extend(self._store._allocate_groups(missing, self._layout.group_lbas))

    def _due_extents(self, layer: int, tail: LayerTail) -> list[tuple[int, np.ndarray]]:
        """What of the tail is due for writing, as (LBA, buffer); noted as submitted."""
        due = tail.spillable(self._writeback_tokens)
        if due is None:
            return []
        position, first_page, stop_page, tail.num_submitted = due
        base = self._groups[position].base_lba + layer * self._layout.layer_lbas
        return tail.extents(base, position, first_page, stop_page)

    def _spill(self, layer: int, tail: LayerTail, extents: list[tuple[int, np.ndarray]]) -> None:
        """Start writing a batch that ends at num_submitted."""
        num_bytes = sum(buffer.nbytes for _, buffer in extents)
        self._store._spills.make_room(num_bytes)
        pending = self._store._namespace.submit_write(extents, self._placement_id)
        spill = Spill(pending, tail.num_submitted, num_bytes)
        tail.spills.append(spill)
        self._bytes_spilled += num_bytes
        self._store._spills.note(self, layer, spill)

    @property
    def _placement_id(self) -> int:
        num_bytes = len(self._groups) * self._layout.group_lbas * self._store._namespace.block_bytes
        # nothing says yet when a sequence will be deleted
        placement = self._store._placement.place(self._row.id, num_bytes, now=0, expected_death=None)
        return placement.identifier(self._bytes_spilled)

    def _end_finished_spills(self, layer: int) -> None:
        """Take note of what has reached the flash, without waiting."""
        spills = self._layers[layer].spills
        while spills and self._store._namespace.is_done(spills[0].pending):
            self._complete_oldest_spill(layer)

    def _complete_spills(self, layer: int) -> None:
        while self._layers[layer].spills:
            self._complete_oldest_spill(layer)

    def _complete_oldest_spill(self, layer: int) -> None:
        """Wait for a layer's oldest spill, if there is one. A failed one is tried again by the next append."""
        tail = self._layers[layer] if self._layers else None
        if tail is None or not tail.spills:
            return
        spill = tail.take_oldest_spill()
        try:
            self._store._namespace.complete(spill.pending)
        except Exception:
            # what did not reach the flash stays in its images, and what was to follow it goes with it
            while tail.spills:
                self._store._namespace.wait(tail.take_oldest_spill().pending)
            tail.num_submitted = tail.num_spilled
            raise
        tail.completed(spill)

    def _wait_for_spills(self) -> None:
        for layer in range(self._geometry.num_layers):
            self._complete_spills(layer)

    # reading

    def read(self, layer: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(keys, values) of tokens [start, stop) of a layer: [num_tokens, num_kv_heads, head_dim] as stored.

        Of a quantized model float16: what is on flash, or on its way there, as its codes say it.
        """
        with self._store._lock:
            self._use()
            layer = self._geometry.check_layer(layer)
            limit = self._layers[layer].num_tokens
            stop = limit if stop is None else stop
            if not 0 <= start <= stop <= limit:
                raise InvalidArgument(f"tokens [{start}, {stop}) of a layer that has {limit}")
            self._complete_spills(layer)
            return self._read_layer(layer, start, stop)

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
            with self._store._lock:
                self._check_usable()
                if self._history.epoch == epoch:  # or the blocks may have become another's
                    return batch.rows()

    def _read_layer(self, layer: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        tail = self._layers[layer]
        shape = (stop - start, self._geometry.num_kv_heads, self._geometry.head_dim)
        keys, values = (np.empty(shape, self._geometry.numpy_dtype) for _ in range(2))
        on_flash = min(stop, tail.num_spilled)
        if start < on_flash:
            drive = self._store._namespace
            token_rows.read(drive, self._layout, self._groups, layer, start, on_flash, keys, values)
        if on_flash < stop:
            first = max(start, on_flash)
            tail.read(first, stop, keys[first - start :], values[first - start :])
        return keys, values

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
            self._store._catalogue.set_attribute(self._row.id, name, value)

    def remove_attribute(self, name: str) -> None:
        """Forget an attribute if there is one."""
        with self._store._lock:
            self._check_usable()
            self._store._catalogue.remove_attribute(self._row.id, name)

    # durability

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
        self._drop_groups(max(self._groups_of(tail.num_tokens) for tail in self._layers))
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
            child = None
            try:
                with self._store._catalogue.transaction():  # the name and what it holds, or neither
                    row = self._store._catalogue.create_sequence(self.model.id, name)
                    self._store._catalogue.inherit_attributes(row.id, self._row.id)
                    for attribute, value in attributes.items():
                        self._store._catalogue.set_attribute(row.id, attribute, value)
                    child = Sequence(self._store, self.model, row)
                    child._take_tokens(self)
                    child._store_state()
            except BaseException:
                if child is not None:
                    child._clear_tails()
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
        for group in self._groups:
            if group.id is None:
                self._store._allocator.hold(group.base_lba, group.num_lbas)
        self._clear_tails()
        self._deleted = True
