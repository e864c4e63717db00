"""A worker's half: from vLLM's pool of blocks to the drive and back."""

import time

from kvfs.engines.vllm.block_loader import BlockLoader, Loaded
from kvfs.engines.vllm.block_objects import BlockPool, HeadShare, head_keys, objects_of
from kvfs.engines.vllm.step_plan import Transfers
from kvfs.engines.vllm.write_behind import WriteBehind

PATIENCE = 0.02  # of a step's own time, which it may wait for staging memory
IDLE_SECONDS = 0.01  # an engine with nothing else to do asks again and again: it may as well wait


class WorkerSide:
    """cache: a kvfs object cache; staging_bytes: host memory for blocks that wait to be written."""

    def __init__(self, cache, flush, pool: BlockPool, heads: HeadShare, staging_bytes: int):
        if pool.num_heads != heads.count:
            raise ValueError(f"blocks of {pool.num_heads} KV heads, where this rank has {heads.count}")
        self._cache = cache
        self._pool = pool
        self._heads = heads
        self._loader = BlockLoader(cache, pool, heads)
        self._writer = WriteBehind(cache, flush, staging_bytes)
        self._staging_blocks = max(1, staging_bytes // 4 // pool.block_bytes)
        self._step_began = time.monotonic()

    def begin(self) -> None:
        """A step of the engine begins."""
        self._step_began = time.monotonic()

    def load(self, transfers: Transfers) -> None:
        for load in transfers.loads:
            self._loader.submit(load)

    def save(self, transfers: Transfers) -> None:
        """Take copies of what this step has made full; the rest happens behind the engine's back."""
        if not self._heads.is_first or not transfers.saves:
            return
        deadline = time.monotonic() + PATIENCE * (time.monotonic() - self._step_began)
        for save in transfers.saves:
            for start in range(0, len(save.keys), self._staging_blocks):
                part = slice(start, start + self._staging_blocks)
                if not self._save(save.keys[part], save.block_ids[part], deadline):
                    self._writer.skipped(len(save.keys) - start)
                    break  # without these nobody finds what comes after them

    def _save(self, keys: list[bytes], block_ids: list[int], deadline: float) -> bool:
        """Returns False if there was no staging memory in time."""
        object_keys = head_keys(keys, self._heads.first, self._heads.count)
        is_there = self._cache.contains(object_keys)
        missing = [
            index
            for index in range(len(keys))
            if not all(is_there[index * self._heads.count : (index + 1) * self._heads.count])
        ]
        if not missing:
            return True
        num_bytes = len(missing) * self._pool.block_bytes
        if not self._writer.reserve(num_bytes, deadline - time.monotonic()):
            return False
        staged = self._pool.staging(len(missing))
        self._pool.copy_out([block_ids[index] for index in missing], staged)
        new_keys = head_keys([keys[index] for index in missing], self._heads.first, self._heads.count)
        self._writer.submit(new_keys, objects_of(staged), num_bytes)
        return True

    def loaded(self, transfers: Transfers) -> Loaded:
        return self._loader.loaded(0.0 if transfers.computes else IDLE_SECONDS)

    def close(self) -> None:
        self._loader.close()
        self._writer.close()
