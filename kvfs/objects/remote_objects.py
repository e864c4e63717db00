"""Caches of objects of a store that another process owns: what crosses to it, and what the owner makes of it.

Objects cross in the shared memory, each from a page on, so that the drive reads straight into it. What a client
stores is copied by the owner first: it could change while the drive writes it. Users of a mount have caches of
their own, but for root and whoever mounted: names count within a user. Pins are the client's, and go with it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.objects.counters import Miss, RequestMiss, sums
from kvfs.objects.identity import identity_text
from kvfs.objects.object_cache import (
    ObjectCache,
    Usage,
    check_cache_name,
    check_capacity,
    check_keys,
    check_request,
)
from kvfs.objects.object_catalogue import CacheUsage
from kvfs.objects.object_data import byte_array
from kvfs.prefix import remote_reuse
from kvfs.space.admission import check_admission

PAGE_BYTES = 4096
KEYS_AT_ONCE = 2048  # in one request, whose length is limited
MAX_CACHES = 1024  # that a client has open
_BYTE = np.dtype(np.uint8)


class RemoteObjectStore:
    """What RemoteStore adds for it; see ObjectStore."""

    def object_cache(
        self,
        name: str,
        identity: Mapping[str, str | int | float | bool] | None = None,
        capacity_bytes: int | str | None = None,
        admission: str = "all",
    ) -> "RemoteObjectCache":
        """See Store.object_cache. An object of a mounted drive has to fit into the shared memory."""
        check_cache_name(name)
        identity_text(identity)
        asked = {
            "name": name,
            "identity": dict(identity or {}),
            "capacity_bytes": check_capacity(capacity_bytes),
            "admission": check_admission(admission),
        }
        number = self._call("object_cache", **asked)
        return RemoteObjectCache(self._connection, name, number, admission)

    def object_usage(self) -> list[CacheUsage]:
        """See Store.object_usage; of other users' only for root and whoever mounted."""
        return [CacheUsage(**usage) for usage in self._call("object_usage")]

    def drop_objects(self, name: str | None = None) -> int:
        """See Store.drop_objects; of other users' only for root and whoever mounted."""
        return self._call("drop_objects", name=name)


class RemoteObjectCache:
    """As ObjectCache. Made by RemoteStore.object_cache; valid until that closes."""

    def __init__(self, connection, name: str, number: int, admission: str):
        self._connection = connection
        self._name = name
        self._number = number
        self.admission = admission

    def __repr__(self) -> str:
        return f"<RemoteObjectCache {self.name!r}>"

    @property
    def name(self) -> str:
        return self._name

    def put(self, keys: Sequence[bytes], objects: Sequence) -> list[bool]:
        """See ObjectCache.put. What the shared memory does not hold at once goes in several batches."""
        check_keys(keys, objects)
        arrays = [byte_array(data) for data in objects]
        stored: list[bool] = []
        with self._connection as connection:
            for part, sizes in self._parts(arrays):
                offset, views = _place(connection, sizes)
                for view, data in zip(views, arrays[part], strict=True):
                    view[:] = data
                asked = {"keys": _hex(keys[part]), "sizes": sizes, "offset": offset}
                stored += connection.call("put_objects", number=self._number, **asked)
        return stored

    def get(self, keys: Sequence[bytes], buffers: Sequence) -> list[bool]:
        """See ObjectCache.get. A copy from the shared memory, whatever the buffers' alignment."""
        check_keys(keys, buffers)
        arrays = [byte_array(buffer, writable=True) for buffer in buffers]
        found: list[bool] = []
        with self._connection as connection:
            for part, sizes in self._parts(arrays):
                offset, views = _place(connection, sizes)
                asked = {"keys": _hex(keys[part]), "sizes": sizes, "offset": offset}
                hits = connection.call("get_objects", number=self._number, **asked)
                for view, data, is_hit in zip(views, arrays[part], hits, strict=True):
                    if is_hit:
                        data[:] = view
                found += hits
        return found

    def _parts(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[slice, list[int]]]:
        """(which of them, their sizes), each as many as one request takes."""
        room = self._connection.memory.num_bytes - PAGE_BYTES
        start, num_bytes = 0, 0
        for position, data in enumerate(arrays):
            if _paged(data.nbytes) > room:
                raise InvalidArgument(
                    f"an object of {data.nbytes} bytes, but only {room} bytes are shared with the drive's owner"
                )
            if num_bytes + _paged(data.nbytes) > room or position - start == KEYS_AT_ONCE:
                yield slice(start, position), [one.nbytes for one in arrays[start:position]]
                start, num_bytes = position, 0
            num_bytes += _paged(data.nbytes)
        if start < len(arrays):
            yield slice(start, len(arrays)), [one.nbytes for one in arrays[start:]]

    def _of_keys(self, call: str, keys: Sequence[bytes]) -> list:
        """What a call says of each key."""
        check_keys(keys)
        found: list = []
        with self._connection as connection:
            for start in range(0, len(keys), KEYS_AT_ONCE):
                part = _hex(keys[start : start + KEYS_AT_ONCE])
                found += connection.call(call, number=self._number, keys=part)
        return found

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.contains."""
        return [size is not None for size in self.sizes(keys)]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See ObjectCache.sizes."""
        return self._of_keys("object_sizes", keys)

    def look_up(self, keys: Sequence[bytes]) -> list[Miss | None]:
        """See ObjectCache.look_up."""
        return [miss and Miss(miss) for miss in self._of_keys("look_up_objects", keys)]

    def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.pin. Pins go with the connection."""
        return self._of_keys("pin_objects", keys)

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.unpin. False also for what only others have pinned."""
        return self._of_keys("unpin_objects", keys)

    def delete(self, keys: Sequence[bytes]) -> int:
        """See ObjectCache.delete."""
        return sum(self._of_keys("delete_objects", keys))

    def keys(self) -> Iterator[bytes]:
        """See ObjectCache.keys."""
        return map(bytes.fromhex, self._call("object_keys"))

    def usage(self) -> Usage:
        """See ObjectCache.usage."""
        return Usage(*self._call("usage_of_objects"))

    def count_request(self, tenant: str, model: str, wanted: int, found: int, miss: RequestMiss | None) -> None:
        """See ObjectCache.count_request."""
        check_request(tenant, model, wanted, found, miss)
        self._call("count_request", tenant=tenant, model=model, wanted=wanted, found=found, miss=miss)

    def set_capacity(self, capacity_bytes: int | str | None) -> None:
        """See ObjectCache.set_capacity."""
        self._call("set_object_capacity", capacity_bytes=check_capacity(capacity_bytes))

    def _call(self, name: str, **arguments):
        with self._connection as connection:
            return connection.call(name, number=self._number, **arguments)


def _paged(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _hex(keys: Sequence[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def _place(connection, sizes: Sequence[int]) -> tuple[int, list[np.ndarray]]:
    """Where the first object lies, and a view of each."""
    offset = _paged(connection.place(sum(map(_paged, sizes)) + PAGE_BYTES))
    return offset, _views(connection.memory, offset, sizes)


def _views(memory, offset: int, sizes: Sequence[int]) -> list[np.ndarray]:
    views = []
    for size in sizes:
        views.append(memory.array(offset, (size,), _BYTE))
        offset += _paged(size)
    return views


# the owner's side: calls as in remote/calls.py


class ClientCaches:
    """The caches that one client has open, by number, and what it has pinned."""

    def __init__(self):
        self._caches: list[ObjectCache] = []
        self._numbers: dict[tuple[str, str, str], int] = {}
        self.pins: Counter[tuple[int, bytes]] = Counter()

    def hold(self, store, name: str, identity: dict, capacity_bytes: int | None, admission: str) -> int:
        known = name, identity_text(identity), admission
        if known not in self._numbers:
            if len(self._caches) >= MAX_CACHES:
                raise InvalidArgument(f"a client has at most {MAX_CACHES} caches open")
            self._caches.append(store.object_cache(name, identity, admission=admission))
            self._numbers[known] = len(self._caches) - 1
        number = self._numbers[known]
        if capacity_bytes is not None:
            self._caches[number].set_capacity(capacity_bytes)
        return number

    def __getitem__(self, number: int) -> ObjectCache:
        if not isinstance(number, int) or not 0 <= number < len(self._caches):
            raise InvalidArgument(f"no cache is open as number {number!r}")
        return self._caches[number]

    def unpin_all(self) -> None:
        """The client is gone."""
        for (number, key), count in self.pins.items():
            for _ in range(count):
                self._caches[number].unpin([key])
        self.pins.clear()


def object_cache(session, name, identity: dict, capacity_bytes, admission="all") -> int:
    check_cache_name(name)
    own = session.client.own_name(name)
    if capacity_bytes is not None or own not in [usage.name for usage in session.store.object_usage()]:
        session.check_writable()
    return session.objects.hold(session.store, own, identity, capacity_bytes, admission)


def put_objects(session, number, keys, sizes, offset) -> list[bool]:
    session.check_writable()
    objects = _views(session.memory, offset, _sizes(sizes))
    return session.objects[number]._put(_keys(keys), objects, may_change=True)


def get_objects(session, number, keys, sizes, offset) -> list[bool]:
    return session.objects[number].get(_keys(keys), _views(session.memory, offset, _sizes(sizes)))


def object_sizes(session, number, keys) -> list[int | None]:
    return session.objects[number].sizes(_keys(keys))


def look_up_objects(session, number, keys) -> list[str | None]:
    return session.objects[number].look_up(_keys(keys))


def count_request(session, number, tenant, model, wanted, found, miss) -> None:
    session.objects[number].count_request(tenant, model, wanted, found, miss)


def pin_objects(session, number, keys) -> list[bool]:
    keys = _keys(keys)
    pinned = session.objects[number].pin(keys)
    session.objects.pins.update((number, key) for key, is_there in zip(keys, pinned, strict=True) if is_there)
    return pinned


def unpin_objects(session, number, keys) -> list[bool]:
    return [_unpin(session, number, key) for key in _keys(keys)]


def _unpin(session, number, key: bytes) -> bool:
    cache, pins = session.objects[number], session.objects.pins
    if not pins[number, key]:
        del pins[number, key]
        return False
    pins[number, key] -= 1
    return cache.unpin([key])[0]


def delete_objects(session, number, keys) -> list[int]:
    session.check_writable()
    return [session.objects[number].delete([key]) for key in _keys(keys)]


def object_keys(session, number) -> list[str]:
    return _hex([*session.objects[number].keys()])


def usage_of_objects(session, number) -> list:
    return [*session.objects[number].usage()]


def set_object_capacity(session, number, capacity_bytes) -> None:
    session.check_writable()
    session.objects[number].set_capacity(capacity_bytes)


def object_usage(session) -> list[dict]:
    """Of those caches that the client may name, by the names that it knows them by."""
    usages = [(session.client.known_name(usage.name), usage) for usage in session.store.object_usage()]
    return [{**asdict(usage), "name": name} for name, usage in usages if name is not None]


def drop_objects(session, name) -> int:
    session.check_writable()
    names = [usage["name"] for usage in object_usage(session)]
    own = map(session.client.own_name, (known for known in names if name in (None, known)))
    return sum(session.store.drop_objects(one) for one in own)


def counters(session) -> dict:
    """The store's, but of tenants and caches only those that the client may name."""
    found = remote_reuse.counters(session)

    def own(rows: list[dict]) -> list[dict]:
        named = [(session.client.known_name(row["cache"]), row) for row in rows]
        return [{**row, "cache": name} for name, row in named if name is not None]

    objects = found["objects"]
    return {**found, "objects": sums(own(objects["caches"]), own(objects["tenants"]))}


def _keys(keys) -> list[bytes]:
    try:
        return [bytes.fromhex(key) for key in keys]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"keys are sent as text of hexadecimal digits: {error}") from error


def _sizes(sizes) -> list[int]:
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise InvalidArgument("sizes of objects are numbers of bytes")
    return sizes


CALLS = (
    object_cache,
    put_objects,
    get_objects,
    object_sizes,
    look_up_objects,
    count_request,
    pin_objects,
    unpin_objects,
    delete_objects,
    object_keys,
    usage_of_objects,
    set_object_capacity,
    object_usage,
    drop_objects,
    counters,
)
