"""A whole store under simulation: random use, power cuts at any media operation, an oracle that knows better.

A run is a series of rounds. In each, the workload goes on until the power fails inside a media operation; the
drive comes back with what was not synced kept, lost or torn at random; opening it may be cut short as well, up
to depth 3. Then everything is read back and compared, and the next round starts from what was found. Many
operations before that are tried as well: the power fails, all is checked, and then it has not happened.

One seed gives the same run every time: no threads take part (the drive runs submitted commands where they are
submitted, small attention commands always), no clock, one source of randomness. So a seed replays a failure.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NoReturn
from unittest.mock import patch

import numpy as np

from accel.drive import Drive, DriveConfig
from ftl.translation import FlashTranslationLayer
from kvfs import free_space, metadata
from kvfs.errors import KvfsError, NvmeStatusError, OutOfSpace
from kvfs.files.file_system import FileSystem
from kvfs.formatting import format_volume
from kvfs.store import Store
from spdk_glue.status import NvmeError, Status

from .fault_schedule import FaultSchedule
from .file_oracle import Mismatch
from .file_workload import read_files
from .invariants import check_space
from .oracle import FoundSequence, Lost, Oracle
from .report import Report, SimulationFailed
from .simulated_media import PowerCut, SimulatedMedia
from .store_trials import StoreTrials
from .workload import Workload

PATH = "simulated"
FIRST_STEPS = 150  # before the first power cut: they fill the drive, so that collection runs and space is short
MEND_CHANCE = 0.2  # per round, of damage to a closed drive; as often, what a power cut left is mended
CROWD_CHANCE = 0.2  # per round, of a catalogue filled to its end
CHECK_EVERY = 8  # rounds between two runs of `Store.check`, which reads everything once more
CONFIG = DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="reference", num_command_threads=0)


class Simulation:
    """One seed's run over a drive in memory."""

    new_workload = Workload
    new_oracle = Oracle

    def __init__(self, seed: int, faults: Iterable[str] = ()):
        """faults: names of fault_schedule.FAULTS."""
        self.random = np.random.default_rng(seed)
        self.schedule = FaultSchedule.draw(self.random, faults)
        self._config = replace(
            CONFIG, collector=self.schedule.collector, checkpoint_pages=self.schedule.checkpoint_pages
        )
        self.media = SimulatedMedia(self.schedule.geometry, self.random, self.schedule.nand)
        self.media.dies_in = self.schedule.dies_in
        self.oracle = self.new_oracle()
        self.workload = self.new_workload(self.random, self.oracle)
        self.report = Report(seed)
        self._trials = StoreTrials(self)
        self.store: Store | None = None
        self._what_if_failure: Exception | None = None

    def run(self, num_crash_points: int) -> Report:
        """Rounds until the power has been cut at so many points. Raises SimulationFailed."""
        logging.disable(logging.CRITICAL)  # bit flips are logged as errors; here they are expected
        try:
            with (
                patch.object(metadata, "TOKEN_CHUNK", 16),  # sequences are short here
                patch.object(free_space, "LEAST_PAGES", 0),  # and catalogues small
            ):
                self._format()
                for _ in range(FIRST_STEPS):
                    self.workload.step()
                while len(self.report.crash_points) < num_crash_points:
                    self._round()
                self._end()
        except (KvfsError, NvmeError, Lost) as error:
            if not self._is_excused(error):
                self._fail(error)
            if self.store is not None:  # else it was never formatted
                self._check_what_is_left()
        except (Exception, PowerCut) as error:
            self._fail(error)
        finally:
            logging.disable(logging.NOTSET)
            if self.store is not None:
                self._power_off(self.store)
        self.report.steps, self.report.refusals = self.workload.steps, self.workload.refusals
        self.report.digest = self.media.digest
        return self.report

    def _fail(self, error: BaseException) -> NoReturn:
        cause = self._what_if_failure or error
        raise SimulationFailed(self.report.seed, list(self.workload.done), cause) from cause

    # the drive

    def _format(self) -> None:
        FlashTranslationLayer.format(self.media).close()
        drive = Drive.over(self.media, self._config)
        format_volume(drive, PATH, self.schedule.metadata_lbas)
        drive.close()
        self._use(self._open())

    def _open(self) -> Store:
        self.media.restart()
        return Store(
            Drive.over(self.media, self._config),
            PATH,
            worker=CONFIG.worker,
            writeback_tokens=self.schedule.writeback_tokens,
            tail_bytes=self.schedule.tail_bytes,
            seals_in_background=False,
            evict_every_s=None,
        )

    def _use(self, store: Store) -> None:
        self.store = store
        self.workload.use(store)

    def _power_off(self, store: Store) -> None:
        """The end of the process: memory is gone, nothing more is written."""
        self.media.on_operation, self.media.cut_after = None, -1  # whatever closing might still write
        with suppress(PowerCut, NvmeError):
            store._catalogue.abandon()
        with suppress(PowerCut, KvfsError):
            store._stack.close()

    def _crashed(self, depth: int) -> None:
        """Count a power cut; the power is back afterwards."""
        self.report.crash_points.add((self.media.all_operations, depth))
        self.workload.done.append(f"-- power cut at media operation {self.media.all_operations}, depth {depth}")
        self.media.reboot()

    def _open_with_power_cuts(self) -> Store:
        """The store once an opening has come through."""
        depth = 1
        for cut in self.schedule.opening_cuts(self.random):
            self.media.cut_in(cut)
            with self._power_cut():
                store = self._open()
                self.media.cut_after = None
                return store
            depth += 1
            self._crashed(depth)
        return self._open()

    @contextmanager
    def _power_cut(self) -> Iterator[None]:
        """Ends where the power does, whatever the layers above made of it (SQLite: an error of its own)."""
        try:
            yield
        except (PowerCut, Exception):
            if not self.media.power_failed or self._what_if_failure:
                raise

    # rounds

    def _round(self) -> None:
        if self.random.random() < self.schedule.clean_close_chance:
            self._work_and_reopen()
        else:
            self._work_until_power_cut()
        self.settle()
        if self.random.integers(CHECK_EVERY) == 0:
            self._check()
        if self.random.random() < self.schedule.bit_flip_chance:
            self._flip_bits()
        is_whole = not (self.media.gone or self.media.dead_dies)  # or it would be the second fault
        if self.random.random() < MEND_CHANCE and is_whole:
            self._trials.mend_damage()
        if self.random.random() < CROWD_CHANCE:
            self._trials.crowd_catalogue()

    def settle(self) -> None:
        """What is found is the truth from now on."""
        self.oracle.settle(*_read_all(self.store))
        self.media.forgotten.clear()
        check_space(self.store)

    def check_recovered(self, store: Store) -> None:
        """What a power cut left, which will not have been. Raises Lost."""
        self.oracle.check(*_read_all(store))
        check_space(store)

    def expect_damage(self, lbas: np.ndarray) -> None:
        """Pages that are to be lost, of which parity gives none back."""

    def _work_until_power_cut(self) -> None:
        self.media.cut_in(self.schedule.cut_distance(self.random))
        self.media.on_operation = self._what_if
        with self._power_cut():
            while True:
                self.workload.step()
        self._power_off(self.store)
        self._crashed(depth=1)
        if self.random.random() < MEND_CHANCE and not self.media.lost_pages():
            self._trials.mend_leftovers()
        self._use(self._open_with_power_cuts())

    def _work_and_reopen(self) -> None:
        """A clean end, after which nothing may be missing. A drive too full for the tails may say so."""
        self.media.on_operation = self._what_if
        for _ in range(int(self.random.integers(1, 20))):
            self.workload.step()
        self.workload.done.append("-- close and open")
        try:
            self.store.close()
        except OutOfSpace:
            pass  # what was flushed before is there, as after a power cut
        else:
            self.oracle.promise(*self.oracle.sequences)
        self.media.on_operation = None
        self._use(self._open())

    def _what_if(self, operation: Callable[[], None]) -> None:
        """Now and then: would all be well if the power failed in this operation? The store in use goes on."""
        if self.random.random() >= self.schedule.what_if_chance:
            return
        try:
            with self.media.what_if():
                self.media.cut_in(0)
                with suppress(PowerCut):
                    operation()
                self._crashed(depth=1)
                try:
                    store = self._open_with_power_cuts()
                    try:
                        self.check_recovered(store)
                    finally:
                        self._power_off(store)
                except (KvfsError, NvmeError, Lost) as error:
                    if not self._is_excused(error):
                        raise
        except Exception as error:
            self._what_if_failure = error  # the layers between here and the run make something else of it
            raise PowerCut from error
        self.workload.done.append("-- (all that since the power cut did not happen)")

    # what faults besides power cuts take

    def _is_excused(self, error: Exception) -> bool:
        """Whether it had to come to this: an error for what is lost, an older version where nothing tells, or a
        small drive without room beside a dead die."""
        if isinstance(error, Lost):
            untold = self.media.untold_lbas()
            return untold is None or bool(untold)
        is_full = isinstance(error, NvmeStatusError) and error.status == Status.CAPACITY_EXCEEDED
        return bool(self.media.lost_pages()) or (is_full and bool(self.media.dead_dies))

    def _check_what_is_left(self) -> None:
        """After an error that had to come: the store opens or says why not, and what it serves is right. Raises
        SimulationFailed."""
        self._power_off(self.store)
        self.media.cut_after = None
        try:
            self._use(self._open())
            for sequence in self.store.sequences():
                state = self.oracle.sequences.get(sequence.name)
                try:
                    found = _read_back(sequence)
                except (KvfsError, NvmeError):
                    continue
                if state is not None and found.version_of(state) is None:
                    raise Lost(f"{sequence.name!r} holds {found}, which it never did")
        except (KvfsError, NvmeError, Lost) as error:
            if not self._is_excused(error):
                self._fail(error)

    # checks

    def _check(self) -> None:
        if self.media.lost_pages():
            return  # it says so
        try:
            problems = self.store.check()
        except OutOfSpace:
            return  # it flushes first
        if problems:
            raise Lost("check finds: " + "; ".join(problems))

    def _flip_bits(self) -> None:
        """One bit of a page that is in use: an error that names the block, or right bytes; never wrong ones."""
        if self.media.gone or self.media.dead_dies:
            return  # two faults in a row are one too many
        try:
            self.store.flush()
        except OutOfSpace:
            return  # a catalogue that is full holds what it held
        self.oracle.promise(*self.oracle.sequences)
        reopen = self.random.random() < self.schedule.reopen_chance
        extents = list(self.store._catalogue.used_extents())
        if reopen:
            extents.append((0, self.store._volume.first_data_lba))  # these are in memory otherwise
        lbas = np.concatenate([np.empty(0, np.int64)] + [np.arange(start, start + n) for start, n in extents])
        pages = self.store._drive.ftl.resolve(lbas)
        lbas, pages = lbas[pages >= 0], pages[pages >= 0]
        if not len(lbas):
            return
        which = self.random.integers(len(lbas))
        lba, page = int(lbas[which]), int(pages[which])
        self.report.bit_flips += 1
        self.workload.done.append(f"-- bit flip in LBA {lba}, page {page}" + ", then open again" * reopen)
        self.media.flip_bit(page)
        if not reopen or self._reopen_damaged(lba):
            self._read_damaged(lba)
            if int(self.store._drive.ftl.resolve(np.array([lba]))[0]) == page:  # not written anew meanwhile
                self.media.flip_bit(page)
        else:
            self.media.flip_bit(page)
            self._use(self._open())

    def _reopen_damaged(self, lba: int) -> bool:
        """Whether the store opens although a block is corrupt; if not, the error has to name it."""
        self._power_off(self.store)
        self.media.cut_after = None
        try:
            self._use(self._open())
        except NvmeStatusError as error:
            if error.lba != lba:
                raise Lost(f"LBA {lba} is corrupt, but the error names {error.lba}") from error
            return False
        return True

    def _read_damaged(self, lba: int) -> None:
        in_data = lba >= self.store._volume.first_data_lba
        if self.schedule.geometry.parity:
            self._check()  # parity gives it back
        elif in_data and not any(f"LBA {lba} " in problem for problem in self.store.check()):
            raise Lost(f"check does not name LBA {lba}, which is corrupt")
        for sequence in self.store.sequences():
            state = self.oracle.sequences[sequence.name]
            try:
                found = _read_back(sequence)
            except NvmeStatusError as error:
                if error.lba != lba or self.schedule.geometry.parity:
                    raise Lost(f"LBA {lba} is corrupt, but the error names {error.lba}") from error
            else:
                if found.version_of(state) is None:
                    raise Lost(f"LBA {lba} is corrupt, and was served")
        try:
            self.oracle.files.check(read_files(self.store._files))
        except NvmeStatusError as error:
            if error.lba != lba or self.schedule.geometry.parity:
                raise Lost(f"LBA {lba} is corrupt, but the error names {error.lba}") from error
        except Mismatch as error:
            raise Lost(f"LBA {lba} is corrupt, and was served: {error}") from error

    def _end(self) -> None:
        """With everything deleted, all space is free again."""
        for name in sorted(self.oracle.sequences):
            self.store.delete_sequence(name)
        self.workload.files.remove_all()
        self.store.flush()
        space = self.store.counters()["space"]
        if space["free_bytes"] != space["capacity_bytes"]:
            raise Lost(f"{space['free_bytes']} bytes free of {space['capacity_bytes']} with nothing stored")
        check_space(self.store)
        self.store.close()


def _read_all(store: Store) -> tuple[dict[str, FoundSequence], frozenset[str], dict[str, bytes | None]]:
    """All sequences by name, the names of the models, and what is in files by path."""
    found = {sequence.name: _read_back(sequence) for sequence in store.sequences()}
    files = store._files or FileSystem(store)
    return found, frozenset(model.name for model in store.models()), read_files(files)


def _read_back(sequence) -> FoundSequence:
    words = []
    for layer in range(sequence.model.num_layers):
        rows = np.stack(sequence.read(layer))
        words.append(rows.view(f"u{rows.itemsize}"))
    return FoundSequence(sequence.model.name, words, sequence.tokens)
