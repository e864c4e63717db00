"""A zoned drive that loses power, with a volatile write cache.

What was done in a zone since the last flush is done in its order: a power cut keeps the first so many of these
steps, of each zone for itself, and of a write that is among the last kept perhaps the first blocks only. So a zone's
write pointer may come back lower than it was, and a reset or a finish may not have happened. Zones know nothing of
each other.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np

from ftl.media_nand import PowerCut
from spdk_glue.command import ZoneState
from tests.unit.spdk_glue.zoned_drive import ACTIVE, ZonedDrive


@dataclass
class _Unsynced:
    """Of one zone: what it was at the last flush, and what was done since; data for a write, else a name."""

    state: int
    pointer: int
    blocks: np.ndarray
    steps: list = field(default_factory=list)


class FragileZonedDrive(ZonedDrive):
    """Each write, reset, finish and flush counts; the power fails in the one after `cut_after` of them."""

    def __init__(self, random: np.random.Generator, **options):
        self.random = random
        self.cut_after: int | None = None
        self.operations = 0
        self.digest = 0  # of all operations, by which two runs are told apart
        self._unsynced: dict[int, _Unsynced] = {}
        super().__init__(**options)

    def note(self, requests) -> None:
        """Keep none: a long run has many."""

    def _step(self, what: bytes) -> bool:
        """Count an operation: whether the power fails in it."""
        if self.cut_after is not None and self.operations > self.cut_after:
            raise PowerCut
        self.operations += 1
        self.digest = zlib.crc32(what, self.digest)
        return self.cut_after is not None and self.operations > self.cut_after

    def _before(self, zone: int) -> _Unsynced:
        zone = int(zone)
        if zone not in self._unsynced:
            blocks = self.blocks[self.starts[zone] : self.starts[zone] + self.zone_lbas].copy()
            self._unsynced[zone] = _Unsynced(self.states[zone], self.pointers[zone], blocks)
        return self._unsynced[zone]

    def take(self, zone, data):
        cut = self._step(b"write %d" % self.pointers[zone])
        self._before(zone).steps.append(data.copy())
        super().take(zone, data)
        if cut:
            raise PowerCut

    def reset(self, zone):
        cut = self._step(b"reset %d" % zone)
        self._before(zone).steps.append("reset")
        super().reset(zone)
        if cut:
            raise PowerCut

    def finish(self, zone):
        cut = self._step(b"finish %d" % zone)
        self._before(zone).steps.append("finish")
        super().finish(zone)
        if cut:
            raise PowerCut

    def flush(self, requests):
        if self._step(b"flush"):
            for zone in self.random.permutation(list(self._unsynced))[
                : self.random.integers(len(self._unsynced) + 1)
            ]:
                del self._unsynced[int(zone)]
            raise PowerCut
        self._unsynced.clear()

    def reboot(self) -> None:
        """The power is back."""
        self.cut_after, self.operations = None, 0
        for zone, unsynced in self._unsynced.items():
            self._come_back(zone, unsynced)
        self._unsynced.clear()
        for zone in np.flatnonzero(np.isin(self.states, ACTIVE)):
            is_begun = self.pointers[zone] > self.starts[zone]
            self.states[zone] = ZoneState.CLOSED if is_begun else ZoneState.EMPTY

    def _come_back(self, zone: int, unsynced: _Unsynced) -> None:
        self.states[zone], self.pointers[zone] = unsynced.state, unsynced.pointer
        self.blocks[self.starts[zone] : self.starts[zone] + self.zone_lbas] = unsynced.blocks
        how = self.random.random()
        count = len(unsynced.steps)
        kept = count if how < 0.4 else 0 if how < 0.6 else int(self.random.integers(count + 1))
        for number, step in enumerate(unsynced.steps[:kept]):
            if isinstance(step, str):
                {"reset": super().reset, "finish": super().finish}[step](zone)
                continue
            if number == kept - 1 and self.random.random() < 0.5:
                num_blocks = len(step) // self.block_bytes
                step = step[: int(self.random.integers(num_blocks)) * self.block_bytes]
            self.states[zone] = ZoneState.CLOSED
            super().take(zone, step)
