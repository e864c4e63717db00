"""kvfs behind LMCache's server: its L2 adapter.

Three kinds of calls (store, look up, load), each with threads and an event fd of its own, so that look-ups wait
for no transfer. One task is one batch of commands of the drive, from and to LMCache's memory.
"""

import itertools
import time
from functools import partial
from types import MappingProxyType

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import KeyEntry, KeyListPage
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface

from kvfs.engines.lmcache.adapter_config import KvfsL2AdapterConfig
from kvfs.engines.lmcache.chunk_caches import ChunkCaches
from kvfs.engines.lmcache.flushed_store import FlushedStore
from kvfs.engines.lmcache.huge_pages import HugePages
from kvfs.engines.lmcache.tasks import Tasks

logger = init_logger(__name__)
TELL_SECONDS = 60.0  # between two lines about the same thing
COUNT_SECONDS = 10.0  # between two counts of all chunks by tenant


class KvfsL2Adapter(L2AdapterInterface):
    """See L2AdapterInterface. What evicts is kvfs, below capacity_bytes at every instant; it tells nobody."""

    def __init__(self, config: KvfsL2AdapterConfig, l1_memory_desc=None):
        """l1_memory_desc: L1MemoryDesc, where chunks come from and go to. Raises what kvfs.open raises."""
        settings = config.settings
        super().__init__(max_capacity_bytes=settings.capacity_bytes or 0)
        self._settings = settings
        self._drive = FlushedStore(settings)
        try:
            self._chunks = ChunkCaches(self._drive.store, settings)
        except BaseException:
            self._drive.release()
            raise
        self._numbers = itertools.count()
        self._stores = Tasks("store", settings.num_threads)
        self._lookups = Tasks("lookup", 1)
        self._loads = Tasks("load", settings.num_threads)
        self._memory = l1_memory_desc and HugePages(l1_memory_desc.ptr, l1_memory_desc.size)
        self._is_closed = False
        self._told_full = -TELL_SECONDS
        self._counted = -COUNT_SECONDS
        self._bytes_by_salt: dict[str, int] = {}
        usage = self._chunks.all.usage()
        self._total_bytes_used = usage.bytes  # what the base class subtracts from when they are deleted
        logger.info("kvfs: %s holds %d chunks, %d bytes", settings.path, usage.objects, usage.bytes)

    # store

    def get_store_event_fd(self) -> int:
        return self._stores.fileno()

    def submit_store_task(self, keys, objects) -> int:
        number = next(self._numbers)
        self._stores.submit(number, partial(self._store, list(keys), list(objects)), L2StoreResult(False, 0))
        return number

    def _store(self, keys: list, objects: list) -> L2StoreResult:
        sizes = self._chunks.put(keys, objects)
        self._drive.written()
        stored = [(key, size) for key, size in zip(keys, sizes, strict=True) if size is not None]
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])
        is_full = len(stored) < len(keys) and self._settings.admission == "all"
        if is_full and time.monotonic() - self._told_full >= TELL_SECONDS:
            self._told_full = time.monotonic()
            logger.warning(
                "kvfs: %s has no room for %d of %d chunks: they are not stored, loads go on",
                self._settings.path,
                len(keys) - len(stored),
                len(keys),
            )
        return L2StoreResult(len(stored) == len(keys), sum(size for _, size in stored))

    def pop_completed_store_tasks(self) -> dict:
        return self._stores.pop_all()

    # lookup

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fileno()

    def submit_lookup_and_lock_task(self, keys, group_layout_descs) -> int:
        number = next(self._numbers)
        keys = list(keys)
        call = partial(self._look_up, keys, dict(group_layout_descs))
        self._lookups.submit(number, call, Bitmap(len(keys)))
        return number

    def _look_up(self, keys: list, layouts: dict) -> Bitmap:
        return _bitmap(self._chunks.pin(keys, layouts))

    def query_lookup_and_lock_result(self, task_id):
        return self._lookups.pop(task_id)

    def submit_unlock(self, keys) -> None:
        self._chunks.unpin(keys)

    # load

    def get_load_event_fd(self) -> int:
        return self._loads.fileno()

    def submit_load_task(self, keys, objects) -> int:
        number = next(self._numbers)
        keys = list(keys)
        self._loads.submit(number, partial(self._load, keys, list(objects)), Bitmap(len(keys)))
        return number

    def _load(self, keys: list, objects: list) -> Bitmap:
        found = self._chunks.get(keys, objects)
        if any(found):
            self._notify_keys_accessed(list(itertools.compress(keys, found)))
        return _bitmap(found)

    def query_load_result(self, task_id):
        return self._loads.pop(task_id)

    # what is there

    def delete(self, keys) -> None:
        if keys:
            freed = self._chunks.delete(keys)
            self._drive.written()
            self._notify_keys_deleted(list(keys), freed)

    def list_l2_keys(self, model_name=None, page_size=500, cursor=None) -> KeyListPage:
        if page_size < 1:
            raise ValueError(f"page_size is at least 1, not {page_size}")
        entries, next_page, last = [], None, None
        for position, key, size in self._chunks.list(model_name, _position(cursor)):
            if len(entries) == page_size:
                next_page = ":".join(part.hex() for part in last)
                break
            entries.append(KeyEntry(key.to_encoded_object_key(), size))
            last = position
        return KeyListPage(tuple(entries), next_page)

    def get_usage(self) -> AdapterUsage:
        """What the store has; by tenant as of some seconds ago."""
        usage = self._chunks.all.usage()
        if time.monotonic() - self._counted >= COUNT_SECONDS:
            self._counted = time.monotonic()
            self._bytes_by_salt = self._chunks.bytes_by_salt()
        return AdapterUsage(usage.bytes, usage.capacity or 0, MappingProxyType(dict(self._bytes_by_salt)))

    def report_status(self) -> dict:
        status = {"is_healthy": not self._is_closed, "type": "KvfsL2Adapter", "path": self._settings.path}
        if not self._is_closed:
            usage = self._chunks.all.usage()._asdict()
            status |= {**usage, "misses": dict(usage["misses"])}
        return status

    def close(self) -> None:
        """Ends with everything submitted done, and durable."""
        if self._is_closed:
            return
        self._is_closed = True
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()
        if self._memory is not None:
            self._memory.close()
        self._drive.release()


def _bitmap(found: list[bool]) -> Bitmap:
    bitmap = Bitmap(len(found))
    for position in itertools.compress(itertools.count(), found):
        bitmap.set(position)
    return bitmap


def _position(cursor: str | None) -> tuple[bytes, bytes] | None:
    """Raises ValueError."""
    if cursor is None:
        return None
    digest, separator, key = cursor.partition(":")
    if not separator:
        raise ValueError(f"{cursor!r} is no cursor of this adapter's")
    return bytes.fromhex(digest), bytes.fromhex(key)
