"""A set of three drives under simulation: random use, drains and additions, power cuts at any media operation
of any drive, an oracle that knows what must be there.

The power goes for all drives at once. Everything happens in one thread and with one source of randomness, so a
seed replays; see simulator.py.
"""

import logging
import secrets
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import combinations
from unittest.mock import patch

import numpy as np

from accel.drive import Drive
from ftl.translation import FlashTranslationLayer
from kvfs import metadata
from kvfs.drive_set import drives as drives_module
from kvfs.drive_set import moving
from kvfs.drive_set.drive_set import DriveSet
from kvfs.drive_set.opening import join_new, open_set
from kvfs.errors import DriveMissing, KvfsError, NotInSet
from kvfs.formatting import format_volume
from kvfs.store import Store
from spdk_glue.status import NvmeError

from .fault_schedule import FaultSchedule
from .invariants import check_space
from .oracle import FoundSequence, Lost
from .report import Report, SimulationFailed
from .set_oracle import SetOracle
from .simulated_media import PowerCut, SimulatedMedia
from .simulator import CHECK_EVERY, CONFIG, FIRST_STEPS, _read_back
from .workload import Workload

LOCATIONS = ("a", "b", "c")


class PoweredMedia(SimulatedMedia):
    """One of several drives behind one plug. peers: all of them."""

    peers: list["PoweredMedia"]

    def _step(self, *arguments):
        if any(peer.power_failed for peer in self.peers):
            raise PowerCut
        return super()._step(*arguments)


class SetWorkload(Workload):
    """Use of a set: of a store all but its files, and drives that leave and come back."""

    def __init__(self, random, oracle):
        super().__init__(random, oracle)
        for operation in self.files.operations:
            del self._operations[operation]
        self._operations[self._drain] = 8
        self._operations[self._add_drive] = 3

    def use(self, store) -> None:
        self.store = store

    def _drain(self) -> None:
        """A step of a drive's way out, of one that has begun rather than another's."""
        membership = self.store.membership
        staying = [d for d in membership.drives if d not in membership.leaving and d != membership.files]
        leaving = [*membership.leaving, *staying[: len(membership.drives) - len(membership.leaving) - 1]]
        if not leaving:
            return
        drive = leaving[0] if membership.leaving else leaving[self.random.integers(len(leaving))]
        self._note(f"drain {membership.drives[drive]}")
        if self.random.random() < 0.1 and membership.leaving:
            self.store.drives.stay(drive)
            return
        for _ in range(int(self.random.integers(1, 6))):
            if self.store.drives.drain_step(drive).is_done:
                self._note(f"{membership.drives[drive]} has left")
                break

    def _add_drive(self) -> None:
        outside = sorted(set(LOCATIONS) - set(self.store.membership.drives.values()))
        if outside:
            self._note(f"add {outside[0]}")
            self.store.drives.add(outside[0])


class SetSimulation:
    """One seed's run."""

    new_workload = SetWorkload
    new_oracle = SetOracle

    def __init__(self, seed: int, faults: Iterable[str] = ()):
        """faults: none; power cuts are always there."""
        if faults:
            raise ValueError("a set is simulated without faults of the flash")
        self.random = np.random.default_rng(seed)
        self.schedule = FaultSchedule.draw(self.random)
        self._config = replace(
            CONFIG, collector=self.schedule.collector, checkpoint_pages=self.schedule.checkpoint_pages
        )
        geometry = self.schedule.geometry
        self.media = {
            location: PoweredMedia(geometry, self.random, self.schedule.nand) for location in LOCATIONS
        }
        for media in self.media.values():
            media.peers = list(self.media.values())
        self.oracle = self.new_oracle()
        self.workload = self.new_workload(self.random, self.oracle)
        self.report = Report(seed)
        self.store: DriveSet | None = None
        self._named: list[str] = list(LOCATIONS)  # what the set's file says
        self._what_if_failure: Exception | None = None
        self._opened: list[Store] = []  # whatever the set makes of them: a cut can leave one in nobody's hands

    def run(self, num_crash_points: int) -> Report:
        """Rounds until the power has been cut at so many points. Raises SimulationFailed."""
        logging.disable(logging.CRITICAL)
        random = np.random.default_rng(self.report.seed + 1)
        try:
            with (
                patch.object(metadata, "TOKEN_CHUNK", 16),
                patch.object(moving, "STEP_BYTES", 1),
                patch.object(drives_module, "STEP_SECONDS", -1),  # a step of a drain is one copy
                patch.object(secrets, "randbits", lambda bits: int(random.integers(1, 1 << 62))),
                patch.object(secrets, "token_hex", lambda size: random.bytes(size).hex()),
            ):
                self._format()
                for _ in range(FIRST_STEPS):
                    self.workload.step()
                while len(self.report.crash_points) < num_crash_points:
                    self._round()
                self._end()
        except (Exception, PowerCut) as error:
            cause = self._what_if_failure or error
            raise SimulationFailed(self.report.seed, list(self.workload.done), cause) from cause
        finally:
            logging.disable(logging.NOTSET)
            self._power_off()
        self.report.steps, self.report.refusals = self.workload.steps, self.workload.refusals
        for media in self.media.values():
            self.report.digest = hash((self.report.digest, media.digest))
        return self.report

    # the drives

    def _format(self) -> None:
        for location, media in self.media.items():
            FlashTranslationLayer.format(media).close()
            drive = Drive.over(media, self._config)
            format_volume(drive, location, self.schedule.metadata_lbas)
            drive.close()
        join_new(LOCATIONS, self._open_drive)
        self._use(self._open())

    def _open_drive(self, location: str) -> Store:
        self.media[location].restart()
        store = Store(
            Drive.over(self.media[location], self._config),
            location,
            worker=CONFIG.worker,
            writeback_tokens=self.schedule.writeback_tokens,
            tail_bytes=self.schedule.tail_bytes,
            in_set=True,
        )
        self._opened.append(store)
        return store

    def _open(self) -> DriveSet:
        """By the set's file; where a crash has left that behind, as the error tells an administrator."""

        def note(membership) -> None:
            self._named = list(membership.drives.values())

        subsets = [list(some) for count in (3, 2, 1) for some in combinations(LOCATIONS, count)]
        errors = []
        for named in [self._named, *subsets]:
            try:
                return open_set(named, self._open_drive, in_threads=False, on_change=note)
            except (DriveMissing, NotInSet) as error:
                errors.append(str(error))
        raise Lost("the set does not open: " + "; ".join(errors))

    def _use(self, store: DriveSet) -> None:
        self.store = store
        self.workload.use(store)

    def _power_off(self, first_store: int = 0) -> None:
        """The end of the process: memory is gone, of all stores opened since the one of this number."""
        for media in self.media.values():
            media.on_operation, media.cut_after = None, -1
        for store in self._opened[first_store:]:
            if not store._closed:
                with suppress(PowerCut, NvmeError):
                    store._catalogue.abandon()
                with suppress(PowerCut, KvfsError):
                    store._stack.close()
                store._closed = True
        del self._opened[first_store:]

    @property
    def _operations(self) -> int:
        return sum(media.all_operations for media in self.media.values())

    def _crashed(self, depth: int) -> None:
        self.report.crash_points.add((self._operations, depth))
        self.workload.done.append(f"-- power cut at media operation {self._operations}, depth {depth}")
        for media in self.media.values():
            media.reboot()

    def _any_media(self) -> PoweredMedia:
        return self.media[LOCATIONS[self.random.integers(len(LOCATIONS))]]

    def _open_with_power_cuts(self, first_store: int = 0) -> DriveSet:
        depth = 1
        for cut in self.schedule.opening_cuts(self.random):
            self._any_media().cut_in(cut)
            with self._power_cut():
                store = self._open()
                for media in self.media.values():
                    media.cut_after = None
                return store
            depth += 1
            self._power_off(first_store)
            self._crashed(depth)
        return self._open()

    @contextmanager
    def _power_cut(self):
        try:
            yield
        except (PowerCut, Exception):
            if not any(media.power_failed for media in self.media.values()) or self._what_if_failure:
                raise

    # rounds

    def _round(self) -> None:
        if self.random.random() < self.schedule.clean_close_chance:
            self._work_and_reopen()
        else:
            self._work_until_power_cut()
        self.settle()
        check_space(self.store)
        if self.random.integers(CHECK_EVERY) == 0:
            self._check()

    def settle(self) -> None:
        """After a reopening: the oracle learns what was kept."""
        self.oracle.settle(*_read_all(self.store))

    def check_recovered(self, store: DriveSet) -> None:
        """Raises Lost unless a reopened set holds what it must."""
        self.oracle.check(*_read_all(store))

    def _check(self) -> None:
        try:
            problems = self.store.check()
        except KvfsError as error:
            if "full" in str(error):
                return  # it flushes first
            raise
        if problems:
            raise Lost("check finds: " + "; ".join(problems))

    def _watch(self, is_on: bool) -> None:
        for media in self.media.values():
            media.on_operation = (
                (lambda operation, media=media: self._what_if(media, operation)) if is_on else None
            )

    def _work_until_power_cut(self) -> None:
        self._any_media().cut_in(self.schedule.cut_distance(self.random))
        self._watch(True)
        with self._power_cut():
            while True:
                self.workload.step()
        self._power_off()
        self._crashed(depth=1)
        self._use(self._open_with_power_cuts())

    def _work_and_reopen(self) -> None:
        """A clean end, after which nothing may be missing."""
        self._watch(True)
        for _ in range(int(self.random.integers(1, 20))):
            self.workload.step()
        self.workload.done.append("-- close and open")
        try:
            self.store.close()
        except KvfsError as error:
            if "full" not in str(error):
                raise
        else:
            self.oracle.promise(*self.oracle.sequences)
        self._watch(False)
        self._use(self._open())

    def _what_if(self, media: PoweredMedia, operation: Callable[[], None]) -> None:
        """Would all be well if the power failed in this operation? The set in use goes on."""
        if self.random.random() >= self.schedule.what_if_chance / 2:
            return
        named, first_store = list(self._named), len(self._opened)
        try:
            with ExitStack() as stack:
                for each in self.media.values():
                    stack.enter_context(each.what_if())
                    each.cut_after = None  # one of them is about to fail, for this test's sake
                media.cut_in(0)
                with suppress(PowerCut):
                    operation()
                self._crashed(depth=1)
                try:
                    store = self._open_with_power_cuts(first_store)
                    self.check_recovered(store)
                    check_space(store)
                finally:
                    self._power_off(first_store)
        except Exception as error:
            self._what_if_failure = error
            raise PowerCut from error
        finally:
            self._named = named
        self.workload.done.append("-- (all that since the power cut did not happen)")

    def _end(self) -> None:
        """With everything deleted, all space of all drives is free again."""
        for name in sorted(self.oracle.sequences):
            self.store.delete_sequence(name)
        for drive in self.store.membership.leaving:
            self.store.drives.stay(drive)
        self.store.flush()
        for member in self.store._members.values():
            space = member.store.counters()["space"]
            if space["free_bytes"] != space["capacity_bytes"]:
                raise Lost(f"{member.location}: {space} with nothing stored")
        check_space(self.store)
        self.store.close()


def _read_all(store: DriveSet) -> tuple[dict[str, FoundSequence], frozenset[str]]:
    found = {sequence.name: _read_back(sequence) for sequence in store.sequences()}
    return found, frozenset(model.name for model in store.models())
