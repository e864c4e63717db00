"""Objects on their way into vLLM's pool, read by one thread while the engine goes on with other requests."""

import logging
import queue
import threading
from typing import NamedTuple

from kvfs.engines.vllm.block_objects import BlockPool, HeadShare, head_keys, objects_of
from kvfs.engines.vllm.cpus import unbind_thread
from kvfs.engines.vllm.step_plan import BlockTransfer
from kvfs.errors import KvfsError

log = logging.getLogger(__name__)

READ_BYTES = 32 << 20  # in one batch: enough for the drive's full rate


class Loaded(NamedTuple):
    """Since it was last asked."""

    request_ids: set[str]
    failed_block_ids: set[int]


class BlockLoader:
    """cache: a kvfs object cache; heads: of the pool's blocks, in the whole model."""

    def __init__(self, cache, pool: BlockPool, heads: HeadShare):
        self._cache = cache
        self._pool = pool
        self._heads = heads
        self._blocks_per_read = max(1, READ_BYTES // pool.block_bytes)
        self._staged = None  # made by the first load
        self._waiting: queue.SimpleQueue[BlockTransfer | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_pending = 0
        self._loaded = Loaded(set(), set())
        self._thread = threading.Thread(target=self._run, name="kvfs-loader", daemon=True)
        self._thread.start()

    def submit(self, load: BlockTransfer) -> None:
        with self._changed:
            self._num_pending += 1
        self._waiting.put(load)

    def loaded(self, patience_seconds: float = 0.0) -> Loaded:
        """What has come, or failed, since the last call. patience: for the first of what is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._loaded.request_ids or not self._num_pending, patience_seconds)
            done, self._loaded = self._loaded, Loaded(set(), set())
            return done

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        unbind_thread()
        while (load := self._waiting.get()) is not None:
            try:
                failed = self._load(load)
            except KvfsError as error:
                log.warning("kvfs: %d blocks are computed again: %s", len(load.block_ids), error)
                failed = load.block_ids
            except Exception:
                log.exception("kvfs: %d blocks are computed again", len(load.block_ids))
                failed = load.block_ids
            with self._changed:
                self._num_pending -= 1
                self._loaded.request_ids.add(load.request_id)
                self._loaded.failed_block_ids.update(failed)
                self._changed.notify_all()

    def _load(self, load: BlockTransfer) -> list[int]:
        """Returns the blocks from the first on that could not be had: nothing behind it is of use."""
        if self._staged is None:
            self._staged = self._pool.staging(self._blocks_per_read)
        for start in range(0, len(load.keys), self._blocks_per_read):
            part = slice(start, start + self._blocks_per_read)
            block_ids = load.block_ids[part]
            staged = self._staged[: len(block_ids)]
            keys = head_keys(load.keys[part], self._heads.first, self._heads.count)
            found = self._cache.get(keys, objects_of(staged))
            num_good = found.index(False) // self._heads.count if False in found else len(block_ids)
            self._pool.copy_in(block_ids[:num_good], staged[:num_good])
            if num_good < len(block_ids):
                missing = load.block_ids[start + num_good :]
                log.warning("kvfs: %d blocks were lost meanwhile, and are computed again", len(missing))
                return missing
        return []
