"""The flash translation layer alone under simulation: as the whole store is, but many times faster.

An oracle holds, for every LBA, what the last completed flush promised and all that was written since. After a
power cut a page must hold one of these, whole.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np

from ftl import collector, translation
from ftl.errors import CorruptPage, OutOfFlash
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma

from .fault_schedule import FTL_SHAPES, FaultSchedule
from .ftl_trials import FtlTrials
from .oracle import Lost
from .report import Report, SimulationFailed
from .simulated_media import PowerCut, SimulatedMedia

EMPTY = 0
LONGEST_WRITE = 12  # blocks
MAX_REFUSALS = 20  # of a drive whose flash is at its end
FIRST_STEPS = 150  # before the first power cut: they fill the drive, so that collection runs


class PageOracle:
    """may_hold[lba]: the values it may hold now; the first is the durable one."""

    def __init__(self, num_lbas: int):
        self.may_hold: list[list[int]] = [[EMPTY] for _ in range(num_lbas)]
        self._outdated = [0] * num_lbas  # values that flushes have taken off so far
        self._doubtful: set[int] = set()
        self._lbas: dict[int, int] = {}  # of every value ever written
        self.lost: set[int] = set()  # LBAs that were found to be errors, and not written since

    def write(self, lba: int, value: int) -> None:
        self.may_hold[lba].append(value)
        self._lbas[value] = lba
        self.lost.discard(lba)
        self._doubtful.add(lba)

    def begin_flush(self) -> dict[int, int]:
        """How many values of each LBA are outdated once this flush completes; another may before it."""
        return {lba: self._outdated[lba] + len(self.may_hold[lba]) - 1 for lba in self._doubtful}

    def flushed(self, outdated: dict[int, int]) -> None:
        for lba, count in outdated.items():
            del self.may_hold[lba][: max(0, count - self._outdated[lba])]
            self._outdated[lba] = max(count, self._outdated[lba])
            if len(self.may_hold[lba]) == 1:
                self._doubtful.discard(lba)

    def is_now(self, lba: int, value: int) -> None:
        """A write that was refused has come so far. Raises Lost."""
        if value not in self.may_hold[lba]:
            raise Lost(f"LBA {lba} holds {value}, may hold {self.may_hold[lba]}")
        self.may_hold[lba].append(value)

    def is_older(self, lba: int, value: int) -> bool:
        """Whether it has held this value at some time."""
        return value == EMPTY or self._lbas[value] == lba

    def check(self, found: "Found") -> None:
        """Every page holds what it may, or its loss is excused. Raises Lost."""
        untold: set[int] | None = set()
        for lba, value in enumerate(found.values):
            if value in self.may_hold[lba] or lba in found.lost:
                continue
            untold = untold or found.media.untold_lbas()
            if (untold is None or lba in untold) and self.is_older(lba, value):
                continue
            raise Lost(f"LBA {lba} holds {value}, may hold {self.may_hold[lba]}")

    def settle(self, found: "Found") -> None:
        """As check; what was found is all there is from now on: opening has made it durable."""
        self.check(found)
        for lba, value in enumerate(found.values):
            if lba not in found.lost:
                self.may_hold[lba] = [value]
        self._doubtful.clear()
        self.lost = set(found.lost)
        found.media.forgotten.clear()


@dataclass
class Found:
    """values: of all LBAs; lost: those that were errors, with good reason."""

    values: list[int]
    lost: set[int]
    media: SimulatedMedia


class FtlSimulation:
    """One seed's run over flash in memory."""

    def __init__(self, seed: int, faults: Iterable[str] = ()):
        self.random = np.random.default_rng(seed)
        self.schedule = FaultSchedule.draw(self.random, faults, FTL_SHAPES)
        self.media = SimulatedMedia(self.schedule.geometry, self.random, self.schedule.nand)
        self.media.dies_in = self.schedule.dies_in
        self.report = Report(seed)
        self.done: deque[str] = deque(maxlen=40)
        self._next_value = 1
        self._options = {
            "options": replace(self.schedule.collector, rated_cycles=int(self.random.choice([30, 3000]))),
            "checkpoint_pages": self.schedule.checkpoint_pages,
        }
        self._trials = FtlTrials(self)
        self._writing = range(0)  # LBAs of the write under way
        self._ftl = FlashTranslationLayer.format(self.media, **self._options)
        # the drive is not new: parity keeps the lower halves of these only
        before_carry = (1 << 32) - int(self.random.integers(200, 1500))
        self._ftl._state.next_program_number = int(self.random.choice([1, before_carry]))
        if "weak-blocks" in faults:
            self._weaken()
        self._oracle = PageOracle(self._ftl.num_lbas)
        page_size = self.schedule.geometry.page_size
        self._pages = dma.allocate(self._ftl.num_lbas * page_size)
        self._addresses = dma.page_addresses(self._pages, page_size)

    def run(self, num_crash_points: int) -> Report:
        """Rounds until the power has been cut at so many points. Raises SimulationFailed."""
        logging.disable(logging.CRITICAL)
        try:
            with patch.object(collector, "COPY_PAGES", 7):  # small superblocks are copied in pieces, too
                for _ in range(FIRST_STEPS):
                    self._step()
                while len(self.report.crash_points) < num_crash_points and self.report.refusals < MAX_REFUSALS:
                    self._round()
        except Exception as error:
            raise SimulationFailed(self.report.seed, list(self.done), error) from error
        finally:
            logging.disable(logging.NOTSET)
        self.report.digest = self.media.digest
        return self.report

    def _weaken(self) -> None:
        """Some blocks fail for ever after a while, and without parity (or it would be in vain) a superblock."""
        life = self.media._life
        weak = self.random.choice(life.size, life.size // 20, replace=False)
        life.flat[weak] = self.random.integers(0, 300, len(weak))
        if not self.schedule.geometry.parity:
            life[self.random.integers(len(life))] = self.random.integers(60)

    def _words(self) -> np.ndarray:
        return self._pages.view("<u8").reshape(self._ftl.num_lbas, -1)

    # the workload

    def _step(self) -> None:
        """A write, an overwrite, a deallocation, a flush or a read; the oracle learns before the drive."""
        self.report.steps += 1
        with self._refusals():
            self._operate()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OutOfFlash as error:
            # what is lost keeps its superblock from being erased; a die is more than the spare of a small drive
            if not self.media.lost_pages() and not self.media.dead_dies:
                raise
            self.report.refusals += 1
            self.done.append(f"  refused: {error}")

    def _operate(self) -> None:
        first, count = self._draw_lbas()
        choice = self.random.random()
        if choice < 0.65:
            self._write(first, count)
        elif choice < 0.8:
            self.done.append(f"deallocate {count} at {first}")
            self.deallocate(first, count)
        elif choice < 0.9:
            self.flush()
        elif choice < 0.95:
            self._trials.maintain()
        else:
            found, lost = self._read(self._ftl, first, count)
            for lba, value in enumerate(found, first):
                if lba not in lost and value != self._oracle.may_hold[lba][-1]:
                    raise Lost(f"LBA {lba} holds {value}, not {self._oracle.may_hold[lba]}")

    def _draw_lbas(self) -> tuple[int, int]:
        count = int(self.random.integers(1, LONGEST_WRITE))
        return int(self.random.integers(0, self._ftl.num_lbas - count)), count

    def write_some(self) -> None:
        self._write(*self._draw_lbas())

    def new_values(self, count: int) -> range:
        self._next_value += count
        return range(self._next_value - count, self._next_value)

    def deallocate(self, first: int, count: int) -> None:
        for lba in range(first, first + count):
            self._oracle.write(lba, EMPTY)
        self._ftl.deallocate([[first, count]])

    def flush(self) -> None:
        self.done.append("flush")
        outdated = self._oracle.begin_flush()
        self._ftl.flush()
        self._oracle.flushed(outdated)

    def _write(self, first: int, count: int) -> None:
        values = self.new_values(count)
        self.done.append(f"write {count} at {first}: {values.start}")
        for lba, value in enumerate(values, first):
            self._oracle.write(lba, value)
        self._words()[:count] = np.array(values, np.uint64)[:, None]
        stream = int(self.random.integers(0, 3))
        self._writing = range(first, first + count)
        try:
            self._ftl.write(np.arange(first, first + count), self._addresses[:count], stream)
        except OutOfFlash:
            found, lost = self._read(self._ftl, first, count)
            for lba, value in enumerate(found, first):
                if lba not in lost:
                    self._oracle.is_now(lba, value)
            raise
        self._writing = range(0)

    # rounds

    def _round(self) -> None:
        self.media.cut_in(self.schedule.cut_distance(self.random))
        self.media.on_operation = self._what_if
        self.media.after_operation = self._trials.meanwhile
        with suppress(PowerCut):
            while self.report.refusals < MAX_REFUSALS:
                self._step()
        self.media.on_operation = self.media.after_operation = None
        self._crashed(depth=1)
        self._ftl = self._open_with_power_cuts()
        self._oracle.settle(self._read_all(self._ftl))
        with self._refusals():
            self._trials.run()

    def _what_if(self, operation: Callable[[], None]) -> None:
        """Now and then: would all be well if the power failed in this operation?"""
        self._trials.meanwhile()
        if self.random.random() >= self.schedule.what_if_chance:
            return
        with self.media.what_if():
            self.media.cut_in(0)
            with suppress(PowerCut):
                operation()
            self._crashed(depth=1)
            before = self._pages.copy()  # the write under way is in there
            self._oracle.check(self._read_all(self._open_with_power_cuts()))
            self._pages[:] = before
        self.done.append("-- (all that since the power cut did not happen)")

    def _crashed(self, depth: int) -> None:
        self.report.crash_points.add((self.media.all_operations, depth))
        self.done.append(f"-- power cut at media operation {self.media.all_operations}, depth {depth}")
        self.media.reboot()

    def _open_with_power_cuts(self) -> FlashTranslationLayer:
        depth = 1
        for cut in self.schedule.opening_cuts(self.random):
            self.media.cut_in(cut)
            with suppress(PowerCut):
                ftl = self._open()
                self.media.cut_after = None
                return ftl
            depth += 1
            self._crashed(depth)
        return self._open()

    def _open(self) -> FlashTranslationLayer:
        with patch.object(translation, "recover", self._trials.recover):
            return FlashTranslationLayer.open(self.media, **self._options)

    def _read_all(self, ftl: FlashTranslationLayer) -> Found:
        return Found(*self._read(ftl, 0, ftl.num_lbas), self.media)

    def _read(self, ftl: FlashTranslationLayer, first: int, count: int) -> tuple[list[int], set[int]]:
        """(values of LBAs, those that are errors as they may be). Raises Lost."""
        lbas = np.arange(first, first + count)
        lost: set[int] = set()
        try:
            ftl.read(lbas, self._addresses[:count])
        except CorruptPage:
            may_be = {int(record["lba"]) for record in self.media.lost_pages().values()} | self._oracle.lost
            # what was copied, and the copy lost, may have been half erased since; where that is known of
            # none, nor is it known what was deallocated, and may be gone with reason
            untold = self.media.untold_lbas()
            may_be |= set(range(ftl.num_lbas)) if untold is None else untold
            for position, lba in enumerate(lbas.tolist()):
                try:
                    ftl.read(lbas[position : position + 1], self._addresses[position : position + 1])
                except CorruptPage as error:
                    if error.lba != lba or lba not in may_be:
                        raise Lost(f"LBA {lba} cannot be read: {error}") from error
                    lost.add(lba)
        words = self._words()[:count]
        whole = np.array([lba not in lost for lba in lbas.tolist()])
        if not (words[whole] == words[whole, :1]).all():
            raise Lost("a torn page was served")
        return words[:, 0].tolist(), lost
