"""A cache of objects as its user has it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from kvfs.errors import InvalidArgument, NvmeStatusError
from kvfs.objects.cache_index import CacheIndex, StoredObject
from kvfs.objects.counters import Miss, RequestMiss
from kvfs.objects.identity import identity_text
from kvfs.objects.object_caches import ObjectCaches
from kvfs.objects.object_catalogue import MAX_KEY_BYTES, CacheUsage
from kvfs.objects.object_data import Transfers, byte_array
from kvfs.placement import PLACEMENT_OBJECTS
from kvfs.prefix.match import check_tenant
from kvfs.sizes import parse_size
from kvfs.space.admission import check_admission
from kvfs.telemetry.requests import request
from spdk_glue.status import Status

MAX_NAME_BYTES = 255
log = logging.getLogger(__name__)


class Usage(NamedTuple):
    """Of a cache, all identities together. bytes: in whole blocks; misses: by reason, see counters.Miss."""

    objects: int
    bytes: int
    capacity: int | None
    hits: int
    misses: dict[str, int]
    evictions: int


class ObjectCache:
    """Made by Store.object_cache; valid until the store closes. Safe to call from several threads.

    Whoever opens the same name has the same cache: its objects, its cap and its counters.
    """

    def __init__(
        self,
        store: "ObjectStore",
        caches: ObjectCaches,
        index: CacheIndex,
        identity_id: int,
        admission: str = "all",
    ):
        self._store = store
        self._caches = caches
        self._index = index
        self._identity_id = identity_id
        self.admission = check_admission(admission)

    def __repr__(self) -> str:
        return f"<ObjectCache {self.name!r}, {self._index.used_bytes} bytes>"

    @property
    def name(self) -> str:
        return self._index.name

    @request("put_objects", of="_store")
    def put(self, keys: Sequence[bytes], objects: Sequence) -> list[bool]:
        """Store objects, all in one batch of writes.

        objects: buffers, whose bytes stay as they are meanwhile. True: it is stored now, or an object of this
        key and size was there already; its bytes are taken to be the same. One of another size is replaced.
        False: there is no room: it is larger than the cap, all is pinned, or the drive is full; or the cache
        declines what it is offered for the first time.

        Durable after the next flush. Raises InvalidArgument, NvmeStatusError with none of them stored.
        """
        return self._put(keys, objects, may_change=False)

    def _put(self, keys: Sequence[bytes], objects: Sequence, may_change: bool) -> list[bool]:
        """may_change: the objects lie in memory that others can write to."""
        arrays = distinct(keys, objects)
        caches, index = self._caches, self._index
        is_there = dict.fromkeys(arrays, False)
        present: list[StoredObject] = []
        reserved: dict[bytes, tuple] = {}
        declined: set[bytes] = set()
        with ExitStack() as stack:
            try:
                with self._store._lock:
                    self._store._check_open()
                    stack.enter_context(caches.call())
                    present += self._present(arrays)  # before any is evicted for another
                    is_there.update((found.key, True) for found in present)
                    declined = self._declined([key for key in arrays if not is_there[key]])
                    for key, data in arrays.items():
                        is_wanted = not is_there[key] and key not in declined
                        extents = caches.reserve(index, data.nbytes) if is_wanted else None
                        if extents is not None:
                            reserved[key] = extents
                self._write([(arrays[key], extents) for key, extents in reserved.items()], may_change)
            except BaseException as error:
                with caches.lock:
                    for extents in reserved.values():
                        caches.not_written(index, extents)
                if not isinstance(error, NvmeStatusError) or error.status != Status.CAPACITY_EXCEEDED:
                    raise
                reserved = {}
            finally:
                with caches.lock:
                    for found in present:
                        index.end_read(found)
            with caches.lock:
                for key, extents in reserved.items():
                    caches.written(index, self._identity_id, key, arrays[key].nbytes, extents)
                    is_there[key] = True
                    index.counters.stored += 1
                    index.counters.bytes_written += arrays[key].nbytes
                index.counters.present += len(present)
                index.counters.declined += len(declined)
                index.counters.bytes_spared += sum(arrays[key].nbytes for key in declined)
                index.counters.refused += sum(not found for found in is_there.values()) - len(declined)
        if caches.is_flush_due:
            with self._store._lock:
                self._store._check_open()
                self._store._sync_if_needed()
        return [is_there[key] for key in keys]

    def _declined(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that are not worth their flash yet."""
        if self.admission == "all":
            return set()
        with self._caches.lock:
            admits = self._index.second_sight.admits
            return {key for key in keys if not admits(self._identity_id, key)}

    def _present(self, arrays: Mapping[bytes, np.ndarray]) -> list[StoredObject]:
        """Objects of these keys and sizes, which are not evicted until `end_read`."""
        with self._caches.lock:
            found = [one for key in arrays if (one := self._find(key)) and one.num_bytes == arrays[key].nbytes]
            for one in found:
                self._index.begin_read(one)
            return found

    def _write(self, pairs: Sequence[tuple], may_change: bool) -> None:
        transfers = Transfers(self._caches.pool, self._caches.block_bytes)
        for data, extents in pairs:
            transfers.add(data, extents, may_change)
        transfers.fill()
        if transfers.pieces:
            self._store._namespace.write_scattered(transfers.pieces, PLACEMENT_OBJECTS)

    def _find(self, key: bytes) -> StoredObject | None:
        return self._index.find(self._identity_id, key)

    @request("get_objects", of="_store")
    def get(self, keys: Sequence[bytes], buffers: Sequence) -> list[bool]:
        """Read objects into buffers of their sizes, all in one batch of reads.

        Memory that begins on a page (4 KiB) is read into directly, other memory by way of a copy. False: a
        miss: there is no such object, it has another size, or the drive cannot give it back: such a one is
        dropped. The buffer may hold anything then. Raises InvalidArgument, NvmeStatusError.
        """
        check_keys(keys, buffers)
        arrays = [byte_array(buffer, writable=True) for buffer in buffers]
        caches, index = self._caches, self._index
        with caches.call():
            with caches.lock:
                found = [self._wanted(key, data.nbytes) for key, data in zip(keys, arrays, strict=True)]
            try:
                pairs = [(one, data) for one, data in zip(found, arrays, strict=True) if one is not None]
                damaged = self._read(pairs)
            finally:
                with caches.lock:
                    for one in filter(None, found):
                        index.end_read(one)
            with caches.lock:
                for one in filter(None, found):
                    if one in damaged:
                        self._drop_damaged(one)
                    else:
                        index.counters.hits += 1
                        index.counters.bytes_read += one.num_bytes
        return [one is not None and one not in damaged for one in found]

    def _is_of_other(self, key: bytes) -> bool:
        """Whether there is an object of this key, of another identity."""
        with self._caches.lock:
            return self._index.is_of_other(self._identity_id, key)

    def _wanted(self, key: bytes, num_bytes: int) -> StoredObject | None:
        """An object that is being read from here on; a miss is counted."""
        found = self._find(key)
        if found is not None and found.num_bytes == num_bytes:
            self._index.begin_read(found)
            return found
        if found is not None:
            self._index.counters.miss(Miss.SIZE)
        else:
            self._miss(key)
        return None

    def _miss(self, key: bytes) -> Miss:
        """Count that there is no such object."""
        is_other = self._index.is_of_other(self._identity_id, key)
        miss = Miss.IDENTITY if is_other else Miss.ABSENT
        self._index.counters.miss(miss)
        return miss

    def _read(self, pairs: Sequence[tuple]) -> set[StoredObject]:
        """Fill buffers; the objects that could not be read."""
        try:
            self._read_at_once(pairs)
            return set()
        except NvmeStatusError as error:
            if error.status != Status.UNRECOVERED_READ_ERROR:
                raise
        damaged = set()
        for pair in pairs:  # to know which
            try:
                self._read_at_once([pair], copy_all=True)  # nobody else can have changed it there
            except NvmeStatusError as error:
                if error.status != Status.UNRECOVERED_READ_ERROR:
                    raise
                damaged.add(pair[0])
        return damaged

    def _read_at_once(self, pairs: Sequence[tuple], copy_all: bool = False) -> None:
        transfers = Transfers(self._caches.pool, self._caches.block_bytes)
        for found, data in pairs:
            transfers.add(data, found.extents, copy_all)
        if transfers.pieces:
            self._store._namespace.read_scattered(transfers.pieces)
        transfers.empty()

    def _drop_damaged(self, found: StoredObject) -> None:
        self._index.counters.miss(Miss.DAMAGED)
        if self._index.drop(found):
            log.warning(
                "cache %r: object %s of %d bytes is damaged and dropped",
                self.name,
                found.key.hex(),
                found.num_bytes,
            )

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether there are objects of these keys; counts as no use."""
        return [size is not None for size in self.sizes(keys)]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """In bytes; None where there is no object."""
        check_keys(keys)
        with self._caches.lock:
            self._caches.check_open()
            return [self._index.size(self._identity_id, key) for key in keys]

    def look_up(self, keys: Sequence[bytes]) -> list[Miss | None]:
        """As `contains`, for who would use them: why it is a miss, which is counted; None: it is there."""
        check_keys(keys)
        with self._caches.lock:
            sizes = self.sizes(keys)
            return [
                None if size is not None else self._miss(key) for key, size in zip(keys, sizes, strict=True)
            ]

    def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """Keep objects from being evicted until they are unpinned as often, or the store closes.

        False: a miss, counted as that of `get`: nobody reads what he could not pin. What is there is a hit when
        it is read. Deleting, replacing and damage end a pin.
        """
        check_keys(keys)
        with self._caches.lock:
            self._caches.check_open()
            found = [self._find(key) for key in keys]
            for key, one in zip(keys, found, strict=True):
                if one is None:
                    self._miss(key)
                else:
                    self._index.pin(one)
            return [one is not None for one in found]

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """False: it is not there, or not pinned."""
        check_keys(keys)
        with self._caches.lock:
            self._caches.check_open()
            return [(found := self._find(key)) is not None and self._index.unpin(found) for key in keys]

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget objects, pinned or not; how many there were. Durable after the next flush."""
        check_keys(keys)
        with self._caches.lock:
            self._caches.check_open()
            return sum((found := self._find(key)) is not None and self._index.drop(found) for key in keys)

    def keys(self) -> Iterator[bytes]:
        """Of the objects that are there now."""
        with self._caches.lock:
            self._caches.check_open()
            return iter(self._index.keys(self._identity_id))

    def usage(self) -> Usage:
        with self._caches.lock:
            self._caches.check_open()
            index, counters = self._index, self._index.counters
            return Usage(
                index.num_objects,
                index.used_bytes,
                index.capacity_bytes,
                counters.hits,
                counters.misses_by_reason(),
                counters.evictions,
            )

    def count_request(self, tenant: str, model: str, wanted: int, found: int, miss: RequestMiss | None) -> None:
        """Count what became of one request of an engine, which knows tenants and models where keys do not.

        wanted, found: tokens; miss: why it was less. Shown by Store.counters. Raises InvalidArgument.
        """
        check_request(tenant, model, wanted, found, miss)
        with self._caches.lock:
            self._caches.check_open()
            self._index.requests.of(tenant, model).count(wanted, found, miss and RequestMiss(miss))

    def set_capacity(self, capacity_bytes: int | str | None) -> None:
        """Cap the whole name, durable after the next flush; None: what the drive has. Evicts at once.

        Raises InvalidArgument, with nothing changed but what was evicted, for less than what is pinned.
        """
        self._caches.set_capacity(self._index, check_capacity(capacity_bytes))


class ObjectStore:
    """What Store adds for caches of objects. Expects a store's lock and `_objects`."""

    _objects: ObjectCaches

    def object_cache(
        self,
        name: str,
        identity: Mapping[str, str | int | float | bool] | None = None,
        capacity_bytes: int | str | None = None,
        admission: str = "all",
    ) -> ObjectCache:
        """A cache of objects by keys, made if it is new.

        identity: what the bytes depend on beside the key (model, dtype, engine version): objects of one
        identity are not found under another
        capacity_bytes: the cap of the name, of all identities together and in whole blocks, from here on; None:
        as it was, at first what the drive has
        admission: "second-sight": what is put through this cache object is stored when it is put the second
        time (space/admission.py)

        Raises InvalidArgument.
        """
        check_cache_name(name)
        check_admission(admission)
        text, capacity = identity_text(identity), check_capacity(capacity_bytes)
        with self._lock:
            self._check_open()
            index, identity_id = self._objects.open(name, text)
            cache = ObjectCache(self, self._objects, index, identity_id, admission)
            if capacity is not None:
                cache.set_capacity(capacity)
            return cache

    def object_usage(self) -> list[CacheUsage]:
        """What is stored of each cache, by name. Reads all objects' rows."""
        with self._lock:
            self._check_open()
            return self._objects.usage()

    def drop_objects(self, name: str | None = None) -> int:
        """Forget all objects of one cache, or of all; names and caps stay. Returns how many there were."""
        with self._lock:
            self._check_open()
            return sum(
                self._objects.drop_all(usage.name)
                for usage in self._objects.usage()
                if name in (None, usage.name)
            )


def check_keys(keys: Sequence[bytes], buffers: Sequence | None = None) -> None:
    """Raises InvalidArgument."""
    for key in keys:
        if not isinstance(key, bytes) or not 1 <= len(key) <= MAX_KEY_BYTES:
            raise InvalidArgument(f"a key is 1 to {MAX_KEY_BYTES} bytes, not {key!r}")
    if buffers is not None and len(buffers) != len(keys):
        raise InvalidArgument(f"{len(keys)} keys with {len(buffers)} buffers")


def check_request(tenant: str, model: str, wanted: int, found: int, miss: str | None) -> None:
    """Raises InvalidArgument."""
    check_tenant(tenant)
    check_cache_name(model)
    is_good = isinstance(wanted, int) and isinstance(found, int) and 0 <= found <= wanted < 1 << 62
    if not is_good or miss not in (None, *RequestMiss) or (miss is None) != (found == wanted):
        raise InvalidArgument(f"no request: {found} of {wanted} tokens found, miss {miss!r}")


def distinct(keys: Sequence[bytes], objects: Sequence) -> dict[bytes, np.ndarray]:
    """uint8 views of objects by their keys. Raises InvalidArgument."""
    check_keys(keys, objects)
    arrays: dict[bytes, np.ndarray] = {}
    for key, data in zip(keys, map(byte_array, objects), strict=True):
        if arrays.setdefault(key, data).nbytes != data.nbytes:
            raise InvalidArgument(f"key {key.hex()} comes twice, with objects of different sizes")
    return arrays


def check_cache_name(name: str) -> None:
    """Raises InvalidArgument."""
    is_good = isinstance(name, str) and name.isprintable() and 1 <= len(name.encode()) <= MAX_NAME_BYTES
    if not is_good:
        raise InvalidArgument(f"a cache's name is 1 to {MAX_NAME_BYTES} printable bytes, not {name!r}")


def check_capacity(capacity_bytes: int | str | None) -> int | None:
    """Raises InvalidArgument."""
    if capacity_bytes is None:
        return None
    try:
        capacity = parse_size(capacity_bytes)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"a capacity is a number of bytes or a size like 8GiB: {error}") from error
    if not 0 < capacity < 1 << 62:
        raise InvalidArgument(f"a capacity is at least one byte, not {capacity}")
    return capacity
