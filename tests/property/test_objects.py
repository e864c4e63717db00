"""Caches of objects against a dictionary with an order of use: what is found and evicted, across restarts."""

import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kvfs

BLOCK = 4096
SIZES = st.sampled_from([0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 5 * BLOCK])
KEYS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
IDENTITIES = st.integers(0, 1)
CAPS = st.sampled_from([None, 4 * BLOCK, 12 * BLOCK + 1, 30 * BLOCK])


def blocks(num_bytes):
    return -(-num_bytes // BLOCK)


def content(identity, key, num_bytes):
    return np.random.default_rng([identity, key, num_bytes]).integers(0, 256, num_bytes, np.uint8)


class Model:
    """What a cache must do: the latest use at the end; pinned ones are never evicted."""

    def __init__(self):
        self.objects = OrderedDict()  # (identity, key): size
        self.pins = {}
        self.cap = None

    @property
    def used(self):
        return sum(map(blocks, self.objects.values()))

    def make_room(self, num_blocks, cap, kept=()):
        if cap is None:
            return True
        loose = [place for place in self.objects if not self.pins.get(place) and place not in kept]
        least = self.used - sum(blocks(self.objects[place]) for place in loose)
        if least + num_blocks > cap // BLOCK:
            return False
        while self.used + num_blocks > cap // BLOCK:
            del self.objects[loose.pop(0)]
        return True

    def put(self, identity, sizes):
        """Those that are there stay, room for the others is made, then those are there."""
        present = [(identity, key) for key, size in sizes.items() if self.objects.get((identity, key)) == size]
        stored, reserved = {}, 0
        for key, size in sizes.items():
            if (identity, key) in present:
                stored[key] = True
            elif self.make_room(reserved + blocks(size), self.cap, present):
                reserved += blocks(size)
                stored[key] = None
            else:
                stored[key] = False
        for place in present:
            if not self.pins.get(place):
                self.use(place)
        for key, is_stored in stored.items():
            if is_stored is None:
                self.objects.pop((identity, key), None)
                self.pins.pop((identity, key), None)
                self.objects[identity, key] = sizes[key]
        return [is_stored is not False for is_stored in stored.values()]

    def use(self, place):
        self.objects.move_to_end(place)


@settings(max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
class Caches(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "drive.kvfs")
        kvfs.format(self.path, "48MiB")
        self.model = Model()
        self.open()

    def open(self):
        self.store = kvfs.open(self.path, cache_bytes="8MiB", num_workers=1, worker="reference")
        self.caches = [self.store.object_cache("cache", {"number": number}) for number in range(2)]

    @rule(identity=IDENTITIES, keys=KEYS, sizes=st.lists(SIZES, min_size=4, max_size=4))
    def put(self, identity, keys, sizes):
        sizes = dict(zip(keys, sizes[: len(keys)], strict=True))
        found = self.caches[identity].put(
            [bytes([key]) for key in keys], [content(identity, key, size) for key, size in sizes.items()]
        )
        assert found == self.model.put(identity, sizes)

    @rule(identity=IDENTITIES, keys=KEYS)
    def get(self, identity, keys):
        sizes = [self.model.objects.get((identity, key)) for key in keys]
        buffers = [np.empty(size or 0, np.uint8) for size in sizes]
        found = self.caches[identity].get([bytes([key]) for key in keys], buffers)
        assert found == [size is not None for size in sizes]
        for key, size, buffer in zip(keys, sizes, buffers, strict=True):
            if size is not None:
                assert np.array_equal(buffer, content(identity, key, size))
                if not self.model.pins.get((identity, key)):
                    self.model.use((identity, key))

    @rule(identity=IDENTITIES, keys=KEYS)
    def delete(self, identity, keys):
        wanted = [self.model.objects.pop((identity, key), None) for key in keys]
        for key in keys:
            self.model.pins.pop((identity, key), None)
        found = self.caches[identity].delete([bytes([key]) for key in keys])
        assert found == sum(size is not None for size in wanted)

    @rule(identity=IDENTITIES, keys=KEYS)
    def pin(self, identity, keys):
        places = [(identity, key) for key in keys]
        found = self.caches[identity].pin([bytes([key]) for key in keys])
        assert found == [place in self.model.objects for place in places]
        for place in places:
            if place in self.model.objects:
                self.model.pins[place] = self.model.pins.get(place, 0) + 1

    @rule(identity=IDENTITIES, keys=KEYS)
    def unpin(self, identity, keys):
        places = [(identity, key) for key in keys]
        found = self.caches[identity].unpin([bytes([key]) for key in keys])
        assert found == [bool(self.model.pins.get(place)) for place in places]
        for place in places:
            if self.model.pins.get(place):
                self.model.pins[place] -= 1
                if not self.model.pins[place]:
                    self.model.use(place)

    @rule(cap=CAPS)
    def set_cap(self, cap):
        if self.model.make_room(0, cap):
            self.caches[0].set_capacity(cap)
            self.model.cap = cap
        else:
            try:
                self.caches[0].set_capacity(cap)
            except kvfs.errors.InvalidArgument:
                return
            raise AssertionError("a cap below what is pinned")

    @rule()
    def flush(self):
        self.store.flush()

    @rule()
    def reopen(self):
        """The order of use is as before, pins are gone."""
        self.store.close()
        self.open()
        self.model.pins.clear()

    @rule()
    def check(self):
        assert self.store.check() == []

    @invariant()
    def same(self):
        if not hasattr(self, "store"):
            return
        usage = self.caches[0].usage()
        assert (usage.objects, usage.bytes) == (len(self.model.objects), self.model.used * BLOCK)
        assert usage.capacity == self.model.cap
        assert usage.capacity is None or usage.bytes <= usage.capacity
        for identity, cache in enumerate(self.caches):
            assert sorted(cache.keys()) == sorted(bytes([k]) for i, k in self.model.objects if i == identity)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.drop_objects()
            self.store.flush()
            space = self.store.counters()["space"]
            assert space["free_bytes"] == space["capacity_bytes"]
            self.store.close()
            self.folder.cleanup()


TestCaches = Caches.TestCase
