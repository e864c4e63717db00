"""Caps in the simulated store: sequences are evicted, pinned, outlive their time and change tenants.

Whatever happens, the power too: what caps count is what a recount finds, nothing is above a cap, and nothing
goes that is pinned. The oracle is told of an eviction before it happens, as of any deletion.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from kvfs.errors import OutOfSpace
from kvfs.sequence_attributes import PINNED, TENANT, TTL
from kvfs.store import Store

from .oracle import Lost, Moment, Oracle
from .simulator import Simulation
from .workload import Workload

TENANTS = ("", "red", "blue")
NS = 1_000_000_000
STEP_NS = NS // 10  # between two looks at the clock


class CapOracle(Oracle):
    """An eviction comes before the operation that it makes room for, which may be refused in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._before: Moment | None = None  # of an operation under way
        self._evictions: list[Moment] = []  # for it

    def evict(self, name: str) -> None:
        def without(moment: Moment) -> Moment:
            return Moment({n: s for n, s in moment.sequences.items() if n != name}, moment.models)

        if self._before is not None:
            self._before = without(self._before)
            self._evictions.append(self._before)
            self.history.append(self._before)
        self.now = without(self.now)
        self.history.append(self.now)

    @contextmanager
    def attempt(self, sequences=None, models=None) -> Iterator[None]:
        self._before, length = self.now, len(self.history)
        try:
            with super().attempt(sequences, models):
                yield
        except OutOfSpace:
            self.now = self._before
            self.history[length:] = self._evictions
            raise
        finally:
            self._before, self._evictions = None, []


class CapWorkload(Workload):
    def __init__(self, random: np.random.Generator, oracle):
        super().__init__(random, oracle)
        self.time_ns, self.evictions = NS, 0
        self._picked: str | None = None  # what an operation is about: it asks for room for this one
        self._allowed: dict[tuple[str, str], list[int]] = {}  # blocks, where pinned ones were above a new cap
        self._operations |= {
            self._set_quota: 4,
            self._remove_quota: 1,
            self._pin: 5,
            self._set_ttl: 4,
            self._move: 4,
            self._evict: 4,
            self._delete_several: 2,
            self._set_background: 1,
            self._look: 3,
        }

    def clock(self) -> int:
        self.time_ns += STEP_NS
        return self.time_ns

    def use(self, store: Store) -> None:
        super().use(store)
        store._space.clock = self.clock
        evict = store._space._evict

        def told(victims) -> None:
            for victim in victims:
                if store.sequence(victim.name).attributes().get(PINNED) == b"1":
                    raise Lost(f"{victim.name!r} is pinned, and evicted")
                if victim.name == self._picked:
                    raise Lost(f"{victim.name!r} asks for room, and is evicted for it")
                self._note(f"  evicted: {victim.name}")
                self.evictions += 1
                self.oracle.evict(victim.name)
            evict(victims)

        store._space._evict = told

    def step(self) -> None:
        self._picked = None
        super().step()
        self.check_caps(self.store)

    def _pick(self):
        picked = super()._pick()
        self._picked = picked[0]
        return picked

    # operations

    def _data_lbas(self) -> int:
        return self.store._num_data_lbas

    def _whose(self) -> tuple[str, str]:
        names = ["", *sorted(self.oracle.now.models)]
        return names[self.random.integers(len(names))], TENANTS[self.random.integers(len(TENANTS))]

    def _set_quota(self) -> None:
        model, tenant = self._whose()
        capacity = int(self._data_lbas() * self.random.uniform(0.1, 0.6)) * 4096
        low, policy = int(self.random.integers(50, 101)), ("lru", "clock")[self.random.integers(2)]
        self._note(f"cap of {model!r} {tenant!r}: {capacity}, {low}, {policy}")
        self._allowed.setdefault((model, tenant), [])
        self.store.set_quota(model, tenant, capacity_bytes=capacity, low_percent=low, policy=policy)
        used = self._used(self.store)[model, tenant]
        if used * 4096 > capacity:
            self._allowed[model, tenant].append(used)

    def _remove_quota(self) -> None:
        quotas = self.store.quotas()
        if quotas:
            quota = quotas[self.random.integers(len(quotas))]
            self._note(f"no cap of {quota.model!r} {quota.tenant!r}")
            self.store.remove_quota(quota.model, quota.tenant)

    def _pin(self) -> None:
        name, _, sequence = self._pick()
        value = b"1" if self.random.random() < 0.3 else b"0"
        self._note(f"pin {name} {value}")
        sequence.set_attribute(PINNED, value)

    def _set_ttl(self) -> None:
        name, _, sequence = self._pick()
        self._note(f"time to live of {name}")
        sequence.set_attribute(TTL, b"%d" % self.random.integers(1, 30))

    def _move(self) -> None:
        name, _, sequence = self._pick()
        tenant = TENANTS[self.random.integers(len(TENANTS))]
        self._note(f"{name} to {tenant!r}")
        if tenant:
            sequence.set_attribute(TENANT, tenant.encode())
        else:
            sequence.remove_attribute(TENANT)

    def _evict(self) -> None:
        self._note("evict what has outlived its time")
        self.store.evict()

    def _delete_several(self) -> None:
        """Power that fails meanwhile may leave the later ones."""
        names = sorted(self.oracle.sequences)
        names = self.random.permutation(names)[: self.random.integers(2, 5)].tolist()
        self._note(f"delete {names}")
        with ExitStack() as stack:
            for name in names:
                left = {n: kept for n, kept in self.oracle.sequences.items() if n != name}
                stack.enter_context(self.oracle.attempt(left))
            self.store.delete_sequences(names)

    def _set_background(self) -> None:
        high = int(self.random.integers(20, 80))
        low = int(self.random.integers(high // 2, high))
        self._note(f"unasked from {high}% to {low}%")
        if self.random.random() < 0.3:
            self.store.set_background_eviction()
        else:
            self.store.set_background_eviction(expired=True, high_percent=high, low_percent=low)

    def _look(self) -> None:
        self._note("a round in the background")
        self.store._evictor.look()

    # checks

    def _used(self, store: Store) -> dict[tuple[str, str], int]:
        """What each cap counts, by the product's word."""
        return {(q.model, q.tenant): store._space.used_lbas(q) for q in store._space.quotas}

    def _held(self, store: Store) -> dict[tuple[str, str], set]:
        """Extents by model and tenant, by what the catalogue has."""
        names = {model.id: model.name for model in store.models()}
        held: dict[tuple[str, str], set] = {}
        rows = {row.name: row for row in store.catalogue_rows()}
        for name, row in rows.items():
            tenant = store._catalogue.attributes(row.id).get(TENANT, b"").decode()
            sequence = store._sequences.get(name)
            groups = sequence._groups if sequence is not None else store._catalogue.groups(row.id)
            extents = held.setdefault((names[row.model_id], tenant), set())
            extents |= {(group.base_lba, group.num_lbas) for group in groups}
            extents |= {(row.tail_lba, row.tail_lbas)} if row.tail_lbas else set()
        return held

    def check_caps(self, store: Store) -> None:
        """Raises Lost. Counted once more, by the blocks themselves."""
        held = self._held(store)
        for quota in store._space.quotas:
            counted = [
                extents
                for (model, tenant), extents in held.items()
                if quota.model in ("", model) and quota.tenant in ("", tenant)
            ]
            found = sum(extent[-1] for extent in set().union(*counted))
            charged = store._space.used_lbas(quota)
            limit = max([quota.capacity_bytes // 4096, *self._allowed.get((quota.model, quota.tenant), ())])
            if found > limit:
                raise Lost(f"{found} blocks under a cap of {limit}: {quota}")
            if charged > limit:
                raise Lost(f"{charged} blocks charged under a cap of {limit}: {quota}")
            if charged < found:
                raise Lost(f"{found} blocks, of which {charged} are charged: {quota}")


class CapChecks:
    """Of a simulation whose workload has caps."""

    def run(self, num_crash_points: int):
        with patch("time.time_ns", self.workload.clock):
            return super().run(num_crash_points)

    def settle(self) -> None:
        super().settle()
        self.check_recovered_caps(self.store)

    def check_recovered(self, store) -> None:
        super().check_recovered(store)
        self.check_recovered_caps(store)

    def check_recovered_caps(self, store) -> None:
        """Charges are what a recount finds; then all that holds while a store is in use."""
        if store._space.is_counting:
            wanted, found = self._recount(store), dict(store._space.accounts)
            if not self._is_right(found, wanted):
                raise Lost(f"charged are {found}, a recount finds {wanted}")
        self.workload.check_caps(store)

    def _is_right(self, charged: dict, wanted: dict) -> bool:
        return all(charged.get(each, 0) == wanted.get(each, 0) for each in {*charged, *wanted})

    def _recount(self, store) -> dict:
        """By id of model and tenant, blocks of what is stored."""
        raise NotImplementedError


class CapSimulation(CapChecks, Simulation):
    """A Simulation whose workload has caps."""

    new_workload = CapWorkload
    new_oracle = CapOracle

    def _recount(self, store: Store) -> dict[tuple[int, str], int]:
        layouts = {model.id: model.layout for model in store.models()}
        wanted: dict[tuple[int, str], int] = {}
        for row in store._catalogue.sequences():
            tenant = store._catalogue.attributes(row.id).get(TENANT, b"").decode()
            account = row.model_id, tenant
            wanted[account] = wanted.get(account, 0) + stored_lbas(row, layouts[row.model_id])
        return wanted


def stored_lbas(row, layout) -> int:
    """Blocks of a sequence, or a part of one, as its row has it."""
    return -(-row.num_spilled // layout.geometry.group_tokens) * layout.group_lbas + row.tail_lbas
