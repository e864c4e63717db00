"""How a sequence takes tokens: space first, then the tail, then in the background to flash."""

import numpy as np

from kvfs.arrays import Array, check_finite, float_array, to_storage, token_id_array
from kvfs.layout import GroupLayout, KvGeometry
from kvfs.metadata import GroupRow, SequenceRow
from kvfs.tail import LayerTail, Spill
from kvfs.telemetry.requests import request
from spdk_glue.namespace import QUEUE_DEPTH

SPILL_BATCH_BYTES = 8 << 20  # written by one: long runs on flash, few hand-overs
SPILL_BATCH_EXTENTS = QUEUE_DEPTH // 2  # the rest for a group that goes out by head


class GrowingSequence:
    """A part of Sequence, which has what is used here."""

    _layout: GroupLayout
    _geometry: KvGeometry
    _row: SequenceRow
    _groups: list[GroupRow]
    _layers: list[LayerTail] | None

    @request("append", of="_store")
    def append(self, layer: int, keys: Array, values: Array) -> None:
        """Add tokens to one layer.

        keys, values: [num_tokens, num_kv_heads, head_dim]: NumPy, torch, DLPack or a buffer, in host memory, of
        any strides and any float type (of a bfloat16 model also its bits as uint16); rounded to the model's
        dtype; quantized later, page by page, if that has codes. NaN and infinity are stored as they are, and
        refused where they have no code. Writing to flash goes on in the background.

        Raises InvalidArgument for a wrong layer, shape, dtype or number; OutOfSpace with nothing appended.
        """
        with self._store._lock:
            self._use()
            layer = self._geometry.check_layer(layer)
            shape = (None, self._geometry.num_kv_heads, self._geometry.head_dim)
            meaning = "[num_tokens, num_kv_heads, head_dim]"
            dtype = self._geometry.numpy_dtype
            keys = float_array(keys, "keys", shape, meaning, dtype)
            values = float_array(values, "values", (len(keys), *shape[1:]), meaning, dtype)
            if self._geometry.is_quantized:
                keys, values = to_storage(keys, dtype), to_storage(values, dtype)
                check_finite(keys, "keys", self._geometry.dtype)
                check_finite(values, "values", self._geometry.dtype)
            tail = self._layers[layer]
            self._reserve_groups(layer, tail.num_tokens + len(keys))
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

    def append_tokens(self, token_ids: Array) -> None:
        """Keep token ids beside the KV: what a later prefill needs to know which tokens are here."""
        with self._store._lock:
            self._check_usable()
            self._tokens = np.concatenate([self._tokens, token_id_array(token_ids)])
            self._changed()

    def _reserve(self, layer: int, num_tokens: int) -> None:
        """Make sure of space for so many more tokens of a layer, that are to come in several appends."""
        with self._store._lock:
            self._use()
            layer = self._geometry.check_layer(layer)
            self._reserve_groups(layer, self._layers[layer].num_tokens + num_tokens)

    def _reserve_ahead(self, layer: int, num_bytes: int) -> int:
        """Have groups of up to so many bytes ready, where plenty are free; what nobody needs goes back with the
        next flush. Returns how many more tokens a layer takes without new space."""
        with self._store._lock:
            if self._deleted or self._store._space.quotas:  # by another since its tokens came; or none to spare
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

    def _reserve_groups(self, layer: int, num_tokens: int) -> None:
        """Allocate the groups that `num_tokens` tokens of a layer fill, all or none."""
        if self._store._space.is_counting:  # each append comes here, and few drives have caps
            counts = [tail.num_tokens for tail in self._layers]
            counts[layer] = num_tokens
            num_groups = max(len(self._groups), self._groups_of(num_tokens))
            self._store._space.reserve(self, num_groups, counts)
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
        self._store._spilled(self)

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
