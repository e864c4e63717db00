"""Keyed objects in the simulated store: put, get, delete, caps and eviction, beside everything else.

What an object holds follows from its key and from how often it was deleted, so what is found can be checked by
itself. Of each key the oracle has the states that may come back: the one that was flushed last and those since.
Eviction is a choice of the store's that no flush forbids, so it is looked for after each operation; while one
is under way that may evict, every object of its cache may be gone, and nothing may have other bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvfs.store import Store

from .oracle import Lost, Oracle
from .simulator import Simulation
from .workload import Workload

CACHES = ("a", "b")
IDENTITIES = ({"model": "x"}, {"model": "y"})
NUM_KEYS = 12
BLOCK = 4096
SIZES = (0, 1, 700, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 9, 9 * BLOCK)
CAPS = (8 * BLOCK, 30 * BLOCK, 100 * BLOCK)
MAX_OBJECTS = 4  # of one call

Place = tuple[str, int, bytes]  # cache, identity, key
State = tuple[int, int] | None  # generation and size of what is there


def content(place: Place, state: State) -> np.ndarray:
    """uint8: what an object holds."""
    cache, identity, key = place
    generation, size = state
    seed = [ord(cache), identity, int.from_bytes(key), generation, size]
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@dataclass
class Possible:
    """now: the state of a key; states: those that may come back; generation: what is stored next."""

    now: State = None
    states: set[State] = field(default_factory=lambda: {None})
    generation: int = 0


class ObjectOracle(Oracle):
    def __init__(self):
        super().__init__()
        self.objects: dict[Place, Possible] = {}
        self.caps: dict[str, set[int | None]] = {cache: {None} for cache in CACHES}
        self.cap_now: dict[str, int | None] = dict.fromkeys(CACHES)
        self.evicting: set[str] = set()  # caches
        self.damaged: set[Place] = set()

    def possible(self, place: Place) -> Possible:
        return self.objects.setdefault(place, Possible())

    def promise(self, *names: str) -> None:
        super().promise(*names)
        for possible in self.objects.values():
            possible.states = {possible.now}
        self.caps = {cache: {cap} for cache, cap in self.cap_now.items()}

    @contextmanager
    def changing(self, cache: str, changes: dict[Place, State], store: Store) -> Iterator[None]:
        """An operation that may evict. What it has done is looked up; a power cut leaves all of it possible."""
        before = {place: set(self.possible(place).states) for place in changes}
        for place, state in changes.items():
            self.possible(place).states.add(state)
        self.evicting.add(cache)
        yield
        found = found_states(store, self, cache)
        for place, states in before.items():
            self.possible(place).states = states
        for place, state in found.items():
            possible = self.possible(place)
            if state not in {possible.now, None, changes.get(place)}:
                raise Lost(f"{place} is {state}, and was {possible.now}")
            possible.now = state
            possible.states.add(state)
        self.evicting.discard(cache)  # a power cut may come while it is looked up

    def check_objects(self, store: Store) -> dict[Place, State]:
        """What a reopened store holds. Raises Lost."""
        found = {}
        for cache in CACHES:
            usage = store.object_cache(cache, IDENTITIES[0]).usage()
            if usage.capacity not in self.caps[cache]:
                raise Lost(f"cache {cache} has a cap of {usage.capacity}, not one of {self.caps[cache]}")
            if usage.capacity is not None and usage.bytes > usage.capacity:
                raise Lost(f"cache {cache} holds {usage.bytes} bytes, and its cap is {usage.capacity}")
            found |= found_states(store, self, cache)
        for place, state in found.items():
            possible = self.possible(place)
            may_be_gone = place[0] in self.evicting or place in self.damaged
            if state not in possible.states and not (state is None and may_be_gone):
                raise Lost(f"object {place} is {state}, not one of {possible.states}")
            if state is not None and not is_whole(store, place, state) and place not in self.damaged:
                raise Lost(f"object {place} cannot be read")
        return {place: state for place, state in found.items() if place not in self.damaged}

    def settle_objects(self, store: Store) -> None:
        self.check_objects(store)
        for cache in CACHES:
            cap = store.object_cache(cache, IDENTITIES[0]).usage().capacity
            self.caps[cache], self.cap_now[cache] = {cap}, cap
            for place, state in found_states(store, self, cache).items():  # without what turned out damaged
                possible = self.possible(place)
                # a damaged one is dropped, and back after a power cut, with its damage or mended since
                before = possible.states if place in self.damaged else set()
                possible.now, possible.states = state, {state} | before
        self.evicting.clear()
        self.damaged.clear()


def found_states(store: Store, oracle: ObjectOracle, cache: str) -> dict[Place, State]:
    """Of each key, by the sizes that the store tells. Raises Lost for sizes that were never stored."""
    found = {}
    for number, identity in enumerate(IDENTITIES):
        opened = store.object_cache(cache, identity)
        keys = [bytes([key]) for key in range(NUM_KEYS)]
        if not {*opened.keys()} <= {*keys}:
            raise Lost(f"cache {cache} has keys that were never stored")
        for key, size in zip(keys, opened.sizes(keys), strict=True):
            place = cache, number, key
            states = oracle.possible(place).states | {oracle.possible(place).now}
            fitting = [state for state in states if state is not None and state[1] == size]
            if size is not None and not fitting:
                raise Lost(f"{place} has {size} bytes, which is none of {states}")
            # of one size the later generation, unless the bytes are those of an earlier one
            fitting.sort(reverse=True)
            whole = [state for state in fitting if len(fitting) == 1 or is_whole(store, place, state, True)]
            if size is not None and not whole:
                raise Lost(f"{place} holds bytes of none of {fitting}")
            found[place] = whole[0] if size is not None else None
    return found


def is_whole(store: Store, place: Place, state: State, may_differ: bool = False) -> bool:
    """Whether an object can be read. Raises Lost for other bytes than it must have, or says so."""
    cache, identity, key = place
    data = np.full(state[1], 0xA5, np.uint8)
    if not store.object_cache(cache, IDENTITIES[identity]).get([key], [data])[0]:
        return False
    is_right = np.array_equal(data, content(place, state))
    if not is_right and not may_differ:
        raise Lost(f"object {place} has other bytes than {state}")
    return is_right


class ObjectWorkload(Workload):
    oracle: ObjectOracle

    def __init__(self, random: np.random.Generator, oracle: ObjectOracle):
        super().__init__(random, oracle)
        self._operations |= {self._put: 30, self._get: 12, self._delete_objects: 4, self._set_cap: 2}

    def _places(self) -> tuple[str, dict, list[Place]]:
        """(cache, identity, places of one call)."""
        cache = CACHES[self.random.integers(len(CACHES))]
        number = int(self.random.integers(len(IDENTITIES)))
        keys = self.random.permutation(NUM_KEYS)[: self.random.integers(1, MAX_OBJECTS + 1)]
        return cache, IDENTITIES[number], [(cache, number, bytes([key])) for key in keys.tolist()]

    def _put(self) -> None:
        cache, identity, places = self._places()
        changes = {}
        for place in places:
            possible = self.oracle.possible(place)
            size = SIZES[self.random.integers(len(SIZES))]
            if possible.now is not None and self.random.random() < 0.5:
                size = possible.now[1]
            changes[place] = possible.generation, size
            if possible.now is not None and possible.now[1] == size:
                changes[place] = possible.now  # which may be one whose deletion a power cut took back
        self._note(f"put {changes}")
        opened = self.store.object_cache(cache, identity)
        evictions, before = opened.usage().evictions, found_states(self.store, self.oracle, cache)
        with self.oracle.changing(cache, changes, self.store):
            keys, objects = [place[2] for place in places], [content(*change) for change in changes.items()]
            stored = opened.put(keys, objects)
        states = found_states(self.store, self.oracle, cache)
        gone = sum(state is None and before[place] is not None for place, state in states.items())
        evicted = opened.usage().evictions - evictions
        if gone > evicted:
            raise Lost(f"{gone} objects are gone, which were not evicted")
        if gone < evicted:  # for room, before one of another size took its place
            for place in changes:
                self.oracle.possible(place).states.add(None)
        for place, is_stored in zip(places, stored, strict=True):
            if is_stored and states[place] not in (changes[place], None):  # None: evicted for the next
                raise Lost(f"{place} was stored, and is {states[place]}")
        self._check_cap(opened)

    def _get(self) -> None:
        cache, identity, places = self._places()
        self._note(f"get {places}")
        states = [self.oracle.possible(place).now for place in places]
        buffers = [np.empty(SIZES[2] if state is None else state[1], np.uint8) for state in states]
        found = self.store.object_cache(cache, identity).get([place[2] for place in places], buffers)
        for place, state, data, is_hit in zip(places, states, buffers, found, strict=True):
            if is_hit != (state is not None) or (is_hit and not np.array_equal(data, content(place, state))):
                raise Lost(f"get of {place}: {is_hit}, where there is {state}")

    def _delete_objects(self) -> None:
        cache, identity, places = self._places()
        self._note(f"delete {places}")
        for place in places:
            possible = self.oracle.possible(place)
            possible.generation += possible.now is not None
            possible.now = None
            possible.states.add(None)
        self.store.object_cache(cache, identity).delete([place[2] for place in places])

    def _set_cap(self) -> None:
        cache, identity, _ = self._places()
        cap = CAPS[self.random.integers(len(CAPS))]
        self._note(f"cap of {cache} is {cap}")
        before = self.oracle.cap_now[cache]
        self.oracle.cap_now[cache] = cap
        self.oracle.caps[cache].add(cap)
        try:
            with self.oracle.changing(cache, {}, self.store):
                self._check_cap(self.store.object_cache(cache, identity, cap))
        except Exception:
            self.oracle.cap_now[cache] = before
            raise

    def _check_cap(self, opened) -> None:
        usage = opened.usage()
        if usage.capacity is not None and usage.bytes > usage.capacity:
            raise Lost(f"{usage.bytes} bytes, and the cap is {usage.capacity}")


class ObjectSimulation(Simulation):
    """A Simulation whose workload has caches of objects."""

    new_workload = ObjectWorkload
    new_oracle = ObjectOracle

    def settle(self) -> None:
        super().settle()
        self.oracle.settle_objects(self.store)

    def check_recovered(self, store: Store) -> None:
        super().check_recovered(store)
        self.oracle.check_objects(store)

    def expect_damage(self, lbas: np.ndarray) -> None:
        """Pages that are to be lost, of which parity gives none back."""
        self.oracle.damaged |= self._places_at(set(lbas.tolist()))

    def _places_at(self, lbas: set[int]) -> set[Place]:
        found = set()
        for cache in CACHES:
            for number, identity in enumerate(IDENTITIES):
                opened = self.store.object_cache(cache, identity)
                for key in [*opened.keys()]:
                    extents = opened._index.find(opened._identity_id, key).extents
                    if lbas & {first + i for first, count in extents for i in range(count)}:
                        found.add((cache, number, key))
        return found

    def _read_damaged(self, lba: int) -> None:
        if not self.schedule.geometry.parity:
            self.oracle.damaged |= self._places_at({lba})
        super()._read_damaged(lba)
        self.oracle.settle_objects(self.store)

    def _end(self) -> None:
        self.store.drop_objects()
        super()._end()
