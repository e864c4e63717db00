"""All caches of objects of one store: their rows, their blocks, and who is reading or writing.

Locks, outermost first: the store's, then `lock`, which is held for moments and never while anything is read or
written. Space and rows are the store's; finding an object needs `lock` alone, so reads wait for nobody.
"""

import logging
import threading
from contextlib import contextmanager

from kvfs.allocator import Extent
from kvfs.errors import CatalogueFull, InvalidArgument, StoreClosed
from kvfs.files.buffer_pool import BufferPool
from kvfs.objects.cache_index import CacheIndex, Changes, StoredObject
from kvfs.objects.counters import counters_of
from kvfs.objects.object_catalogue import ROW_BYTES, CacheRow, CacheUsage, ObjectCatalogue
from kvfs.objects.object_data import POOL_BYTES

FLUSH_BYTES = 256 << 20  # that came or went: then the catalogue is made durable without being asked
MAX_USES = 4096  # noted by one flush; the order of use is kept roughly
# a full drive: one object that comes has so much evicted, or each would have to make the catalogue durable
EVICTED_AT_ONCE = 16  # of the cache, one part in so many
MAX_EVICTED_BYTES = 64 << 20
log = logging.getLogger(__name__)


class ObjectCaches:
    def __init__(self, store, catalogue: ObjectCatalogue):
        self._store = store
        self._catalogue = catalogue
        self._namespace = store._namespace
        self.block_bytes = store._namespace.block_bytes
        self.pool = BufferPool(POOL_BYTES)
        self.lock = threading.RLock()
        self._ended = threading.Condition(self.lock)  # a call
        self._num_calls = 0  # that read or write
        self._is_closed = False
        self._caches: dict[str, CacheIndex] = {}
        self._changes = Changes()
        self._under_way: set[Extent] = set()  # blocks of objects that are being written
        self._next_id = catalogue.next_id()
        self._num_shares = 1

    # caches

    def open(self, name: str, identity: str) -> tuple[CacheIndex, int]:
        """(the cache, the identity's number). Called with the store's lock."""
        if name not in self._caches:
            row = self._catalogue.cache(name) or self._catalogue.add_cache(name)
            self._load(row)
        cache = self._caches[name]
        return cache, self._catalogue.identity(cache.id, identity)

    def _load(self, row: CacheRow) -> None:
        cache = CacheIndex(row, self.block_bytes, self._changes, self._num_shares)
        cache.load(self._catalogue.packed_objects(row.id))
        self._catalogue.drop_other_identities(row.id, cache.identities)
        with self.lock:
            cache.make_room(0)
            self._caches[row.name] = cache

    def drop_all(self, name: str) -> int:
        """Forget all objects of a cache that there is; how many. Called with the store's lock."""
        if name not in self._caches:
            self._load(self._catalogue.cache(name))
        with self.lock:
            cache = self._caches[name]
            return sum(map(cache.drop, cache.all()))

    def share(self, num_drives: int) -> None:
        """Caps are for so many drives together, each with an equal share.

        Evicts at once what is too much, but for what is pinned.
        """
        with self._store._lock, self.lock:
            self._num_shares = num_drives
            for cache in self._caches.values():
                cache.num_shares = num_drives
                cache.make_room(0)

    def set_capacity(self, cache: CacheIndex, capacity_bytes: int | None) -> None:
        """Evicts at once what is too much. Raises InvalidArgument where that cannot be."""
        with self._store._lock:
            self._store._check_open()
            with self.lock:
                before, cache.capacity_bytes = cache.capacity_bytes, capacity_bytes
                if not cache.make_room(0):
                    cache.capacity_bytes = before
                    kept = (cache.used_lbas - cache.evictable_lbas) * self.block_bytes
                    raise InvalidArgument(
                        f"cache {cache.name!r} has {kept} bytes pinned or in use, which a cap of"
                        f" {capacity_bytes} does not hold"
                    )
            if before != capacity_bytes:
                # what was evicted first: with the cap alone a power cut would have others evicted, by an older
                # order of use
                self.write_rows()
                self._catalogue.set_capacity(cache.id, capacity_bytes)

    def usage(self) -> list[CacheUsage]:
        """Of all caches, open or not. Called with the store's lock."""
        self.write_rows()
        return self._catalogue.usage()

    def counters(self) -> dict:
        with self.lock:
            return counters_of([self._caches[name] for name in sorted(self._caches)])

    # calls

    @contextmanager
    def call(self):
        """A call that reads or writes, which the store's closing waits for. Raises StoreClosed."""
        with self.lock:
            self.check_open()
            self._num_calls += 1
        try:
            yield
        finally:
            with self.lock:
                self._num_calls -= 1
                self._ended.notify_all()

    def check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed

    def close(self) -> None:
        """Nothing is read or written from here on."""
        with self.lock:
            self._is_closed = True
            while self._num_calls:
                self._ended.wait()

    # space, with the store's lock

    def reserve(self, cache: CacheIndex, num_bytes: int) -> tuple[Extent, ...] | None:
        """Blocks for an object of a cache, below its cap; None where that cannot be. Evicts as it needs to."""
        num_lbas = -(-num_bytes // self.block_bytes)
        with self.lock:
            if not cache.make_room(num_lbas):
                return None
        if not self._has_rows(cache):
            return None
        extents = self._allocate(cache, num_lbas) if num_lbas else []
        if extents is None:
            return None
        with self.lock:
            cache.reserve(num_lbas)
            self._under_way.update(extents)
        return tuple(extents)

    def _has_rows(self, cache: CacheIndex) -> bool:
        """Whether the catalogue has room for one more, if need be after eviction."""
        for _ in range(2):
            with self.lock:
                wanted = ROW_BYTES * (len(self._changes.added) + len(self._under_way) + 1)
            if self._store._catalogue.batch.free_bytes >= wanted:
                return True
            self._evict(cache, 1)
            self._store._sync()
        return False

    def _allocate(self, cache: CacheIndex, num_lbas: int) -> list[Extent] | None:
        allocator = self._store._allocator
        with self.lock:
            freed = sum(count for _, count in self._changes.freed)
            missing = num_lbas - allocator.free_lbas - freed - cache.evictable_lbas
        if missing > 0 and missing > self._store._sealing.num_lbas_in_all:
            return None
        extents = allocator.allocate_some(num_lbas)
        while extents is None:
            may_free = self._store._may_free or self._store._sealing.make_room(num_lbas)
            if not may_free and not self._evict(cache, num_lbas):
                return None
            self._store._sync()
            extents = allocator.allocate_some(num_lbas)
        return extents

    def _evict(self, cache: CacheIndex, num_lbas: int) -> int:
        """At least so many blocks, and some more; how many it were."""
        with self.lock:
            wanted = min(cache.used_lbas // EVICTED_AT_ONCE, MAX_EVICTED_BYTES // self.block_bytes)
            wanted, done = max(wanted, num_lbas), 0
            while done < wanted and (evicted := cache.evict()):
                done += evicted.num_lbas
            return done

    # objects, with `lock`

    def written(self, cache: CacheIndex, identity_id: int, key: bytes, num_bytes: int, extents) -> None:
        """What was reserved holds an object now. Where another has stored it meanwhile, that one stays."""
        self._under_way.difference_update(extents)
        there = cache.find(identity_id, key)
        if there is not None and there.num_bytes == num_bytes:
            cache.give_up(extents)
            cache.use(there)
            return
        cache.add(StoredObject(self._next_id, identity_id, key, num_bytes, extents))
        self._next_id += 1

    def not_written(self, cache: CacheIndex, extents) -> None:
        self._under_way.difference_update(extents)
        cache.give_up(extents)

    # the catalogue, with the store's lock

    @property
    def has_changes(self) -> bool:
        """Whether there is something that rows should say now. The order of use alone may wait."""
        changes = self._changes
        return bool(changes.added or changes.deleted or changes.freed or len(changes.used) >= MAX_USES)

    @property
    def has_freed(self) -> bool:
        return bool(self._changes.freed)

    @property
    def is_flush_due(self) -> bool:
        return self._changes.num_lbas * self.block_bytes >= FLUSH_BYTES

    def write_rows(self) -> None:
        """Tell the catalogue what has changed; then blocks that nobody names wait to be released.

        Inside a transaction it waits: what is taken back with that must not have freed anything.
        """
        if self._store._catalogue.is_in_transaction:
            return
        with self.lock:
            if not self._changes:
                return
            changes = self._take_changes()
            uses = [(found.last_use, found.id) for found in [*changes.used.values()][-MAX_USES:]]
            rows = [found.row() for found in changes.added.values()]
        try:
            self._catalogue.write([*changes.deleted], uses)
            try:
                self._catalogue.add(rows)
            except CatalogueFull as error:
                self._give_up(changes, error)
        except BaseException:
            with self.lock:
                self._changes.put_back(changes)
            raise
        for extent in changes.freed:
            self._store._allocator.hold(*extent)

    def _take_changes(self) -> Changes:
        changes = Changes(**vars(self._changes))
        vars(self._changes).update(vars(Changes()))  # the same object, which the indexes have
        return changes

    def _give_up(self, changes: Changes, error: CatalogueFull) -> None:
        """The catalogue has no room: a cache is not what fails for it."""
        log.warning("%s: %d objects are dropped", error, len(changes.added))
        with self.lock:
            caches = {identity: cache for cache in self._caches.values() for identity in cache.identities}
            for found in changes.added.values():
                caches[found.identity_id].drop(found)
        # the row of what one has replaced names blocks that are free once this is durable
        self._catalogue.write([*changes.added], ())

    @property
    def under_way_lbas(self) -> int:
        """Of objects that are being written."""
        with self.lock:
            return sum(count for _, count in self._under_way)

    @property
    def leaving_lbas(self) -> int:
        """Of objects that are gone but still being read, or whose blocks wait for the next rows."""
        with self.lock:
            leaving = (found.num_lbas for cache in self._caches.values() for found in cache.leaving)
            return sum(leaving) + sum(count for _, count in self._changes.freed)

    def extents_in_memory(self) -> list[Extent]:
        """That are taken, and named by no row or maybe by none."""
        with self.lock:
            read = [
                extent for cache in self._caches.values() for found in cache.leaving for extent in found.extents
            ]
            added = [extent for found in self._changes.added.values() for extent in found.extents]
            return [*self._under_way, *added, *self._changes.freed, *read]
