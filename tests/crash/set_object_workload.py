"""Caches of objects in the simulated set of drives, while drives come and go."""

from contextlib import ExitStack

from kvfs.drive_set.drive_set import DriveSet

from .object_workload import CACHES, ObjectOracle, ObjectWorkload
from .set_oracle import SetOracle
from .set_simulator import SetSimulation, SetWorkload


class SetObjectOracle(ObjectOracle, SetOracle):
    """Both."""


class SetObjectWorkload(ObjectWorkload, SetWorkload):
    """Both. A drive that leaves takes its objects with it, and then the others' shares of a cap are larger."""

    def _drain(self) -> None:
        self._may_evict(super()._drain)

    def _add_drive(self) -> None:
        self._may_evict(super()._add_drive)

    def _may_evict(self, job) -> None:
        with ExitStack() as stack:
            for cache in CACHES:
                stack.enter_context(self.oracle.changing(cache, {}, self.store))
            job()


class SetObjectSimulation(SetSimulation):
    """A SetSimulation whose workload has caches of objects."""

    new_workload = SetObjectWorkload
    new_oracle = SetObjectOracle

    def settle(self) -> None:
        super().settle()
        self.oracle.settle_objects(self.store)

    def check_recovered(self, store: DriveSet) -> None:
        super().check_recovered(store)
        self.oracle.check_objects(store)

    def _end(self) -> None:
        self.store.drop_objects()
        super()._end()
