"""Caps in the simulated set of drives: whole sequences are evicted, while drives come and go and the power too.

A set evicts where it is opened, if what a power cut left is above a cap. The oracle takes that as it takes any
eviction; pinned sequences stay, and no cap is exceeded, all the same. What caps there are is durable at once.
"""

import math
from contextlib import suppress
from unittest.mock import patch

from kvfs.drive_set.drive_set import DriveSet
from kvfs.errors import OutOfSpace
from kvfs.sequence_attributes import PINNED, TENANT
from kvfs.space.background_policy import OFF
from kvfs.space.set_caps import SetCaps
from kvfs.space.space import charged_lbas

from .cap_workload import CapChecks, CapOracle, CapWorkload, stored_lbas
from .oracle import FoundSequence, Lost, Moment
from .set_oracle import SetOracle
from .set_simulator import SetSimulation, SetWorkload


class SetCapOracle(CapOracle, SetOracle):
    """Both. gone_at_opening: names of what was evicted by openings since the last settling."""

    def __init__(self) -> None:
        super().__init__()
        self.gone_at_opening: list[str] = []

    def check(self, found: dict[str, FoundSequence], models: frozenset[str], files=None) -> Moment:
        history, gone = self.history, set(self.gone_at_opening)
        without = [
            Moment({name: state for name, state in moment.sequences.items() if name not in gone}, moment.models)
            for moment in (history if gone else ())
        ]
        self.history = [*history, *without]
        try:
            return super().check(found, models, files)
        finally:
            self.history = history

    def settle(self, found: dict[str, FoundSequence], models: frozenset[str], files=None) -> None:
        super().settle(found, models, files)
        self.gone_at_opening.clear()


class SetCapWorkload(CapWorkload, SetWorkload):
    """Both. caps: what may be set now, one tuple, or two while a change is under way."""

    def __init__(self, random, oracle):
        super().__init__(random, oracle)
        self.caps: list[tuple] = [((), OFF)]

    def use(self, store: DriveSet) -> None:
        super().use(store)
        self.caps = [_caps_of(store)]
        write = store._space._write

        def told(quotas, background) -> None:
            self.caps = [*self.caps, (quotas, background)]
            write(quotas, background)
            del self.caps[:-1]

        store._space._write = told

    def _data_lbas(self) -> int:
        return sum(member.store._num_data_lbas for member in self.store._live)

    def _held(self, store: DriveSet) -> dict[tuple[str, str], set]:
        records = {record.uid: record for record in store._placed.values()}
        held: dict[tuple[str, str], set] = {}
        for member in store._live:
            part_store = member.store
            for row in part_store._catalogue.sequences():
                record = records.get(int(row.name.partition("-")[0], 16))
                if record is None:
                    raise Lost(f"{member.location} has {row.name}, of no sequence")
                sequence = part_store._sequences.get(row.name)
                groups = sequence._groups if sequence is not None else part_store._catalogue.groups(row.id)
                extents = held.setdefault((record.model, _tenant_of(store, record)), set())
                extents |= {(member.drive_id, group.base_lba, group.num_lbas) for group in groups}
                extents |= {(member.drive_id, row.tail_lba, row.tail_lbas)} if row.tail_lbas else set()
        return held

    def check_known_caps(self, store: DriveSet) -> None:
        """Raises Lost unless the caps are those that were set."""
        found = _caps_of(store)
        if found not in self.caps:
            raise Lost(f"caps are {found}, set were {self.caps}")


class SetCapSimulation(CapChecks, SetSimulation):
    """A SetSimulation whose workload has caps. evictions_at_opening: also where the power failed only for a
    test's sake."""

    new_workload = SetCapWorkload
    new_oracle = SetCapOracle
    evictions_at_opening = 0
    _is_flushed = False

    def run(self, num_crash_points: int):
        evict, simulation = SetCaps._evict, self

        def told(caps: SetCaps, victims) -> None:
            for victim in victims if caps._set is not simulation.store else ():  # it is being opened
                if caps._set.sequence(victim.name).attributes().get(PINNED) == b"1":
                    raise Lost(f"{victim.name!r} is pinned, and evicted")
                simulation.workload.done.append(f"-- evicted by opening: {victim.name}")
                simulation.evictions_at_opening += 1
                simulation.oracle.gone_at_opening.append(victim.name)
            evict(caps, victims)

        with patch.object(SetCaps, "_evict", told):
            return super().run(num_crash_points)

    def _what_if(self, media, operation) -> None:
        try:
            super()._what_if(media, operation)
        finally:
            self.oracle.gone_at_opening.clear()

    def _use(self, store: DriveSet) -> None:
        self.workload.check_known_caps(store)
        super()._use(store)

    def check_recovered(self, store: DriveSet) -> None:
        super().check_recovered(store)
        self.workload.check_known_caps(store)
        with suppress(OutOfSpace):  # a catalogue that is full
            store.flush()
            self._is_flushed = True
            try:
                self.check_recovered_caps(store)
            finally:
                self._is_flushed = False

    def _recount(self, store: DriveSet) -> dict[tuple[int, str], tuple[int, int]]:
        """At least, and at most: parts are charged for the tokens of their last group what their tail record
        may need, some of which may be in the group already."""
        wanted: dict[tuple[int, str], tuple[int, int]] = {}
        for record in store._placed.values():
            sequence = store.sequence(record.name)
            account = sequence.model.id, _tenant_of(store, record)
            for part, place in zip(sequence._parts, record.parts, strict=True):
                rows = store._member(place).store._catalogue.sequences()
                row = next(row for row in rows if row.id == part._row.id)
                least, most = wanted.get(account, (0, 0))
                stored = stored_lbas(row, part.model.layout)
                wanted[account] = least + stored, most + max(stored, charged_lbas(part))
        return wanted

    def _is_right(self, charged: dict, wanted: dict) -> bool:
        """What was cut when the set was opened is charged until that is stored on all drives."""
        for account in {*charged, *wanted}:
            least, most = wanted.get(account, (0, 0))
            if not least <= charged.get(account, 0) <= (most if self._is_flushed else math.inf):
                return False
        return True


def _caps_of(store: DriveSet) -> tuple:
    return tuple(store.membership.quotas), store.membership.background


def _tenant_of(store: DriveSet, record) -> str:
    return store.sequence(record.name)._parts[0].attributes().get(TENANT, b"").decode()
