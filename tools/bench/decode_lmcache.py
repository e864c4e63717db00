"""LMCache as a contender: its local-disk backend restores a layer's chunks, then torch attends over them.

The backend alone, without an engine: layer by layer, chunks of 256 tokens, a file each, as LMCache keeps them
with `use_layerwise`. What it restores goes from its staging memory to a layer's buffer, as it would to an
engine's pages; the next layer is restored while this one is computed.
"""

import asyncio
import importlib.util
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kvfs_bench.decode_process import drop_from_page_cache
from kvfs_bench.decode_rivals import NUM_BUFFERS, Tails, attention, resident_layers, sample_layer
from kvfs_bench.decode_shape import HEAD_DIM, NUM_KV_HEADS, TOKEN_BYTES, DecodedToken, Shape, prompt
from kvfs_bench.decode_torch import Kernel, converting_kernels, fastest, to_torch, use_all_cpus

CHUNK_TOKENS = 256  # LMCache's default
TUNING_LAYERS = 3
WRITING_SECONDS = 120


def is_installed() -> bool:
    return importlib.util.find_spec("lmcache") is not None


class _Chunks:
    """LocalDiskBackend over files in a folder, which it does not list by itself: `name_stored` does."""

    def __init__(self, shape: Shape, folder: Path, staging_layers: int):
        os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS,
            local_cpu=False,
            local_disk=str(folder),
            max_local_disk_size=2 * shape.kv_bytes / 2**30,
        )
        self._format = MemoryFormat.KV_T2D
        self._chunk_shape = torch.Size([CHUNK_TOKENS, 2, NUM_KV_HEADS * HEAD_DIM])
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._allocator = MixedMemoryAllocator(staging_layers * shape.layer_bytes + (1 << 20))
        self._staging = LocalCPUBackend(config, dst_device="cpu", memory_allocator=self._allocator)
        self.backend = LocalDiskBackend(config, self._loop, self._staging, dst_device="cpu")
        chunks = [
            CacheEngineKey("decode", 1, 0, chunk, torch.float16).split_layers(shape.num_layers)
            for chunk in range(shape.num_tokens // CHUNK_TOKENS)
        ]
        self.keys = [[chunk[layer] for chunk in chunks] for layer in range(shape.num_layers)]

    def store(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        for number, key in enumerate(self.keys[layer]):
            part = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
            chunk = self._staging.allocate(self._chunk_shape, torch.float16, self._format)
            for kind, array in enumerate((keys, values)):
                chunk.tensor[:, kind] = torch.from_numpy(array[part]).reshape(CHUNK_TOKENS, -1)
            self.backend.submit_put_task(key, chunk)
            chunk.ref_count_down()
        deadline = time.monotonic() + WRITING_SECONDS
        while any(self.backend.exists_in_put_tasks(key) for key in self.keys[layer]):
            if time.monotonic() > deadline:
                raise TimeoutError("LMCache did not write its chunks")
            time.sleep(0.001)

    def name_stored(self) -> None:
        """Tell the backend of the files that another instance stored."""
        size = CHUNK_TOKENS * TOKEN_BYTES
        for layer in self.keys:
            for key in layer:
                self.backend.insert_key(key, size, self._chunk_shape, torch.float16, self._format)

    def close(self) -> None:
        self.backend.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._allocator.close()


class LMCache:
    """Layers that fit beside staging and a layer's buffer stay in memory, as for the other rivals."""

    @staticmethod
    def tune(shape: Shape, path: Path) -> Kernel:
        """The kernel; stores the prompt by the way."""
        use_all_cpus()
        path.mkdir()
        chunks = _Chunks(shape, path, NUM_BUFFERS)
        for layer in range(shape.num_layers):
            chunks.store(layer, *prompt(shape, layer))
        chunks.close()
        for file in path.iterdir():
            drop_from_page_cache(file)
        keys, values = (array.transpose(0, 1).contiguous().transpose(0, 1) for array in sample_layer(shape))
        return fastest(converting_kernels(shape.capacity_tokens), keys, values)[0]

    def __init__(self, shape: Shape, path: Path, kernel: Kernel):
        self._shape, self._kernel = shape, kernel
        layer_shape = (2, shape.capacity_tokens, NUM_KV_HEADS, HEAD_DIM)
        layer_bytes = shape.capacity_tokens * TOKEN_BYTES
        other_bytes = kernel.buffer_bytes(shape.capacity_tokens) + layer_bytes
        resident = resident_layers(shape, other_bytes, layer_bytes)
        self._streamed = [layer for layer in range(shape.num_layers) if layer not in resident]
        self._chunks = _Chunks(shape, path, NUM_BUFFERS)
        self._chunks.name_stored()
        self._buffer = torch.empty(layer_shape, dtype=torch.float16)
        self._thread = ThreadPoolExecutor(1)
        self._tails = Tails(shape)
        self._resident = {layer: torch.empty(layer_shape, dtype=torch.float16) for layer in resident}
        for layer, buffer in self._resident.items():
            self._take(self._restore(layer), buffer)
        reading = self._tune_reading() if self._streamed else "no reading"
        self._position = 0  # of the next layer to be awaited, in _streamed
        self._restored = self._restore(self._streamed[0]) if self._streamed else None
        self.setting = f"{reading}; {kernel.name}; {len(resident)} layers stay in memory"

    def _restore(self, layer: int) -> Future:
        return self._thread.submit(self._chunks.backend.batched_get_blocking, self._chunks.keys[layer])

    def _take(self, restored: Future, buffer: torch.Tensor) -> None:
        """Copy a layer's chunks to its buffer and give their memory back."""
        for number, chunk in enumerate(restored.result()):
            rows = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
            buffer[:, rows] = chunk.tensor.view(CHUNK_TOKENS, 2, NUM_KV_HEADS, HEAD_DIM).transpose(0, 1)
            chunk.ref_count_down()

    def _tune_reading(self) -> str:
        """Through the page cache or past it: whichever restores faster."""
        found = {}
        for name, is_direct in (("through the page cache", False), ("direct I/O", True)):
            self._chunks.backend.use_odirect = is_direct
            start = time.perf_counter()
            for layer in self._streamed[:TUNING_LAYERS]:
                self._take(self._restore(layer), self._buffer)
            found[name] = time.perf_counter() - start, is_direct
        best = min(found, key=found.get)
        self._chunks.backend.use_odirect = found[best][1]
        return best

    def attend(self, layer: int, token: DecodedToken) -> np.ndarray:
        buffer = self._resident.get(layer)
        if buffer is None:
            restored, buffer = self._restored, self._buffer
            self._position += 1
            self._restored = self._restore(self._streamed[self._position % len(self._streamed)])
            self._take(restored, buffer)
        tail = self._tails.append(layer, token)
        stop = self._shape.num_tokens + tail.shape[1]
        buffer[:, self._shape.num_tokens : stop] = torch.from_numpy(tail)
        keys, values = (part[:stop].transpose(0, 1) for part in buffer)
        return attention(self._kernel, to_torch(token.queries), keys, values)

    def close(self) -> None:
        self._thread.shutdown()
        self._chunks.close()
