"""A superblock being written: which of its pages come next.

Pages are taken row by row (a row is a page on each plane). Bad erase blocks are passed over. With parity, each
row keeps back a page for every plane of a die: see parity.py.
"""

import numpy as np

from ftl.geometry import Geometry
from ftl.page_chain import PageChain
from ftl.parity import ParityRows


class OpenSuperblock:
    """Made when a superblock is opened, or found part-filled by recovery (`fill` pages into it)."""

    def __init__(
        self,
        superblock: int,
        geometry: Geometry,
        bad_planes: np.ndarray,
        fill: int,
        with_parity: bool,
        stream: int = 0,
    ):
        self.superblock = superblock
        self.stream = stream  # that writes here now
        self.is_busy = False  # pages of it are being programmed
        self.last_used = 0
        self.has_data = fill > 0
        self._geometry, self._with_parity = geometry, with_parity
        self._first_page = superblock * geometry.pages_per_superblock
        self._begin(bad_planes, fill)

    def _begin(self, bad_planes: np.ndarray, fill: int) -> None:
        geometry = self._geometry
        usable = np.ones((geometry.pages_per_erase_block, geometry.num_planes), bool)
        usable[:, bad_planes] = False
        self.parity: ParityRows | None = None
        self.chain = PageChain()
        if self._with_parity:
            self.parity = ParityRows(geometry, bad_planes)
            usable &= ~self.parity.is_parity.reshape(usable.shape)
            # the sums over a row that was begun before are not known: it goes on with the next
            fill = -(-fill // geometry.num_planes) * geometry.num_planes
        self._order = np.flatnonzero(usable)
        self._position = int(np.searchsorted(self._order, fill))

    def restart(self, bad_planes: np.ndarray) -> None:
        """Go on behind what was tried, without the erase blocks that failed."""
        tried = int(self._order[self._position - 1]) + 1
        self._begin(bad_planes, -(-tried // self._geometry.num_planes) * self._geometry.num_planes)

    def abandon(self) -> None:
        """Nothing more is written here."""
        self._position = len(self._order)

    @property
    def num_left(self) -> int:
        """Pages for data that are still to be written."""
        return len(self._order) - self._position

    def take(self, count: int) -> np.ndarray:
        """The next `count` pages or as many as there are, int64 physical pages."""
        taken = self._order[self._position : self._position + count]
        self._position += len(taken)
        return self._first_page + taken

    def skip_row(self) -> int:
        """Leave the rest of a row that was begun; how many pages that is."""
        if self._position == 0 or self.num_left == 0:
            return 0
        row = self._order[self._position - 1] // self.parity.num_planes
        position = int(np.searchsorted(self._order, (row + 1) * self.parity.num_planes))
        skipped, self._position = position - self._position, position
        return skipped
