"""Flash in memory that behaves like NAND: it fails, wears, is disturbed by reads, and loses power.

All chance comes from one seeded generator, so a run is repeated exactly by its seed. Bit errors are those that
the drive's own error correction leaves; they are in the cells, so that reading again does not help, and an
erase ends them.

Power: programs, erases and marks since the last sync are only probably on the flash. Every program, erase and
sync counts, from 0; number `cut_after` is done in part or not at all, and PowerCut is raised by it and by all
after it until `reboot`, which decides what the flash holds:

    unsynced page     whole, gone, with a torn payload, or with a torn OOB record; each page by itself, so that
                      later ones may survive earlier ones
    unsynced erase    of each block: done, undone, or half-done (some pages are back); done where something
                      programmed since has survived
    unsynced mark     kept or forgotten
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import numpy as np

from ftl.direct_io.api import crc32c_pages
from ftl.errors import EraseFailed, ProgramFailed
from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media_memory import MemoryMedia
from ftl.nand_model import NandFaults, NandModel
from spdk_glue import dma

__all__ = ["NandFaults", "NandMedia", "NandModel", "PowerCut"]


class PowerCut(BaseException):
    """Raised by the operation that the power failed in, and by every one after it. No error handler that could
    still do something runs in a machine without power, so it is not an Exception."""


class NandMedia(MemoryMedia):
    """See FlashMedia; single-threaded. `cut_after` and `dead_dies` may be changed at any time."""

    def __init__(
        self,
        geometry: Geometry,
        random: np.random.Generator,
        model: NandModel | None = None,
        count_reads: bool = False,
    ):
        super().__init__(geometry, uuid=random.bytes(16))
        self.random = random
        self.model = model or NandModel()
        self.faults = NandFaults()
        self.dead_dies: set[int] = set(self.model.dead_dies)
        self.count_reads = count_reads  # whether reads are operations that the power may fail in
        self.cut_after: int | None = None
        self.operations = 0
        self._unsynced: list[Callable[[], None]] = []  # each makes one operation doubtful, oldest first
        shape = geometry.num_superblocks, geometry.num_planes
        self._reads = np.zeros(shape, np.int64)  # of each block since its erase
        self._rules.bad[:] = self._some(self.model.factory_bad_fraction, shape)
        self._life = self._draw_life(shape)

    def _some(self, rate, shape) -> np.ndarray:
        """bool: drawn true at a rate; where nothing can be, nothing is drawn."""
        return self.random.random(shape) < rate if np.any(rate) else np.zeros(shape, bool)

    # what fails. A block's life is counted in steps, one per page programmed and one for the erase.

    def _steps(self, cycles, page_in_block) -> np.ndarray:
        return cycles * (self.geometry.pages_per_erase_block + 1) + page_in_block

    def _draw_life(self, shape) -> np.ndarray:
        """int64: the step from which on each block fails for ever."""
        life = np.full(shape, np.iinfo(np.int64).max)
        grown = self._some(self.model.grown_bad_fraction, shape)
        life[grown] = self.random.integers(0, self._steps(self.model.rated_cycles, 0), np.count_nonzero(grown))
        return life

    def _is_dead(self, planes: np.ndarray) -> np.ndarray:
        if not self.dead_dies:
            return np.zeros(len(planes), bool)
        return np.isin(planes % self.geometry.num_dies, list(self.dead_dies))

    def _places(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(superblock, page_in_block, plane) of pages."""
        superblock, index = np.divmod(pages, self.geometry.pages_per_superblock)
        return superblock, *np.divmod(index, self.geometry.num_planes)

    def _fails_to_program(self, pages: np.ndarray) -> np.ndarray:
        """bool [n]."""
        superblock, row, plane = self._places(pages)
        cycles = self._erase_counts[superblock, plane]
        wear = self.model.wear_failure(cycles) / self.geometry.pages_per_erase_block
        failed = self._some(self.model.program_failure_rate + wear, len(pages))
        return failed | (self._steps(cycles, row) >= self._life[superblock, plane]) | self._is_dead(plane)

    def _fails_to_erase(self, superblock: int) -> np.ndarray:
        """bool [num_planes]."""
        cycles, planes = self._erase_counts[superblock], np.arange(self.geometry.num_planes)
        failed = self._some(self.model.erase_failure_rate + self.model.wear_failure(cycles), len(planes))
        at_life_end = self._steps(cycles, self.geometry.pages_per_erase_block) >= self._life[superblock]
        return failed | at_life_end | self._is_dead(planes)

    # power

    def _step(self, counts: bool = True) -> bool:
        """Count an operation: whether the power fails in it. Raises PowerCut if it has failed before."""
        if self.cut_after is not None and self.operations > self.cut_after:
            raise PowerCut
        self.operations += counts
        return self._power_failed()

    def _power_failed(self) -> bool:
        return self.cut_after is not None and self.operations > self.cut_after

    def reboot(self) -> None:
        """What the flash holds once power is back; operations count from zero again."""
        for make_doubtful in reversed(self._unsynced):
            make_doubtful()
        self._unsynced.clear()
        self.restart()
        self.faults.power_cuts += 1
        self.cut_after = None
        self.operations = 0

    def restart(self) -> None:
        """Another process opens the flash, and knows no more than what is there."""
        for superblock in range(self.geometry.num_superblocks):
            self._note_programmed(superblock)

    def _note_programmed(self, superblock: int) -> None:
        """What counts as programmed is what has OOB, as in a file."""
        self._rules.found(superblock, self._rows(self.oob, superblock)["magic"].reshape(-1) != 0)

    # the four verbs

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        if self._step(self.count_reads):
            raise PowerCut
        self._rules.check_range(pages)
        superblock, _, plane = self._places(pages)
        np.add.at(self._reads, (superblock, plane), 1)
        rate = self.model.bit_errors(self._erase_counts[superblock, plane], self._reads[superblock, plane])
        if rate.any():
            self._flip_bits(pages, rate)
        crc32c = super().read(pages, addresses)
        dead = self._is_dead(plane)
        if dead.any():
            self._fill_with_garbage(addresses[dead])
            crc32c[dead] = crc32c_pages(addresses[dead], self.geometry.page_size)
        return crc32c

    def _flip_bits(self, pages: np.ndarray, rate: np.ndarray) -> None:
        """Flip bits of programmed pages, in the cells; rate: float64 [n], per bit."""
        num_bits = self.geometry.page_size * 8
        flips = self.random.poisson(rate * num_bits) * (self.oob["magic"][pages] != 0)
        for page, count in zip(pages[flips > 0].tolist(), flips[flips > 0].tolist(), strict=True):
            bits = self.random.integers(0, num_bits, count)
            np.bitwise_xor.at(self.pages[page], bits >> 3, (1 << (bits & 7)).astype(np.uint8))
            self.faults.bits_flipped += count

    def _fill_with_garbage(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            memory = dma.view(int(address), self.geometry.page_size)
            memory[:] = np.frombuffer(self.random.bytes(len(memory)), np.uint8)

    def read_oob(self, superblock: int) -> np.ndarray:
        if self._step(self.count_reads):
            raise PowerCut
        self._rules.check_superblock(superblock)
        next_page = self._rules.next_page[superblock].copy()
        records = super().read_oob(superblock)
        self._rules.next_page[superblock] = (
            next_page  # what strayed was not programmed here, as the flash sees it
        )
        self._reads[superblock] += self.geometry.pages_per_erase_block
        return self._as_read(records, np.arange(len(records)) % self.geometry.num_planes)

    def read_oob_pages(self, pages: np.ndarray) -> np.ndarray:
        if self._step(self.count_reads):
            raise PowerCut
        records = super().read_oob_pages(pages)
        superblock, _, plane = self._places(pages)
        np.add.at(self._reads, (superblock, plane), 1)
        return self._as_read(records, plane)

    def _as_read(self, records: np.ndarray, planes: np.ndarray) -> np.ndarray:
        """PAGE_OOB [n] with garbage in place of those on dead dies."""
        dead = self._is_dead(planes)
        if dead.any():
            garbage = self.random.bytes(int(np.count_nonzero(dead)) * PAGE_OOB.itemsize)
            records[dead] = np.frombuffer(garbage, PAGE_OOB)
        return records

    def read_counts(self) -> np.ndarray:
        return self._reads.max(axis=1)

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        cut = self._step()
        if not cut:
            self._program(pages, addresses, oob)
            return
        done = int(self.random.integers(0, len(pages) + 1))
        with suppress(ProgramFailed):  # nobody is there to hear of it
            self._program(pages[:done], addresses[:done], oob[:done])
        raise PowerCut

    def _program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        self._check_writable("program")
        self._rules.program(pages)
        self._checksum(addresses, oob)
        failed = self._fails_to_program(pages)
        stored = self._stored_despite(failed, pages) if failed.any() else np.ones(len(pages), bool)
        targets = self._stray(pages, stored)
        self._store(targets[stored], addresses[stored], oob[stored])
        self.counters.add(pages_programmed=len(pages))
        self._unsynced.append(partial(self._doubt_pages, targets[stored]))
        if failed.any():
            self._fail_to_program(pages[failed])

    def _stored_despite(self, failed: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """bool [n]: the pages that a batch with failures still programs, the failed ones in some way."""
        superblock, _, plane = self._places(pages)
        first = int(np.argmax(failed))
        here = superblock == superblock[first]
        # the flash stops at the first superblock that fails: of its other blocks any page may be there
        stored = (np.arange(len(pages)) < first) | (here & (self.random.random(len(pages)) < 0.7))
        for position in np.flatnonzero(failed & here):
            behind = here & (plane == plane[position]) & (np.arange(len(pages)) > position)
            stored[behind] = False
            failed[behind] = False
        failed[~here] = False
        return stored

    def _fail_to_program(self, pages: np.ndarray) -> None:
        """Leave something undefined in the failed pages and raise ProgramFailed."""
        for page in pages.tolist():
            self._tear(page)
        superblock, _, plane = self._places(pages)
        planes = np.unique(plane)
        self.faults.program_failures += len(planes)
        raise ProgramFailed(int(superblock[0]), planes)

    def _stray(self, pages: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """Lose and misdirect writes: int64 [n], where each page goes; clears `stored` of lost ones."""
        targets = pages
        lost = stored & self._some(self.model.lost_write_rate, len(pages))
        stored &= ~lost
        astray = stored & self._some(self.model.misdirected_write_rate, len(pages))
        if astray.any():
            targets = pages.copy()
            for position in np.flatnonzero(astray).tolist():
                free = self._free_pages_of_block(int(pages[position]))
                if len(free):
                    targets[position] = self.random.choice(free)
                astray[position] = stored[position] = len(free) > 0
                lost[position] = not len(free)
        self.faults.lost_writes += int(np.count_nonzero(lost))
        self.faults.misdirected_writes += int(np.count_nonzero(astray))
        return targets

    def _free_pages_of_block(self, page: int) -> np.ndarray:
        """int64: pages of this page's block that nothing was programmed into."""
        superblock, _, plane = self._places(np.int64(page))
        rows = np.arange(self._rules.next_page[superblock, plane], self.geometry.pages_per_erase_block)
        pages = superblock * self.geometry.pages_per_superblock + rows * self.geometry.num_planes + plane
        return pages[self.oob["magic"][pages] == 0]

    def erase(self, superblock: int) -> None:
        cut = self._step()
        if cut and self.random.random() < 0.5:
            raise PowerCut
        failed = self._erase(superblock)
        if cut:
            raise PowerCut
        if failed.any():
            raise EraseFailed(superblock, np.flatnonzero(failed))

    def _erase(self, superblock: int) -> np.ndarray:
        """Erase: bool [num_planes], the good blocks that could not be."""
        self._check_writable("erase")
        good = self._rules.erasable(superblock)
        failed = good & self._fails_to_erase(superblock)
        oob, payload = self._rows(self.oob, superblock), self._rows(self.pages, superblock)
        before = oob.copy(), payload.copy()
        self._clear(superblock, good)
        if failed.any():  # some pages of a block that cannot be erased stay
            self._bring_back(superblock, *before, failed * self.random.random())
        self._erase_counts[superblock, good] += 1
        self._reads[superblock, good] = 0
        self._note_programmed(superblock)
        self.counters.add(blocks_erased=int(np.count_nonzero(good & ~failed)))
        self.faults.erase_failures += int(np.count_nonzero(failed))
        self._unsynced.append(partial(self._doubt_erase, superblock, good, *before))
        return failed

    def sync(self) -> None:
        cut = self._step()
        if cut and self.random.random() < 0.5:
            raise PowerCut
        super().sync()
        self._unsynced.clear()
        if cut:
            raise PowerCut

    def mark_bad(self, superblock: int, planes: np.ndarray) -> None:
        self._step(counts=False)
        before = self.bad_blocks()
        super().mark_bad(superblock, planes)
        new = np.flatnonzero(self._rules.bad[superblock] & ~before[superblock])
        self._unsynced.append(partial(self._doubt_mark, superblock, new))

    # what a power cut does to what was not synced

    def _doubt_pages(self, pages: np.ndarray) -> None:
        fate = self.random.random(len(pages))
        self.oob[pages[fate < 0.25]] = np.zeros((), PAGE_OOB)
        for page in pages[(fate >= 0.25) & (fate < 0.6)].tolist():
            self._tear(page)

    def _tear(self, page: int) -> None:
        """Leave the payload or the OOB record of a page half-programmed."""
        torn = self.pages[page] if self.random.random() < 0.7 else self.oob[page : page + 1].view(np.uint8)
        torn[int(self.random.integers(0, len(torn))) :] = self.random.choice(
            np.array([0, 0xA5, 0xFF], np.uint8)
        )

    def _doubt_erase(self, superblock: int, planes: np.ndarray, oob: np.ndarray, payload: np.ndarray) -> None:
        """oob, payload: [page_in_block, plane, ...] before the erase of these planes, bool [num_planes]."""
        survived = (self._rows(self.oob, superblock)["magic"] != 0).any(axis=0)
        share = self.random.choice([0.0, 0.5, 1.0], len(planes), p=[0.5, 0.25, 0.25])
        self._bring_back(superblock, oob, payload, share * (planes & ~survived))

    def _bring_back(self, superblock: int, oob, payload, share: np.ndarray) -> None:
        """Undo an erase for a share, float64 [num_planes], of the pages of each block."""
        back = self.random.random(oob.shape) < share
        self._rows(self.oob, superblock)[back] = oob[back]
        self._rows(self.pages, superblock)[back] = payload[back]

    def _doubt_mark(self, superblock: int, planes: np.ndarray) -> None:
        if self.random.random() < 0.5:
            self._rules.bad[superblock, planes] = False
