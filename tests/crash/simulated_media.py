"""The flash under a simulation: NAND that misbehaves, a digest of what is done to it, and second chances."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ftl.geometry import Geometry
from ftl.media_nand import NandMedia, NandModel, PowerCut

__all__ = ["PowerCut", "SimulatedMedia"]


class SimulatedMedia(NandMedia):
    """on_operation is called with each program, erase and sync before it is done, after_operation after it."""

    def __init__(self, geometry: Geometry, random: np.random.Generator, model: NandModel | None = None):
        super().__init__(geometry, random, model)
        self.digest = 0  # of every operation and what it touched: by it two runs are told apart
        self.on_operation: Callable[[Callable[[], None]], None] | None = None
        self.after_operation: Callable[[], None] | None = None
        self.failed: set[tuple[int, int]] = set()  # superblock and plane of failed programs since the last boot
        self.operations_before = 0  # of earlier boots

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
        self.operations_before += self.operations
        self.failed.clear()
        super().reboot()

    def program(self, pages, addresses, oob):
        self._operate(b"program" + pages.tobytes(), lambda: NandMedia.program(self, pages, addresses, oob))

    def erase(self, superblock):
        self._operate(b"erase %d" % superblock, lambda: NandMedia.erase(self, superblock))

    def sync(self):
        self._operate(b"sync", lambda: NandMedia.sync(self))

    def _fail_to_program(self, pages):
        superblocks, _, planes = self._places(pages)
        self.failed.update(zip(superblocks.tolist(), planes.tolist(), strict=True))
        super()._fail_to_program(pages)

    def _operate(self, what: bytes, operation: Callable[[], None]) -> None:
        self.digest = zlib.crc32(what, self.digest)
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
        failed = self.failed.copy()
        plain = self.on_operation, self.cut_after, self.operations, self.operations_before, list(self._unsynced)
        self.on_operation, after_operation, self.after_operation = None, self.after_operation, None
        try:
            yield
        finally:
            for array, old in zip(arrays, before, strict=True):
                array[...] = old
            self.on_operation, self.cut_after, self.operations, self.operations_before, self._unsynced = plain
            self.after_operation = after_operation
            self.failed = failed

    def flip_bit(self, page: int) -> None:
        """Flip one bit of a page's payload, always the same one: a second call mends it."""
        byte = page * 2654435761 % self.geometry.page_size
        self.pages[page, byte] ^= 1 << page % 8
