"""The objects of a cache in memory: where each one lies, the order of use, and the cap.

An object that is pinned or being read is in no order of use: it cannot be evicted. Blocks of an object that is
gone stay whole until the last reader has ended. `Changes` gathers what the catalogue is to be told, and the
blocks that may be given back once it has been.

What is stored lies packed (packed_objects.py). A `StoredObject` is made of it when one is wanted, and is the
only one of its slot for as long as anybody has it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np

from kvfs.allocator import Extent
from kvfs.objects.counters import ObjectCounters, RequestCounters
from kvfs.objects.object_catalogue import CacheRow, ObjectRow
from kvfs.objects.packed_objects import PackedObjects
from kvfs.objects.use_order import NO_SLOT, UseOrder
from kvfs.space.admission import SecondSight
from kvfs.tenant_counters import ByTenant


@dataclass(slots=True, eq=False, weakref_slot=True)
class StoredObject:
    """id: of its row, to be or written; one that replaces another has its row.

    last_use: higher than those of its cache that were used earlier, 0 until it is used; is_gone: nobody finds
    it any more; slot: where it is packed
    """

    id: int
    identity_id: int
    key: bytes
    num_bytes: int
    extents: tuple[Extent, ...]
    last_use: int = 0
    pins: int = 0
    readers: int = 0
    is_gone: bool = False
    slot: int = NO_SLOT

    @property
    def num_lbas(self) -> int:
        return sum(count for _, count in self.extents)

    def row(self) -> ObjectRow:
        return ObjectRow(self.id, self.identity_id, self.key, self.num_bytes, self.last_use, self.extents)


@dataclass
class Changes:
    """Of all caches of a store, since rows were written last.

    freed: blocks of nobody, which rows may still name; num_lbas: that came or went
    """

    added: dict[int, StoredObject] = field(default_factory=dict)
    deleted: dict[int, None] = field(default_factory=dict)
    used: dict[int, StoredObject] = field(default_factory=dict)
    freed: list[Extent] = field(default_factory=list)
    num_lbas: int = 0

    def __bool__(self) -> bool:
        return bool(self.added or self.deleted or self.used or self.freed)

    def add(self, found: StoredObject) -> None:
        self.used.pop(found.id, None)
        self.added[found.id] = found
        self.num_lbas += found.num_lbas

    def use(self, found: StoredObject) -> None:
        if found.id not in self.added:
            self.used.pop(found.id, None)
            self.used[found.id] = found  # newest last

    def delete(self, found: StoredObject) -> None:
        self.used.pop(found.id, None)
        self.added.pop(found.id, None)
        self.deleted[found.id] = None  # if it has none yet, one that it has replaced may have left it

    def free(self, extents) -> None:
        self.freed += extents
        self.num_lbas += sum(count for _, count in extents)

    def put_back(self, earlier: "Changes") -> None:
        """Those that could not be written; writing some of them twice does no harm."""
        alive = {number: found for number, found in earlier.added.items() if not found.is_gone}
        self.added = {**alive, **self.added}
        self.deleted = {**earlier.deleted, **self.deleted}
        alive = {number: found for number, found in earlier.used.items() if not found.is_gone}
        self.used = {**alive, **self.used}
        self.freed = earlier.freed + self.freed
        self.num_lbas += earlier.num_lbas


class CacheIndex:
    """One cache, whoever has it open. Used under the lock of `ObjectCaches`.

    used_lbas: of objects found and on their way, and of those gone that are still being read
    evictable_lbas: of objects that may be evicted
    """

    def __init__(self, row: CacheRow, block_bytes: int, changes: Changes, num_shares: int = 1):
        """num_shares: of the cap, of which this is to keep to one"""
        self.id, self.name = row.id, row.name
        self.capacity_bytes = row.capacity_bytes
        self.num_shares = num_shares
        self.counters = ObjectCounters()
        self.requests = ByTenant(RequestCounters)
        self.second_sight = SecondSight()  # for who asks
        self.used_lbas = 0
        self._block_bytes = block_bytes
        self._changes = changes
        self._clock = 0  # of uses
        self._objects = PackedObjects(block_bytes)
        self._order = UseOrder()  # of slots
        self._num_of: Counter[int] = Counter()  # objects of identities
        self.evictable_lbas = 0
        self._known: WeakValueDictionary[int, StoredObject] = WeakValueDictionary()  # by slot
        self._kept: set[StoredObject] = set()  # pinned or being read
        self._leaving: set[StoredObject] = set()  # gone, and still being read

    def load(self, batches: Iterable[Sequence[tuple]]) -> None:
        """All rows of the cache, see `ObjectCatalogue.packed_objects`."""
        last_uses, num_lbas = self._objects.load(batches)
        self._order.add_slots(len(last_uses))
        self._order.fill(np.argsort(last_uses, kind="stable"))
        self._num_of.update(self._objects.identities())
        self._clock = int(last_uses.max(initial=0))
        self.used_lbas = self.evictable_lbas = int(num_lbas.sum())

    def _object(self, slot: int) -> StoredObject:
        found = self._known.get(slot)
        if found is None:
            found = self._known[slot] = StoredObject(*self._objects.row(slot), slot=slot)
        return found

    def _newest(self, found: StoredObject) -> None:
        if found.slot in self._order:
            self._order.remove(found.slot)
        else:
            self._kept.discard(found)
            self.evictable_lbas += found.num_lbas
        self._order.append(found.slot)
        self._clock += 1
        found.last_use = self._clock

    def _keep(self, found: StoredObject) -> None:
        """It is not to be evicted."""
        if found.slot in self._order:
            self._order.remove(found.slot)
            self._kept.add(found)
            self.evictable_lbas -= found.num_lbas

    @property
    def num_objects(self) -> int:
        return len(self._objects)

    @property
    def used_bytes(self) -> int:
        return self.used_lbas * self._block_bytes

    def find(self, identity_id: int, key: bytes) -> StoredObject | None:
        slot = self._objects.find(identity_id, key)
        return None if slot == NO_SLOT else self._object(slot)

    def size(self, identity_id: int, key: bytes) -> int | None:
        """In bytes; None where there is no such object."""
        slot = self._objects.find(identity_id, key)
        return None if slot == NO_SLOT else self._objects.num_bytes(slot)

    def keys(self, identity_id: int) -> list[bytes]:
        return [self._objects.key(slot) for slot in self._objects.slots(identity_id)]

    @property
    def identities(self) -> list[int]:
        """That have or had objects."""
        return [*self._num_of]

    def all(self) -> Iterator[StoredObject]:
        """Those there are now. They may be dropped meanwhile; no other may come or go."""
        return map(self._object, self._objects.slots())

    @property
    def leaving(self) -> list[StoredObject]:
        """Gone, and still being read."""
        return [*self._leaving]

    def is_of_other(self, identity_id: int, key: bytes) -> bool:
        """Whether another identity has such a key."""
        others = (other for other, count in self._num_of.items() if count and other != identity_id)
        return any(self._objects.find(other, key) != NO_SLOT for other in others)

    # the cap

    def make_room(self, num_lbas: int) -> bool:
        """Evict until so many blocks more stay below the cap; False, with none evicted, if that cannot be."""
        if self.capacity_bytes is None:
            return True
        limit = self.capacity_bytes // self.num_shares // self._block_bytes - num_lbas
        if self.used_lbas - self.evictable_lbas > limit:
            return False
        while self.used_lbas > limit:
            self.evict()
        return True

    def evict(self) -> StoredObject | None:
        """Drop the object that was not used longest; None where none can be dropped."""
        slot = self._order.oldest
        if slot == NO_SLOT:
            return None
        found = self._object(slot)
        self.drop(found)
        self.counters.evictions += 1
        return found

    def reserve(self, num_lbas: int) -> None:
        """Blocks for an object on its way."""
        self.used_lbas += num_lbas

    def give_up(self, extents: tuple[Extent, ...]) -> None:
        """Blocks that nobody names any more."""
        self.used_lbas -= sum(count for _, count in extents)
        self._changes.free(extents)

    # objects

    def add(self, found: StoredObject) -> None:
        """One whose blocks were reserved and are written. One of its key gives way, in the same transaction."""
        before = self.find(found.identity_id, found.key)
        if before is not None:
            found.id = before.id
            self._leave(before)
        found.slot = self._objects.add(found.id, found.identity_id, found.key, found.num_bytes, found.extents)
        if found.slot >= self._order.num_slots:
            self._order.add_slots(1)
        self._known[found.slot] = found
        self._num_of[found.identity_id] += 1
        self._newest(found)
        self._changes.add(found)

    def drop(self, found: StoredObject) -> bool:
        """Nobody finds it from here on; False if that was so already."""
        if found.is_gone:
            return False
        self._changes.delete(found)
        self._leave(found)
        return True

    def _leave(self, found: StoredObject) -> None:
        found.is_gone = True
        self._keep(found)
        self._kept.discard(found)
        del self._known[found.slot]
        self._objects.remove(found.slot)
        self._num_of[found.identity_id] -= 1
        found.slot = NO_SLOT
        if found.readers:
            self._leaving.add(found)
        else:
            self.give_up(found.extents)

    def begin_read(self, found: StoredObject) -> None:
        found.readers += 1
        self._keep(found)

    def end_read(self, found: StoredObject) -> None:
        found.readers -= 1
        if found.is_gone:
            if not found.readers:
                self._leaving.remove(found)
                self.give_up(found.extents)
        else:
            self.use(found)

    def use(self, found: StoredObject) -> None:
        """It was used just now."""
        if not (found.pins or found.readers):
            self._newest(found)
        self._changes.use(found)

    def pin(self, found: StoredObject) -> None:
        found.pins += 1
        self._keep(found)

    def unpin(self, found: StoredObject) -> bool:
        if not found.pins:
            return False
        found.pins -= 1
        self.use(found)
        return True
