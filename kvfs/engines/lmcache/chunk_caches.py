"""The chunks of LMCache's server: which cache of objects each one belongs to.

There is one for each identity: model, world size, layout, and what else the bytes depend on. All share one name
on the drive, and so one cap and one order of use.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from operator import itemgetter

from lmcache.logging import init_logger

from kvfs.engines.lmcache.directory import Directory
from kvfs.engines.lmcache.identity import host_facts, is_serialized, layout_facts, layout_of, version_facts
from kvfs.engines.lmcache.object_keys import NO_TEXT, l2_key, object_key, salt_digest, text_digest
from kvfs.engines.lmcache.settings import Settings

logger = init_logger(__name__)


class ChunkCaches:
    """Safe to call from several threads. Raises what the store raises."""

    def __init__(self, store, settings: Settings):
        self._store, self._name = store, settings.cache
        self._own_facts = {f"user.{name}": value for name, value in settings.identity.items()}
        self._own_facts |= host_facts() | version_facts() | {"plug_in": "l2"}
        self._lock = threading.Lock()
        self._by_identity: dict[str, tuple[dict, object]] = {}  # JSON: (identity, cache)
        self._by_layout: dict[tuple, object] = {}  # model, world size, shapes, dtypes: cache
        self._pinned: dict[object, list] = defaultdict(list)  # ObjectKey: the caches that it is pinned in
        self._misses_told = 0
        self._directory = Directory(store, self._name)
        self.all = store.object_cache(self._name, self._own_facts, settings.capacity_bytes)
        self._admission = settings.admission
        """No chunk's own; its usage is that of all."""
        with self._lock:
            self._open_known()

    # caches

    def _cache_of(self, key, shapes: Sequence, dtypes: Sequence):
        """With the lock held."""
        wanted = key.model_name, _world_size(key), tuple(shapes), tuple(dtypes)
        if wanted not in self._by_layout:
            facts = {"model": key.model_name, "world_size": _world_size(key)}
            self._by_layout[wanted] = self._cache(self._own_facts | facts | layout_facts(shapes, dtypes))
        return self._by_layout[wanted]

    def _cache(self, identity: dict):
        """With the lock held."""
        text = json.dumps(identity, sort_keys=True)
        if text not in self._by_identity:
            cache = self._store.object_cache(self._name, identity, admission=self._admission)
            self._by_identity[text] = identity, cache
            self._directory.remember_identity(identity)
        return self._by_identity[text][1]

    def _open_known(self) -> list[tuple[dict, object]]:
        """(identity, cache) of all that chunks were ever stored under and that this process could load."""
        for identity in self._directory.identities():
            if self._own_facts.items() <= identity.items():
                self._cache(identity)
        return [*self._by_identity.values()]

    def _serialized(self, key) -> list:
        """Caches of the key's model whose chunks are plain bytes: a look-up's layout does not say so."""
        wanted = {"model": key.model_name, "world_size": _world_size(key)}
        return [
            cache
            for identity, cache in self._by_identity.values()
            if wanted.items() <= identity.items() and is_serialized(identity)
        ]

    def _grouped(self, keys: Sequence, objects: Sequence) -> dict:
        """Positions by cache."""
        groups = defaultdict(list)
        with self._lock:
            for position, (key, chunk) in enumerate(zip(keys, objects, strict=True)):
                groups[self._cache_of(key, *layout_of(chunk))].append(position)
        return groups

    # chunks

    def put(self, keys: Sequence, objects: Sequence) -> list[int | None]:
        """Store chunks. Bytes that were stored now, 0 of one that was there; None: there is no room."""
        outcome: list[int | None] = [None] * len(keys)
        for salt in {key.cache_salt for key in keys if key.cache_salt}:
            with self._lock:
                self._directory.remember_salt(salt)
        for cache, positions in self._grouped(keys, objects).items():
            packed = [l2_key(keys[position]) for position in positions]
            buffers = [objects[position].byte_array for position in positions]
            sizes = [len(buffer) for buffer in buffers]
            before = cache.sizes(packed)
            stored = cache.put(packed, buffers)
            for position, size, was, is_stored in zip(positions, sizes, before, stored, strict=True):
                outcome[position] = None if not is_stored else 0 if was == size else size
        return outcome

    def get(self, keys: Sequence, objects: Sequence) -> list[bool]:
        """Load chunks into the objects' memory."""
        outcome = [False] * len(keys)
        for cache, positions in self._grouped(keys, objects).items():
            packed = [l2_key(keys[position]) for position in positions]
            found = cache.get(packed, [objects[position].byte_array for position in positions])
            for position, is_found in zip(positions, found, strict=True):
                outcome[position] = is_found
        return outcome

    def pin(self, keys: Sequence, layouts: dict) -> list[bool]:
        """Look up chunks, and keep from eviction those that are there, until `unpin`.

        layouts: MemoryLayoutDesc by object group
        """
        outcome = [False] * len(keys)
        groups = defaultdict(list)
        with self._lock:
            for position, key in enumerate(keys):
                layout = layouts.get(key.object_group_id)
                caches = self._serialized(key)
                if layout is not None and layout.shapes:
                    caches = [self._cache_of(key, layout.shapes, layout.dtypes), *caches]
                groups[tuple(dict.fromkeys(caches))].append(position)
        for caches, positions in groups.items():
            for cache, mine in self._by_whose_they_are(caches or (self.all,), keys, positions):
                pinned = cache.pin([l2_key(keys[position]) for position in mine])
                with self._lock:
                    for position, is_pinned in zip(mine, pinned, strict=True):
                        if is_pinned:
                            outcome[position] = True
                            self._pinned[keys[position]].append(cache)
                if not all(pinned):
                    self._tell_of_others(cache, keys[mine[pinned.index(False)]].model_name)
        return outcome

    def _by_whose_they_are(self, caches: Sequence, keys: Sequence, positions: Sequence[int]) -> list[tuple]:
        """(cache, positions of the chunks to look for in it): the first's are also those that none has."""
        if len(caches) == 1:
            return [(caches[0], positions)]
        first_of = dict.fromkeys(positions, caches[0])
        for cache in reversed(caches):
            is_there = cache.contains([l2_key(keys[position]) for position in positions])
            first_of.update(dict.fromkeys(compress(positions, is_there), cache))
        mine = defaultdict(list)
        for position, cache in first_of.items():
            mine[cache].append(position)
        return [*mine.items()]

    def _tell_of_others(self, cache, model_name: str) -> None:
        """Once, that there are chunks under another identity."""
        of_others = cache.usage().misses.get("identity", 0)
        with self._lock:
            is_news, self._misses_told = not self._misses_told and of_others, of_others
        if is_news:
            logger.warning(
                "kvfs: chunks of %s are here under another identity and are not used: another model, dtype,"
                " layout, world size, CPU or version of LMCache than those of %s",
                model_name,
                cache,
            )

    def unpin(self, keys: Sequence) -> None:
        with self._lock:
            pinned = []
            for key in keys:
                if caches := self._pinned.get(key):
                    pinned.append((caches.pop(), key))
                    if not caches:
                        del self._pinned[key]
        for cache, key in pinned:
            cache.unpin([l2_key(key)])

    def delete(self, keys: Sequence) -> list[int]:
        """Forget chunks of every layout; bytes of each that there were."""
        with self._lock:
            known = self._open_known()
        freed = [0] * len(keys)
        for identity, cache in known:
            mine = [position for position, key in enumerate(keys) if key.model_name == identity["model"]]
            packed = [l2_key(keys[position]) for position in mine]
            for position, size in zip(mine, cache.sizes(packed), strict=True):
                freed[position] += size or 0
            cache.delete(packed)
        return freed

    # what is there

    def list(self, model: str | None = None, after: tuple[bytes, bytes] | None = None) -> Iterator[tuple]:
        """(position to go on after, ObjectKey, bytes), in an order that stays."""
        with self._lock:
            self._open_known()
            known = [(text_digest(text), *entry) for text, entry in self._by_identity.items()]
        for digest, identity, cache in sorted(known, key=itemgetter(0)):
            if model not in (None, identity["model"]) or (after is not None and digest < after[0]):
                continue
            packed = sorted(key for key in cache.keys() if after is None or (digest, key) > after)  # noqa: SIM118
            for key, size in zip(packed, cache.sizes(packed), strict=True):
                found = object_key(key, identity["model"], self._salt)
                if size is not None and found is not None:
                    yield (digest, key), found, size

    def _salt(self, digest: bytes) -> str | None:
        with self._lock:
            return self._directory.salt(digest)

    def bytes_by_salt(self) -> dict[str, int]:
        """Of tenants that have a salt and chunks that this process could load."""
        with self._lock:
            known = self._open_known()
        by_digest = defaultdict(int)
        for _, cache in known:
            packed = list(cache.keys())
            for key, size in zip(packed, cache.sizes(packed), strict=True):
                by_digest[salt_digest(key)] += size or 0
        named = {"" if digest == NO_TEXT else self._salt(digest): size for digest, size in by_digest.items()}
        return {salt: size for salt, size in named.items() if salt is not None and size}


def _world_size(key) -> int:
    return type(key).WorldSizeFromKVRank(key.kv_rank)
