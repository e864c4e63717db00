"""The flash under a simulation: NAND that misbehaves, a digest of what is done to it, and second chances."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ftl.geometry import Geometry
from ftl.layout import PREVIOUS_PAGE, PageKind
from ftl.media_nand import NandMedia, NandModel, PowerCut
from ftl.oob import holds

DYING_DIE = 1

__all__ = ["PowerCut", "SimulatedMedia"]


class SimulatedMedia(NandMedia):
    """on_operation is called with each program, erase and sync before it is done, after_operation after it."""

    def __init__(self, geometry: Geometry, random: np.random.Generator, model: NandModel | None = None):
        super().__init__(geometry, random, model)
        self.digest = 0  # of every operation and what it touched: by it two runs are told apart
        self.on_operation: Callable[[Callable[[], None]], None] | None = None
        self.after_operation: Callable[[], None] | None = None
        # of failed programs since the last boot: superblock and plane; superblocks that held something before
        self.failed: set[tuple[int, int]] = set()
        self.failed_with_data: set[int] = set()
        self.operations_before = 0  # of earlier boots
        self._gone: dict[int, np.void] = {}  # by page: the OOB of writes that were lost or went elsewhere
        self._erased: dict[int, np.void] = {}  # of those, what an erase took that a power cut may undo
        self.forgotten: list[np.void] = []  # what openings went over, no page telling of it
        self.dies_in: int | None = None  # operations after which a die is dead
        self._record: np.ndarray | None = None  # being programmed

    @property
    def all_operations(self) -> int:
        return self.operations_before + self.operations

    @property
    def power_failed(self) -> bool:
        return self._power_failed()

    def cut_in(self, num_operations: int) -> None:
        """Fail in the operation after `num_operations` more."""
        self.cut_after = self.operations + num_operations

    def reboot(self) -> None:
        self._gone |= self._erased
        self._erased.clear()
        self.operations_before += self.operations
        self.failed.clear()
        self.failed_with_data.clear()
        super().reboot()

    def program(self, pages, addresses, oob, stream=0):
        self._operate(b"program" + pages.tobytes(), lambda: NandMedia.program(self, pages, addresses, oob))

    def erase(self, superblock):
        self._operate(b"erase %d" % superblock, lambda: NandMedia.erase(self, superblock))

    def sync(self):
        self._operate(b"sync", self._sync)

    def _sync(self) -> None:
        super().sync()
        self._erased.clear()

    def _program(self, pages, addresses, oob):
        self._record = oob
        super()._program(pages, addresses, oob)

    def _stray(self, pages, stored):
        before = stored.copy()
        targets = super()._stray(pages, stored)
        for position in np.flatnonzero(before & (~stored | (targets != pages))).tolist():
            self._gone[int(pages[position])] = self._record[position].copy()
        gone = self.gone
        self._go_over({page: gone[page] for page in targets[stored].tolist() if page in gone})
        return targets

    def _erase(self, superblock):
        size = self.geometry.pages_per_superblock
        self._go_over({page: lost for page, lost in self.lost_pages().items() if page // size == superblock})
        here = {page: lost for page, lost in self._gone.items() if page // size == superblock}
        self._gone = {page: lost for page, lost in self._gone.items() if page not in here}
        self._erased |= here
        self.failed_with_data.discard(superblock)
        return super()._erase(superblock)

    def _go_over(self, lost: dict[int, np.void]) -> None:
        """An opening, which cannot know of what no page tells, is about to erase or to program there."""
        if self.on_operation is None:
            self.forgotten += [record for page, record in lost.items() if not self._is_told(page, record)]

    @property
    def gone(self) -> dict[int, np.void]:
        """By page, the OOB of writes that were lost or went elsewhere, where nothing else is now."""
        return {page: lost for page, lost in self._gone.items() if not holds(self.oob[page : page + 1])[0]}

    # what the faults took: the truth that oracles excuse losses by

    def are_there(self, pages: np.ndarray) -> np.ndarray:
        """bool: pages that can be read without the help of parity."""
        return holds(self.oob[pages]) & ~self._is_dead(pages % self.geometry.num_planes)

    def lost_pages(self) -> dict[int, np.void]:
        """By page, the OOB of what was programmed and may be an error: it cannot be read, nor, with parity, can
        another page of its group."""
        pages = np.arange(len(self.oob))
        dead = pages[self._is_dead(pages % self.geometry.num_planes) & (self.oob["magic"] != 0)]
        lost = {**{page: self.oob[page].copy() for page in dead.tolist()}, **self.gone}
        if not self.geometry.parity:
            return lost
        groups = Counter(page // self.geometry.num_dies for page in lost)
        return {page: record for page, record in lost.items() if groups[page // self.geometry.num_dies] > 1}

    def untold_lbas(self) -> set[int] | None:
        """LBAs of which an older version may show, since no page says what the newest was; None for all."""
        lost = self.lost_pages()
        if any(record["kind"] != PageKind.DATA for record in [*lost.values(), *self.forgotten]):
            return None  # what was deallocated may be back
        untold = [record for page, record in lost.items() if not self._is_told(page, record)]
        return {int(record["lba"]) for record in [*untold, *self.forgotten]}

    def _is_told(self, page: int, lost: np.void) -> bool:
        """Whether the page behind says what a page was: see ftl/page_chain.py."""
        size = self.geometry.pages_per_superblock
        if lost["kind"] != PageKind.DATA or self._rules.bad[page // size].any():
            return False  # of others no page tells, and here it may have been refused
        behind = np.arange(page + 1, (page // size + 1) * size)
        behind = behind[self.are_there(behind)]
        if not len(behind):
            return False
        record, oob = self.oob[behind[0]], self.oob[self.are_there(np.arange(len(self.oob)))]
        previous = record.copy().reshape(1).view(PREVIOUS_PAGE)[0]
        durable = oob["durable_program_number"][oob["session"] == record["session"]].max()
        return bool(previous["lba_plus_1"] == lost["lba"] + 1 and lost["program_number"] <= durable)

    def _fail_to_program(self, pages):
        superblocks, _, planes = self._places(pages)
        self.failed.update(zip(superblocks.tolist(), planes.tolist(), strict=True))
        size = self.geometry.pages_per_superblock
        here = self.oob[superblocks[0] * size :][:size]
        # a bad block keeps what it had
        held = (here["magic"] != 0) & ~np.tile(
            self._rules.bad[superblocks[0]], self.geometry.pages_per_erase_block
        )
        if (held & (here["program_number"] < self._record["program_number"].min())).any():
            self.failed_with_data.add(int(superblocks[0]))
        super()._fail_to_program(pages)

    def _operate(self, what: bytes, operation: Callable[[], None]) -> None:
        self.digest = zlib.crc32(what, self.digest)
        # not in an opening: until it has come through, what a power cut left without parity has that fault
        in_workload = self.on_operation is not None or self.dies_in == 0
        if self.dies_in is not None and in_workload and self.all_operations >= self.dies_in:
            self.dead_dies = {DYING_DIE}
        if self.on_operation is not None and not self.power_failed:
            self.on_operation(operation)
        operation()
        if self.after_operation is not None:
            self.after_operation()

    @contextmanager
    def what_if(self) -> Iterator[None]:
        """Whatever happens to the flash inside has not happened afterwards."""
        arrays = [self.pages, self.oob, self._rules.next_page, self._rules.bad, self._erase_counts, self._reads]
        before = [array.copy() for array in arrays]
        failed = self.failed.copy(), self.failed_with_data.copy()
        plain = self.on_operation, self.cut_after, self.operations, self.operations_before, list(self._unsynced)
        gone, erased, forgotten = dict(self._gone), dict(self._erased), list(self.forgotten)
        dead_dies = set(self.dead_dies)
        self.on_operation, after_operation, self.after_operation = None, self.after_operation, None
        try:
            yield
        finally:
            for array, old in zip(arrays, before, strict=True):
                array[...] = old
            self.on_operation, self.cut_after, self.operations, self.operations_before, self._unsynced = plain
            self._gone, self._erased, self.forgotten, self.dead_dies = gone, erased, forgotten, dead_dies
            self.after_operation = after_operation
            self.failed, self.failed_with_data = failed

    def flip_bit(self, page: int) -> None:
        """Flip one bit of a page's payload, always the same one: a second call mends it."""
        byte = page * 2654435761 % self.geometry.page_size
        self.pages[page, byte] ^= 1 << page % 8
