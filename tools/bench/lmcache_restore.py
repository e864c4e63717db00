"""Restoring a prompt's K/V: kvfs beside LMCache's local disk backend, both cold, with direct I/O.

A prompt of 4,096 tokens in the shape of the demo's model. LMCache reads its chunks of 256 tokens, a file each,
into memory of its own; it has been told of the files, which a restarted one is not. kvfs finds the prefix among
what was published, in a store just opened, names it as a new sequence, and reads it to memory, or computes the
attention of one token in every layer over it.
"""

import asyncio
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import kvfs
from kvfs.head_pieces import KEYS, VALUES, HeadRows
from kvfs_bench.decode_process import drop_from_page_cache
from kvfs_bench.figures import Figure

NUM_TOKENS, CHUNK_TOKENS = 4096, 256
NUM_LAYERS, NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 8, 2, 64
GOAL = 1.3
WRITING_SECONDS = 60


def _rows() -> np.ndarray:
    """K and V: float16 [2, num_layers, num_tokens, num_kv_heads, head_dim]"""
    shape = 2, NUM_LAYERS, NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)


class _LMCache:
    def __init__(self, folder: Path, rows: np.ndarray):
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        extra = {"use_odirect": True}
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS,
            local_cpu=False,
            local_disk=str(folder),
            max_local_disk_size=1.0,
            extra_config=extra,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._memory = MixedMemoryAllocator(4 * rows.nbytes)
        staging = LocalCPUBackend(config, dst_device="cpu", memory_allocator=self._memory)
        self._disk = LocalDiskBackend(config, self._loop, staging, dst_device="cpu")
        self._folder, self._rows = folder, rows
        self._keys = [
            CacheEngineKey("restore", 1, 0, number, torch.float16)
            for number in range(NUM_TOKENS // CHUNK_TOKENS)
        ]
        shape = torch.Size([2, NUM_LAYERS, CHUNK_TOKENS, NUM_KV_HEADS * HEAD_DIM])
        for key, part in zip(self._keys, self._parts(), strict=True):
            chunk = staging.allocate(shape, torch.float16, MemoryFormat.KV_2LTD)
            chunk.tensor[:] = torch.from_numpy(part.reshape(shape))
            self._disk.submit_put_task(key, chunk)
            chunk.ref_count_down()
        deadline = time.monotonic() + WRITING_SECONDS
        while any(map(self._disk.exists_in_put_tasks, self._keys)):
            if time.monotonic() > deadline:
                raise TimeoutError("LMCache did not write its chunks")
            time.sleep(0.001)

    def _parts(self) -> list[np.ndarray]:
        return np.split(self._rows, NUM_TOKENS // CHUNK_TOKENS, axis=2)

    def restore(self) -> float:
        """Seconds."""
        for file in filter(Path.is_file, self._folder.rglob("*")):
            drop_from_page_cache(file)
        started = time.perf_counter()
        chunks = self._disk.batched_get_blocking(self._keys)
        seconds = time.perf_counter() - started
        for chunk, part in zip(chunks, self._parts(), strict=True):
            if not np.array_equal(chunk.tensor.numpy().reshape(part.shape), part):
                raise RuntimeError("LMCache restored other bytes than it stored")
            chunk.ref_count_down()
        return seconds

    def close(self) -> None:
        self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._memory.close()


class _Kvfs:
    def __init__(self, path: Path, rows: np.ndarray):
        self._path, self._rows = path, rows
        self._tokens = np.arange(NUM_TOKENS + 1, dtype=np.uint32)
        kvfs.format(path, size="1GiB")
        with kvfs.open(path) as store:
            model = store.add_model(
                "restore",
                num_layers=NUM_LAYERS,
                num_query_heads=NUM_QUERY_HEADS,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_DIM,
                dtype="float16",
                group_tokens=CHUNK_TOKENS,
            )
            sequence = store.create_sequence(model, "prompt")
            for layer in range(NUM_LAYERS):
                sequence.append(layer, *rows[:, layer])
            sequence.append_tokens(self._tokens[:NUM_TOKENS])
            sequence.publish()
            store.flush()

    def restore(self) -> tuple[float, float]:
        """(until the K/V are in memory, until every layer's attention is computed) in seconds, of two
        openings."""
        return self._timed(self._read), self._timed(self._attend)

    def _timed(self, use) -> float:
        with kvfs.open(self._path) as store:
            model = store.model("restore")
            started = time.perf_counter()
            sequence = store.restore_prefix(store.find_prefix(model, self._tokens), "restored")
            check = use(store, sequence)
            seconds = time.perf_counter() - started
            check()
            store.delete_sequence("restored")
        return seconds

    def _read(self, store, sequence):
        parts = [  # in the order in which they lie on flash
            HeadRows(layer, kind, head, start, start + CHUNK_TOKENS)
            for start in range(0, NUM_TOKENS, CHUNK_TOKENS)
            for layer in range(NUM_LAYERS)
            for head in range(NUM_KV_HEADS)
            for kind in (KEYS, VALUES)
        ]
        found = sequence.read_heads(parts)

        def check():
            shape = NUM_TOKENS // CHUNK_TOKENS, NUM_LAYERS, NUM_KV_HEADS, 2, CHUNK_TOKENS, HEAD_DIM
            rows = np.frombuffer(found, np.float16).reshape(shape).transpose(3, 1, 0, 4, 2, 5)
            rows = rows.reshape(self._rows.shape)
            if not np.array_equal(rows, self._rows):
                raise RuntimeError("kvfs restored other bytes than it stored")

        return check

    def _attend(self, store, sequence):
        queries = np.ones((1, 1, NUM_QUERY_HEADS, HEAD_DIM), np.float16)
        outs = [store.attend(layer, queries, [sequence])[0] for layer in range(NUM_LAYERS)]

        def check():
            if not all(np.isfinite(out).all() for out in outs):
                raise RuntimeError("kvfs computed no attention")

        return check


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """In turns; LMCache has to be installed."""
    rows = _rows()
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        (folder / "lmcache").mkdir()
        theirs, ours = _LMCache(folder / "lmcache", rows), _Kvfs(folder / "drive.kvfs", rows)
        try:
            theirs.restore(), ours.restore()  # kernels are compiled, once for a machine
            times = [(theirs.restore(), *ours.restore()) for _ in range(2 if quick else 15)]
        finally:
            theirs.close()
    disk, read, attention = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    rival = "LMCache's local disk, direct"
    return [
        Figure("lmcache_restore.4096_tokens.to memory", read, "ms", rival, disk, disk / read),
        Figure(
            "lmcache_restore.4096_tokens.attention of all layers",
            attention,
            "ms",
            rival,
            disk,
            disk / attention,
        ),
        Figure("lmcache_restore.4096_tokens.faster", disk / min(read, attention), "", goal=GOAL),
    ]
