"""kvfs inside the engine's process: a storage backend of LMCache's, named in its configuration.

`storage_plugins: ["kvfs"]`, and in `extra_config` `storage_plugin.kvfs.module_path`, `.class_name`, and the
fields of Settings as `kvfs.path` and so on. Several workers of an engine are several processes: they share a
mounted drive.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lmcache.logging import init_logger
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from kvfs.engines.lmcache.chunk_layout import ChunkLayout
from kvfs.engines.lmcache.flushed_store import FlushedStore
from kvfs.engines.lmcache.huge_pages import HugePages
from kvfs.engines.lmcache.identity import host_facts, version_facts
from kvfs.engines.lmcache.object_keys import in_process_key
from kvfs.engines.lmcache.settings import Settings
from kvfs.errors import KvfsError, NvmeError

logger = init_logger(__name__)
PREFIX = "kvfs."
TELL_SECONDS = 60.0  # between two lines about the same thing


class KvfsStoragePlugin(StoragePluginInterface):
    """See StorageBackendInterface. What evicts is kvfs, below its cap at every instant."""

    def __init__(self, config=None, metadata=None, local_cpu_backend=None, loop=None, dst_device="cpu"):
        """Raises ValueError, and what kvfs.open raises."""
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        extra = config.extra_config or {}
        given = {name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)}
        self._settings = Settings.of(given)
        self._layout = ChunkLayout(config, metadata)
        identity = {f"user.{name}": value for name, value in self._settings.identity.items()}
        identity |= host_facts() | version_facts() | self._layout.facts() | {"plug_in": "in process"}
        self._drive = FlushedStore(self._settings)
        try:
            store, name = self._drive.store, self._settings.cache
            capacity, admission = self._settings.capacity_bytes, self._settings.admission
            self._cache = store.object_cache(name, identity, capacity, admission)
        except BaseException:
            self._drive.release()
            raise
        # not all of LMCache's allocators have one piece of memory
        memory = getattr(getattr(local_cpu_backend, "memory_allocator", None), "buffer", None)
        self._huge_pages = None if memory is None else HugePages(memory.data_ptr(), memory.nbytes)
        self._threads = ThreadPoolExecutor(self._settings.num_threads, "kvfs-store")
        self._lock = threading.Lock()
        self._on_their_way: set = set()
        self._pinned_by_lookup: dict[str, list] = {}
        self._is_closed = False
        self._is_layout_told = False
        self._told_full = -TELL_SECONDS

    def __str__(self) -> str:
        return type(self).__name__

    # looking up

    def contains(self, key, pin: bool = False) -> bool:
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: list, pin: bool = False) -> int:
        """How many of the first keys are there, up to the first that is not."""
        packed = [in_process_key(key) for key in keys]
        with self._failing_as_a_miss("look-up"):
            found = self._cache.pin(packed) if pin else self._cache.contains(packed)
            num_found = len(list(itertools.takewhile(bool, found)))
            if pin:
                self._cache.unpin(list(itertools.compress(packed[num_found:], found[num_found:])))
            if num_found < len(packed) and not pin:  # to pin counts by itself
                self._cache.look_up([packed[num_found]])
            return num_found
        return 0

    async def batched_async_contains(self, lookup_id: str, keys: list, pin: bool = False) -> int:
        num_found = await asyncio.to_thread(self.batched_contains, keys, pin)
        if pin:
            with self._lock:
                self._pinned_by_lookup[lookup_id] = list(keys[:num_found])
        return num_found

    def exists_in_put_tasks(self, key) -> bool:
        with self._lock:
            return key in self._on_their_way

    def pin(self, key) -> bool:
        with self._failing_as_a_miss("pin"):
            return self._cache.pin([in_process_key(key)])[0]
        return False

    def unpin(self, key) -> bool:
        with self._failing_as_a_miss("unpin"):
            return self._cache.unpin([in_process_key(key)])[0]
        return False

    # storing

    def batched_submit_put_task(
        self,
        keys: Sequence,
        objs: list,
        transfer_spec=None,
        on_complete_callback: Callable | None = None,
    ) -> list[Future] | None:
        """All in one batch of writes, on another thread. on_complete_callback: of each key that is stored."""
        batch = []
        with self._lock:
            for key, chunk in zip(keys, objs, strict=True):
                if key in self._on_their_way:
                    continue
                if not self._layout.is_of(chunk):
                    self._tell_layout(chunk)
                    continue
                self._on_their_way.add(key)
                chunk.ref_count_up()
                batch.append((key, chunk))
        return [self._threads.submit(self._store, batch, on_complete_callback)] if batch else None

    def _tell_layout(self, chunk) -> None:
        if not self._is_layout_told:
            self._is_layout_told = True
            facts = chunk.metadata.shape, chunk.metadata.dtype, chunk.metadata.fmt
            logger.warning("kvfs: chunks of another layout than the engine's are not stored: %s %s %s", *facts)

    def _store(self, batch: list[tuple], on_complete_callback: Callable | None) -> None:
        stored = [False] * len(batch)
        try:
            with self._failing_as_a_miss("store"):
                packed = [in_process_key(key) for key, _ in batch]
                stored = self._cache.put(packed, [chunk.byte_array for _, chunk in batch])
                if not all(stored) and self._settings.admission == "all":
                    self._tell_full(stored)
        finally:
            with self._lock:
                self._on_their_way.difference_update(key for key, _ in batch)
            for _, chunk in batch:
                chunk.ref_count_down()
        self._drive.written()
        if on_complete_callback is not None:
            for key, _ in itertools.compress(batch, stored):
                on_complete_callback(key)

    def _tell_full(self, stored: list[bool]) -> None:
        if time.monotonic() - self._told_full >= TELL_SECONDS:
            self._told_full = time.monotonic()
            facts = self._settings.path, stored.count(False), len(stored)
            logger.warning("kvfs: %s has no room for %d of %d chunks: they are not stored, loads go on", *facts)

    # loading

    def get_blocking(self, key):
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list) -> list:
        """All in one batch of reads, into memory of LMCache's; None: a miss, or no memory."""
        chunks = [None] * len(keys)
        packed = [in_process_key(key) for key in keys]
        is_loaded = [False] * len(keys)
        try:
            with self._failing_as_a_miss("load"):
                for position, size in enumerate(self._cache.sizes(packed)):
                    chunks[position] = self._memory(size)
                wanted = [position for position, chunk in enumerate(chunks) if chunk is not None]
                found = self._cache.get(
                    [packed[position] for position in wanted],
                    [chunks[position].byte_array for position in wanted],
                )
                for position, is_found in zip(wanted, found, strict=True):
                    is_loaded[position] = is_found
        finally:
            for position, chunk in enumerate(chunks):
                if chunk is not None and not is_loaded[position]:
                    chunk.ref_count_down()
                    chunks[position] = None
        return chunks

    def _memory(self, size: int | None):
        """For a chunk of so many bytes; None if there is none, or if no chunk of the engine has this size."""
        num_tokens = None if size is None else self._layout.num_tokens(size)
        if num_tokens is None:
            return None
        layout = self._layout
        return self.local_cpu_backend.allocate(layout.shapes(num_tokens), layout.dtypes(), layout.format)

    async def batched_get_non_blocking(self, lookup_id: str, keys: list, transfer_spec=None) -> list:
        """The first chunks, up to one that is missing."""
        chunks = await asyncio.to_thread(self.batched_get_blocking, keys)
        found = list(itertools.takewhile(lambda chunk: chunk is not None, chunks))
        for chunk in chunks[len(found) :]:
            if chunk is not None:
                chunk.ref_count_down()
        with self._lock:
            pinned = self._pinned_by_lookup.pop(lookup_id, [])
        for key in pinned:
            self.unpin(key)
        return found

    # the rest

    def remove(self, key, force: bool = True) -> bool:
        return self.batched_remove([key], force) == 1

    def batched_remove(self, keys: list, force: bool = True) -> int:
        with self._failing_as_a_miss("removal"):
            num_removed = self._cache.delete([in_process_key(key) for key in keys])
            self._drive.written()
            return num_removed
        return 0

    def touch_cache(self) -> None:
        """kvfs keeps the order of use itself."""

    def get_allocator_backend(self):
        return self.local_cpu_backend

    def close(self) -> None:
        """Ends with everything submitted stored, and durable."""
        if not self._is_closed:
            self._is_closed = True
            self._threads.shutdown()
            if self._huge_pages is not None:
                self._huge_pages.close()
            self._drive.release()

    @contextlib.contextmanager
    def _failing_as_a_miss(self, what: str):
        """The engine computes what kvfs cannot give; that it could not is logged."""
        try:
            yield
        except (KvfsError, NvmeError) as error:
            logger.warning("kvfs: %s failed: %s", what, error)
