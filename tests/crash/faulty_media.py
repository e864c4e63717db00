"""Memory flash that loses power: at a chosen operation, with what was not synced kept or lost at random."""

import numpy as np

from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media_memory import MemoryMedia
from spdk_glue import dma


class PowerCut(BaseException):
    """Raised by the operation that the power failed in, and by every one after it."""


class FaultyMedia(MemoryMedia):
    """Counts program, erase and sync; fails in number `cut_after`, which may be done in part.

    An unsynced page may vanish, lose its OOB, or keep its OOB over a torn payload. An unsynced erase may not
    have happened.
    """

    def __init__(self, geometry: Geometry, random: np.random.Generator):
        super().__init__(geometry)
        self.random = random
        self.cut_after: int | None = None
        self.operations = 0
        self._unsynced: list = []  # (pages) programmed or (superblock, old pages, old oob) erased, in order

    def _step(self) -> bool:
        """Whether this operation is the one that the power fails in. Raises PowerCut after it."""
        if self.cut_after is not None and self.operations > self.cut_after:
            raise PowerCut
        self.operations += 1
        return self.cut_after is not None and self.operations > self.cut_after

    def program(self, pages, addresses, oob):
        cut = self._step()
        if cut:
            done = int(self.random.integers(0, len(pages) + 1))
            pages, addresses, oob = pages[:done], addresses[:done], oob[:done]
        if len(pages):
            super().program(pages, addresses, oob)
            self._unsynced.append(("program", pages.copy()))
        if cut:
            raise PowerCut

    def erase(self, superblock):
        if self._step() and self.random.random() < 0.5:
            raise PowerCut
        size = self.geometry.pages_per_superblock
        span = slice(superblock * size, (superblock + 1) * size)
        self._unsynced.append(("erase", superblock, self.pages[span].copy(), self.oob[span].copy()))
        super().erase(superblock)
        if self.cut_after is not None and self.operations > self.cut_after:
            raise PowerCut

    def sync(self):
        if self._step() and self.random.random() < 0.5:
            raise PowerCut
        super().sync()
        self._unsynced.clear()
        if self.cut_after is not None and self.operations > self.cut_after:
            raise PowerCut

    def reboot(self) -> None:
        """What the flash holds once power is back."""
        size = self.geometry.pages_per_superblock
        for entry in reversed(self._unsynced):
            if entry[0] == "program":
                self._lose_some(entry[1])
            elif self.random.random() < 0.5:
                _, superblock, pages, oob = entry
                span = slice(superblock * size, (superblock + 1) * size)
                # an erase undone brings back the old pages, unless something was programmed since
                if not self.oob["magic"][span].any():
                    self.pages[span], self.oob[span] = pages, oob
        for superblock in range(self.geometry.num_superblocks):
            self.read_oob(superblock)  # what counts as programmed is what has OOB, as in a file
        self._unsynced.clear()
        self.cut_after = None
        self.operations = 0

    def _lose_some(self, pages: np.ndarray) -> None:
        fate = self.random.random(len(pages))
        for page in pages[fate < 0.25]:
            self.oob[page] = np.zeros((), PAGE_OOB)
        for page in pages[(fate >= 0.25) & (fate < 0.5)]:
            self.pages[page, int(self.random.integers(1, self.pages.shape[1])) :] = 0xA5
        for page in pages[(fate >= 0.5) & (fate < 0.6)]:
            self.oob[page]["lba"] ^= 1  # a torn OOB: its own checksum must catch it


def make_pages(values: list[int], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(buffer, addresses): a page per value, recognisable anywhere in it."""
    buffer = dma.allocate(len(values) * page_size)
    words = buffer.view("<u8").reshape(len(values), -1)
    words[:] = np.array(values, np.uint64)[:, None]
    return buffer, dma.page_addresses(buffer, page_size)
