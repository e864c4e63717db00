"""Many objects in little memory: keys and places in arrays, found by a hash table with open addressing.

An object has a slot, a number. With keys of 64 bytes a million take about 120 MB with their order of use. No
Python object stays for one that is stored, so nothing is there for the garbage collector to visit.
"""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from kvfs.allocator import Extent
from kvfs.objects.object_catalogue import unpack_extents
from kvfs.objects.use_order import NO_SLOT

_FREE = -1  # in place of an id
_MIN_TABLE = 64
_KEY_STEP = 16  # keys are as wide as the longest, in whole steps
_ODD = 0x1E3779B97F4A7C15  # tells identities apart that have the same keys
_HASH_MASK = (1 << 63) - 1
_EXTENT_BYTES = 16


class PackedObjects:
    """block_bytes: of the blocks that objects lie in."""

    def __init__(self, block_bytes: int):
        self._block_bytes = block_bytes
        self._ids = array("q")
        self._identities = array("q")
        self._sizes = array("q")  # bytes
        self._first_lbas = array("q")
        self._hashes = array("q")
        self._key_lengths = array("B")
        self._keys = bytearray()  # [slot, _key_width]
        self._key_width = _KEY_STEP
        self._extents: dict[int, tuple[Extent, ...]] = {}  # by slot, of those that are not in one piece
        self._free = array("i")
        self._rebuild_table()

    def __len__(self) -> int:
        return len(self._ids) - len(self._free)

    @property
    def num_slots(self) -> int:
        return len(self._ids)

    def slots(self, identity_id: int | None = None) -> list[int]:
        """Of all objects, or of an identity's."""
        chosen = np.asarray(self._ids) != _FREE
        if identity_id is not None:
            chosen &= np.asarray(self._identities) == identity_id
        return np.flatnonzero(chosen).tolist()

    def identities(self) -> dict[int, int]:
        """How many objects each has."""
        used = np.asarray(self._identities)[np.asarray(self._ids) != _FREE]
        return dict(zip(*(each.tolist() for each in np.unique(used, return_counts=True)), strict=True))

    # one object

    def key(self, slot: int) -> bytes:
        start = slot * self._key_width
        return bytes(self._keys[start : start + self._key_lengths[slot]])

    def num_bytes(self, slot: int) -> int:
        return self._sizes[slot]

    def row(self, slot: int) -> tuple[int, int, bytes, int, tuple[Extent, ...]]:
        """(id, identity, key, bytes, extents)"""
        num_bytes = self._sizes[slot]
        extents = self._extents.get(slot)
        if extents is None:
            num_lbas = -(-num_bytes // self._block_bytes)
            extents = ((self._first_lbas[slot], num_lbas),) if num_lbas else ()
        return self._ids[slot], self._identities[slot], self.key(slot), num_bytes, extents

    def find(self, identity_id: int, key: bytes) -> int:
        """Its slot, or NO_SLOT."""
        hashed = _hash(identity_id, key)
        position = hashed & self._mask
        while (slot := self._table[position]) != NO_SLOT:
            if self._hashes[slot] == hashed and self._identities[slot] == identity_id and self.key(slot) == key:
                return slot
            position = (position + 1) & self._mask
        return NO_SLOT

    def add(self, id: int, identity_id: int, key: bytes, num_bytes: int, extents: tuple[Extent, ...]) -> int:
        """The slot of an object that is not there yet."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._ids)
            for column in (self._ids, self._identities, self._sizes, self._first_lbas, self._hashes):
                column.append(0)
            self._key_lengths.append(0)
            self._keys += bytes(self._key_width)
        self._ids[slot], self._identities[slot], self._sizes[slot] = id, identity_id, num_bytes
        self._hashes[slot] = _hash(identity_id, key)
        self._widen(len(key))
        start = slot * self._key_width
        self._keys[start : start + len(key)] = key
        self._key_lengths[slot] = len(key)
        if len(extents) == 1:
            self._first_lbas[slot] = extents[0][0]
        elif extents:
            self._extents[slot] = extents
        self._enter(slot)
        return slot

    def remove(self, slot: int) -> None:
        self._leave(slot)
        self._ids[slot] = _FREE
        self._extents.pop(slot, None)
        self._free.append(slot)

    def _widen(self, num_bytes: int) -> None:
        """So that such a key fits."""
        if num_bytes > self._key_width:
            width = -(-num_bytes // _KEY_STEP) * _KEY_STEP
            narrow = np.frombuffer(self._keys, np.uint8).reshape(-1, self._key_width)
            wider = np.zeros((len(narrow), width), np.uint8)
            wider[:, : self._key_width] = narrow
            self._keys, self._key_width = bytearray(wider.data), width

    # all at once

    def load(self, batches: Iterable[Sequence[tuple]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `ObjectCatalogue.packed_objects`, in their order from slot 0 on; nothing was there.

        Returns the last uses and the numbers of blocks, int64 [objects] each.
        """
        last_uses = array("q")
        for rows in batches:
            self._append(rows, last_uses)
        self._rebuild_table()
        num_lbas = -(-np.asarray(self._sizes) // self._block_bytes)
        for slot, extents in self._extents.items():
            num_lbas[slot] = sum(count for _, count in extents)
        return np.array(last_uses), num_lbas

    def _append(self, rows: Sequence[tuple], last_uses: array) -> None:
        first_slot = self.num_slots
        ids, identities, keys, sizes, uses, packed = zip(*rows, strict=True)
        for column, values in ((self._ids, ids), (self._sizes, sizes), (last_uses, uses)):
            column.extend(array("q", values))
        owners = array("q", identities)
        self._identities.extend(owners)
        hashed = np.fromiter(map(hash, keys), np.int64, len(keys)) ^ np.asarray(owners) * np.int64(_ODD)
        self._hashes.frombytes((hashed & _HASH_MASK).tobytes())
        self._append_keys(keys)
        # a row is in one piece if it says so, and of as many blocks as its bytes need
        num_packed = np.fromiter(map(len, packed), np.int64, len(packed))
        if (num_packed != _EXTENT_BYTES).any():
            whole = [each if len(each) == _EXTENT_BYTES else bytes(_EXTENT_BYTES) for each in packed]
        else:
            whole = packed
        extents = np.frombuffer(b"".join(whole), "<i8").reshape(-1, 2)
        self._first_lbas.frombytes(extents[:, 0].astype(np.int64).tobytes())
        num_lbas = -(-np.array(sizes, np.int64) // self._block_bytes)
        is_plain = (extents[:, 0] >= 0) & (extents[:, 1] == num_lbas)
        is_plain &= num_packed == np.where(num_lbas, _EXTENT_BYTES, 0)
        for place in np.flatnonzero(~is_plain).tolist():
            self._extents[first_slot + place] = unpack_extents(packed[place])

    def _append_keys(self, keys: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, keys), np.uint8, len(keys))
        self._widen(int(lengths.max()))
        self._key_lengths.frombytes(lengths.tobytes())
        padded = np.zeros((len(keys), self._key_width), np.uint8)
        padded[np.arange(self._key_width) < lengths[:, None]] = np.frombuffer(b"".join(keys), np.uint8)
        self._keys += padded.data

    # the hash table: slots at the first free place from their hash on

    def _enter(self, slot: int) -> None:
        if 3 * len(self) > 2 * len(self._table):
            self._rebuild_table()
            return
        position = self._hashes[slot] & self._mask
        while self._table[position] != NO_SLOT:
            position = (position + 1) & self._mask
        self._table[position] = slot

    def _leave(self, slot: int) -> None:
        """Those behind move up, so that no search ends early at the place that is free now."""
        table, mask = self._table, self._mask
        hole = self._hashes[slot] & mask
        while table[hole] != slot:
            hole = (hole + 1) & mask
        position = (hole + 1) & mask
        while (other := table[position]) != NO_SLOT:
            if (position - self._hashes[other]) & mask >= (position - hole) & mask:
                table[hole] = other
                hole = position
            position = (position + 1) & mask
        table[hole] = NO_SLOT

    def _rebuild_table(self) -> None:
        size = _MIN_TABLE
        while size < 2 * len(self):
            size *= 2
        slots = np.flatnonzero(np.asarray(self._ids) != _FREE)
        positions = np.asarray(self._hashes)[slots] & (size - 1)
        table = np.full(size, NO_SLOT, np.intc)
        while len(slots):
            is_free = table[positions] == NO_SLOT
            table[positions[is_free]] = slots[is_free]  # of several one has it, the others go on
            is_left = table[positions] != slots
            slots, positions = slots[is_left], (positions[is_left] + 1) & (size - 1)
        self._table, self._mask = array("i", table.tobytes()), size - 1


def _hash(identity_id: int, key: bytes) -> int:
    return (hash(key) ^ identity_id * _ODD) & _HASH_MASK
