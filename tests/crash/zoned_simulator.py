"""The translation layer on a zoned drive under simulation: power cuts, killed hosts and failing zones.

As ftl_simulator.py, on the media that real drives get; the drive holds them to its rules meanwhile.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from unittest.mock import patch

import numpy as np

from ftl import collector
from ftl.media_namespace import NamespaceMedia
from ftl.media_nand import PowerCut
from ftl.media_zoned import geometry_for
from ftl.translation import FlashTranslationLayer
from spdk_glue.command import ZoneState

from .fragile_zoned_drive import FragileZonedDrive
from .oracle import Lost
from .page_workload import Oracle, run
from .report import Report, SimulationFailed

FIRST_STEPS = 150  # before the first power cut: they fill the drive, so that collection runs
NUM_ZONES = 34
KILL_CHANCE = 0.3  # of the host's end alone, not the drive's
MAX_DEPTH = 3


class ZonedSimulation:
    """One seed's run. faults: "weak-blocks" for zones that become read-only, one after the other."""

    def __init__(self, seed: int, faults: Iterable[str] = ()):
        random = self.random = np.random.default_rng(seed)
        self.drive = FragileZonedDrive(
            random,
            num_zones=NUM_ZONES,
            zone_bytes=128 << 10,
            capacity_bytes=int(random.choice([64, 66, 100, 128])) << 10,
            block_bytes=int(random.choice([512, 4096])),
            max_active=[None, 5, 6, 8, 14][random.integers(5)],
            max_open=[None, 5, 7][random.integers(3)],
            unwritten=int(random.choice([0, 0xFF])),
            mdts=int(random.choice([1, 3, 0])),
        )
        self.report = Report(seed)
        self.done: deque[str] = deque(maxlen=40)
        self.longest_cut = int(random.choice([10, 60, 150]))
        self.what_if_chance = float(random.choice([0, 0, 0.05]))
        self._options = {"checkpoint_pages": int(random.choice([30, 150, 1 << 20]))}
        self._weak_zones = 2 if "weak-blocks" in faults else 0
        geometry = geometry_for(self.drive.host(), spare_percent=15 if self._weak_zones else 7)
        media = NamespaceMedia.create(self.drive.host(), geometry)
        self._ftl = FlashTranslationLayer.format(media, **self._options)
        self._oracle = Oracle(self._ftl.num_lbas)
        self._next_value = [1]

    def run(self, num_crash_points: int) -> Report:
        """Rounds until the host or the power has ended at so many points. Raises SimulationFailed."""
        logging.disable(logging.CRITICAL)
        try:
            with patch.object(collector, "COPY_PAGES", 7):
                self._work(FIRST_STEPS)
                while len(self.report.crash_points) < num_crash_points:
                    self._round()
        except Exception as error:
            raise SimulationFailed(self.report.seed, list(self.done), error) from error
        finally:
            logging.disable(logging.NOTSET)
        self.report.digest = self.drive.digest
        return self.report

    def _work(self, num_steps: int) -> None:
        self.report.steps += num_steps
        # what was never written may look like a page of zeros
        run(self._ftl, self._oracle, self.random, self._next_value, num_steps, zeros_chance=0.3)

    def _round(self) -> None:
        self.drive.cut_in(int(self.random.integers(self.longest_cut)))
        self.drive.on_operation = self._what_if
        if self._weak_zones and self.random.random() < 0.1:
            self._wear_out()
        with suppress(PowerCut):
            self._work(1000)
        self._crashed(depth=1)
        self._ftl = self._open_with_crashes()
        self._check(self._oracle)

    def _wear_out(self) -> None:
        """A zone with data can be read only from now on."""
        tables = NUM_ZONES - self._ftl.geometry.num_superblocks
        zone = int(self.random.integers(tables, NUM_ZONES))
        self.done.append(f"zone {zone} is worn out")
        self.drive.states[zone] = ZoneState.READ_ONLY
        self._weak_zones -= 1

    def _what_if(self, operation: Callable[[], None]) -> None:
        """Now and then: would all be well if the power failed in this operation?"""
        if self.random.random() >= self.what_if_chance:
            return
        ftl = self._ftl
        with self.drive.what_if():
            operation()
            self._crashed(depth=1)
            self._ftl = self._open_with_crashes()
            self._check(deepcopy(self._oracle))
        self._ftl = ftl
        self.done.append("-- (all that since the crash did not happen)")

    def _crashed(self, depth: int) -> None:
        self.report.crash_points.add((self.drive.operations, depth))
        is_kill = self.random.random() < KILL_CHANCE
        self.done.append(f"-- {'kill' if is_kill else 'power cut'} at {self.drive.operations}, depth {depth}")
        self.drive.restart() if is_kill else self.drive.reboot()

    def _open_with_crashes(self) -> FlashTranslationLayer:
        depth = 1
        while depth < MAX_DEPTH and self.random.random() < 0.5:
            self.drive.cut_in(int(self.random.integers([3, 15][self.random.integers(2)])))
            with suppress(PowerCut):
                ftl = self._open()
                self.drive.cut_after = None
                return ftl
            depth += 1
            self._crashed(depth)
        return self._open()

    def _open(self) -> FlashTranslationLayer:
        return FlashTranslationLayer.open(NamespaceMedia.open(self.drive.host()), **self._options)

    def _check(self, oracle: Oracle) -> None:
        oracle.check(self._ftl)
        findings = self._ftl.check()
        if findings:
            raise Lost(f"the check finds {findings[0]}")
