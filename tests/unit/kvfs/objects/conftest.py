import numpy as np
import pytest

from kvfs.objects.counters import Miss

MIB = 1 << 20
NO_MISSES = {str(why): 0 for why in Miss}


@pytest.fixture
def cache(store):
    return store.object_cache("cache", {"model": "m", "layers": 2})


def content(seed, num_bytes=MIB):
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def key_of(seed):
    return b"key %d" % seed


def put(cache, *seeds, num_bytes=MIB):
    return cache.put([key_of(seed) for seed in seeds], [content(seed, num_bytes) for seed in seeds])


def get(cache, *seeds, num_bytes=MIB):
    """Whether each is there; what is there is right."""
    buffers = [np.full(num_bytes, 0xEE, np.uint8) for _ in seeds]
    found = cache.get([key_of(seed) for seed in seeds], buffers)
    for seed, buffer, is_hit in zip(seeds, buffers, found, strict=True):
        assert not is_hit or np.array_equal(buffer, content(seed, num_bytes))
    return found
