"""kvfs inside the engine's process, named in LMCache's configuration alone."""

import asyncio
import threading

import pytest

pytest.importorskip("lmcache.v1", reason="these tests need LMCache: pip install 'kvfs[lmcache]'")

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import storage_plugin_launcher
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

CHUNK_TOKENS, NUM_LAYERS, NUM_HEADS, HEAD_DIM = 64, 2, 2, 64


class Engine:
    """What of LMCache's engine a storage backend meets."""

    def __init__(self, path, dtype=torch.bfloat16, model="tiny", **options):
        extra = {
            "storage_plugin.kvfs.module_path": "kvfs.engines.lmcache",
            "storage_plugin.kvfs.class_name": "KvfsStoragePlugin",
            "kvfs.path": str(path),
            "kvfs.size": "96MiB",
        }
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=False, storage_plugins=["kvfs"], extra_config=extra, **options
        )
        shape = NUM_LAYERS, 2, CHUNK_TOKENS, NUM_HEADS, HEAD_DIM
        metadata = LMCacheMetadata(model, 1, 1, 0, 0, dtype, shape, chunk_size=CHUNK_TOKENS)
        self.dtype, self.model = dtype, model
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.memory = MixedMemoryAllocator(32 << 20)
        self.cpu = LocalCPUBackend(config, metadata, dst_device="cpu", memory_allocator=self.memory)
        backends = {}
        storage_plugin_launcher(config, metadata, self.loop, self.cpu, "cpu", backends)
        self.backend = backends["kvfs"]

    def key(self, number, tags=None):
        return CacheEngineKey(self.model, 1, 0, number, self.dtype, tags)

    def chunk(self, seed, num_tokens=CHUNK_TOKENS, layer=False):
        hidden = NUM_HEADS * HEAD_DIM
        shape = [num_tokens, 2, hidden] if layer else [2, NUM_LAYERS, num_tokens, hidden]
        made = self.cpu.allocate(
            torch.Size(shape), self.dtype, MemoryFormat.KV_T2D if layer else MemoryFormat.KV_2LTD
        )
        generator = torch.Generator().manual_seed(seed)
        made.tensor.copy_(torch.randn(shape, generator=generator).to(self.dtype))
        return made

    def put(self, keys, chunks):
        for future in self.backend.batched_submit_put_task(keys, chunks) or ():
            future.result(20)
        assert not any(map(self.backend.exists_in_put_tasks, keys))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self):
        self.backend.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.memory.close()


@pytest.fixture
def engine(tmp_path):
    """engine(**options) over one drive; closed in the end, or by the next one."""
    made = []

    def make(**options):
        while made:
            made.pop().close()
        made.append(Engine(tmp_path / "drive.kvfs", **options))
        return made[-1]

    yield make
    while made:
        made.pop().close()


def test_chunks_survive(engine):
    """Chunks, whole and not full, that a restarted engine does not get back as they were."""
    first = engine()
    keys = [first.key(number) for number in (1, -2, 3)]
    chunks = [first.chunk(1), first.chunk(2), first.chunk(3, num_tokens=17)]
    expected = [chunk.tensor.clone() for chunk in chunks]
    first.put(keys, chunks)
    assert [chunk.get_ref_count() for chunk in chunks] == [1, 1, 1]
    second = engine()
    wanted = [*keys, second.key(4)]
    assert second.backend.batched_contains(wanted) == 3
    found = second.backend.batched_get_blocking(wanted)
    assert found[3] is None
    for chunk, tensor in zip(found, expected, strict=False):
        assert torch.equal(chunk.tensor, tensor)
        assert chunk.metadata.fmt == MemoryFormat.KV_2LTD
    assert second.backend.get_blocking(second.key(4)) is None


@pytest.mark.parametrize("other", [{"dtype": torch.float16}, {"model": "other"}])
def test_another_identity(engine, other):
    """K/V of another model or dtype: the same key, the same size, other bytes."""
    first = engine()
    first.put([first.key(1)], [first.chunk(1)])
    second = engine(**other)
    assert not second.backend.contains(second.key(1))
    assert second.backend.get_blocking(second.key(1)) is None
    assert second.backend._cache.usage().misses["identity"] >= 1


def test_tags_and_layers(engine):
    """Chunks of other tags, or of another layer, taken for this one's."""
    made = engine(use_layerwise=True)
    layers = made.key(1).split_layers(NUM_LAYERS)
    chunks = [made.chunk(number, layer=True) for number in range(NUM_LAYERS)]
    expected = [chunk.tensor.clone() for chunk in chunks]
    made.put(layers, chunks)
    found = made.backend.batched_get_blocking(layers)
    assert all(torch.equal(chunk.tensor, tensor) for chunk, tensor in zip(found, expected, strict=True))
    tagged = made.key(1, {"lmcache.tag.user": "b"}).split_layers(NUM_LAYERS)
    assert made.backend.batched_contains(tagged) == 0


def test_asynchronous_loading(engine):
    """The prefix that the scheduler was promised, and pins that are never given back."""
    made = engine()
    keys = [made.key(number) for number in range(4)]
    made.put(keys[:3], [made.chunk(number) for number in range(3)])
    assert made.run(made.backend.batched_async_contains("request", keys, pin=True)) == 3
    found = made.run(made.backend.batched_get_non_blocking("request", keys[:3]))
    assert [float(chunk.tensor[0, 0, 0, 0]) for chunk in found] == [
        float(made.chunk(number).tensor[0, 0, 0, 0]) for number in range(3)
    ]
    assert not any(map(made.backend.unpin, keys))


def test_removal(engine):
    """Chunks that LMCache removes and finds again."""
    made = engine()
    keys = [made.key(number) for number in range(3)]
    made.put(keys, [made.chunk(number) for number in range(3)])
    assert made.backend.pin(keys[0]) and made.backend.unpin(keys[0])
    assert made.backend.batched_remove(keys[:2]) == 2
    assert [made.backend.contains(key) for key in keys] == [False, False, True]


def test_another_layout_is_not_stored(engine):
    """A chunk that would come back in another shape."""
    made = engine()
    odd = made.cpu.allocate(torch.Size([4, 100]), made.dtype, MemoryFormat.KV_2LTD)
    assert made.backend.batched_submit_put_task([made.key(1)], [odd]) is None
    assert not made.backend.contains(made.key(1))


def test_a_closed_drive_is_a_miss(engine):
    """An engine that fails with its cache."""
    made = engine()
    made.put([made.key(1)], [made.chunk(1)])
    made.backend._drive.store.close()
    assert not made.backend.contains(made.key(1))
    assert made.backend.get_blocking(made.key(1)) is None
    made.put([made.key(2)], [made.chunk(2)])
