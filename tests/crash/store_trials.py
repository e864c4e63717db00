"""Damage that a store cannot mend by itself: `check` must name it, and `repair` mend what it can.

Nothing that is undamaged may be lost by that, and of a damaged sequence no token before the first lost page.
"""

from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from accel.drive import Drive
from kvfs import inspection
from kvfs.errors import OutOfSpace
from kvfs.inspection import Inspection
from kvfs.repair import repair
from spdk_glue.command import IoOpcode
from spdk_glue.status import NvmeError, NvmeStatusError, Status

from .oracle import Lost
from .simulated_media import PowerCut

CROWD, CROWD_BYTES = 300, 6000  # attributes: more than any catalogue here takes
PAGES_LOST = 3  # at most, at a time
# What could be wrong with a catalogue that SQLite finds whole; no sequence may lose anything by mending it.
WRONG_ROWS = (
    "UPDATE kv_group SET reference_count = reference_count + 1 WHERE id % 2 = 0",
    "INSERT INTO token_chunk VALUES (1 << 40, 0, x'00000000')",
    "INSERT INTO sequence_group SELECT 1 << 40, 0, id FROM kv_group LIMIT 1",
)


class StoreTrials:
    """Trials of one Simulation, whose store, medium and oracle they use."""

    def __init__(self, simulation):
        self._simulation = simulation
        self._random = simulation.random

    def _inspect(self) -> Inspection:
        simulation = self._simulation
        config = replace(simulation._config, num_command_threads=0)
        with patch.object(inspection, "open_drive", lambda *_: Drive.over(simulation.media, config)):
            return Inspection("simulated", read_only=False)

    def mend_leftovers(self) -> None:
        """After a power cut nothing is damaged; what was left over is given back, and then there is nothing."""
        self._simulation.workload.done.append("-- check and repair of what the power cut left")
        with closing(self._inspect()) as inspected:
            report = inspected.check()
            if report.is_damaged:
                raise Lost(f"check finds damage: {[problem.text for problem in report.problems]}")
            before = self._num_silent_faults
            repair(inspected, report)
            self._expect_nothing(inspected, before)

    def mend_damage(self) -> None:
        """Pages are lost and rows are wrong while the drive is closed."""
        simulation = self._simulation
        try:
            simulation.store.flush()
            lbas, remaining = self._choose()
            simulation.store.close()  # which may move pages
        except OutOfSpace:
            simulation._power_off(simulation.store)
            simulation._use(simulation._open())
            simulation.settle()
            return
        simulation.oracle.promise(*simulation.oracle.sequences)
        with closing(self._inspect()) as inspected:
            pages = self._alone(inspected._drive.ftl.resolve(lbas))
        simulation.workload.done.append(f"-- damage to pages {pages.tolist()}; leaves {remaining}")
        for page in pages.tolist():
            simulation.media.flip_bit(page)
        inspected = self._inspect()
        with inspected.catalogue.transaction():
            inspected.catalogue._db.execute(WRONG_ROWS[self._random.integers(len(WRONG_ROWS))])
        inspected.look_again()
        before = self._num_silent_faults
        repair(inspected, inspected.check())
        self._end(inspected)
        with closing(self._inspect()) as inspected:
            self._expect_nothing(inspected, before)
        simulation._use(simulation._open())
        for name, num_tokens in remaining.items():
            state = simulation.oracle.sequences[name]
            found = simulation.store.sequence(name).num_tokens
            # a group that forks share is nobody's to append to, so all but one are cut before it
            if found not in (num_tokens, num_tokens - num_tokens % state.shape.group_tokens):
                raise Lost(f"repair keeps {found} tokens of {name!r}, where {num_tokens} are whole")
            state.truncate(found)
            state.promise()
        simulation.settle()

    def crowd_catalogue(self) -> None:
        """The catalogue full to its end, now and then on a drive that refuses to sync for a while: whatever is
        removed again, all is as before."""
        store = self._simulation.store
        sequences = store.sequences()
        if not sequences:
            return
        sequence, catalogue, added = sequences[0], store._catalogue, []
        self._simulation.workload.done.append("-- the catalogue is filled and emptied")
        refusal = NvmeStatusError(IoOpcode.FLUSH, Status.CAPACITY_EXCEEDED)
        chance = [0, 0.5, 1][self._random.integers(3)]
        flush = store._namespace.flush

        def flush_or_refuse() -> None:
            if self._random.random() < chance:
                raise refusal
            flush()

        with patch.object(store._namespace, "flush", flush_or_refuse):
            for number in range(CROWD):
                added.append(f"user.crowd{number}")
                value = bytes(int(self._random.integers(1, CROWD_BYTES)))
                try:
                    catalogue.set_attribute(sequence.id, added[-1], value)
                except (OutOfSpace, NvmeStatusError):
                    if self._random.random() < 0.1:
                        break
        try:
            for name in added:
                catalogue.remove_attribute(sequence.id, name)
        except OutOfSpace as error:
            raise Lost(f"nothing can be removed from a full catalogue: {error}") from error

    def _end(self, inspected: Inspection) -> None:
        """By closing, or by a power cut: what repair has done is durable."""
        media = self._simulation.media
        if self._random.random() < 0.5:
            inspected.close()
            return
        media.cut_after = -1
        with suppress(PowerCut, NvmeError):
            inspected.close()
        media.reboot()

    @property
    def _num_silent_faults(self) -> int:
        faults = self._simulation.media.faults
        return faults.lost_writes + faults.misdirected_writes

    def _expect_nothing(self, inspected: Inspection, num_silent_faults: int) -> None:
        """num_silent_faults: before repair wrote anything."""
        report = inspected.check()
        if self._simulation.media.lost_pages() or self._num_silent_faults > num_silent_faults:
            return
        if report.problems:
            raise Lost(f"repair leaves: {[problem.text for problem in report.problems]}")
        is_leaked = inspected._drive.ftl.resolve(np.arange(inspected.namespace.num_lbas)) >= 0
        is_leaked[: inspected.volume.first_data_lba] = False
        for first, count in inspected.catalogue.used_extents():
            is_leaked[first : first + count] = False
        if is_leaked.any():
            raise Lost(f"repair leaves {np.count_nonzero(is_leaked)} blocks that nothing names")

    def _choose(self) -> tuple[np.ndarray, dict[str, int]]:
        """LBAs on flash to damage, and how many tokens that leaves of sequences without parity."""
        store = self._simulation.store
        of_files = set(store._catalogue.files.used_extents())  # which stay lost until they are written anew
        extents = [extent for extent in store._catalogue.used_extents() if extent not in of_files]
        links = Counter((first, count) for _, _, _, first, count in store._catalogue.links())
        shared = [extent for extent, num_sharers in links.items() if num_sharers > 1]
        if shared and self._random.random() < 0.5:  # where one loss is several sequences'
            extents = shared
        lbas = np.concatenate([np.empty(0, np.int64)] + [np.arange(first, first + n) for first, n in extents])
        lbas = lbas[store._drive.ftl.resolve(lbas) >= 0]
        lbas = self._random.permutation(lbas)[: self._random.integers(1, PAGES_LOST + 1)]
        if self._simulation.schedule.geometry.parity:
            return lbas, {}
        self._simulation.expect_damage(lbas)
        return lbas, self._remaining(lbas)

    def _alone(self, pages: np.ndarray) -> np.ndarray:
        """One of each parity group, where there are such."""
        geometry = self._simulation.schedule.geometry
        if not geometry.parity:
            return pages
        return pages[np.unique(pages // geometry.num_dies, return_index=True)[1]]

    def _remaining(self, lbas: np.ndarray) -> dict[str, int]:
        found = {}
        for sequence in self._simulation.store.sequences():
            row, layout = sequence._row, sequence._layout
            keep = row.num_tokens
            if ((row.tail_lba <= lbas) & (lbas < row.tail_lba + row.tail_lbas)).any():
                keep = row.num_spilled
            for position, group in enumerate(sequence._groups):
                offsets = lbas - group.base_lba
                offsets = offsets[(offsets >= 0) & (offsets < group.num_lbas)]
                firsts = position * layout.geometry.group_tokens
                firsts = firsts + offsets % layout.pages_per_head * layout.tokens_per_page
                keep = min([keep, *firsts[firsts < row.num_spilled].tolist()])
            if keep < row.num_tokens:
                found[sequence.name] = keep
        return found
