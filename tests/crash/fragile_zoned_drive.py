"""A zoned drive that loses power, with a volatile write cache.

What was done in a zone since the last flush is done in its order: a power cut keeps the first so many of
these steps, of each zone for itself, and of a write that is the last one kept perhaps the first blocks only.
So a zone may come back written less far than it was, and a reset or a finish may not have happened. Zones
know nothing of each other.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ftl.media_nand import PowerCut
from spdk_glue.command import ZoneState
from tests.unit.spdk_glue.zoned_drive import ACTIVE, ZonedDrive


@dataclass
class _Unsynced:
    """Of one zone: what it was at the last flush, and what was done since: a write's data, or a name."""

    state: int
    pointer: int
    blocks: np.ndarray
    steps: list[np.ndarray | str] = field(default_factory=list)


class FragileZonedDrive(ZonedDrive):
    """Each write, reset, finish and flush counts; the power fails in the one after `cut_after` of them.

    on_operation: called before each, with what does it
    """

    def __init__(self, random: np.random.Generator, **options):
        super().__init__(**options)
        self.random = random
        self.cut_after: int | None = None
        self.operations = 0
        self.digest = 0  # of all operations, by which two runs are told apart
        self.on_operation: Callable[[Callable[[], None]], None] | None = None
        self._unsynced: dict[int, _Unsynced] = {}

    def note(self, requests) -> None:
        """Keep none: a long run has many."""

    def cut_in(self, num_operations: int) -> None:
        """Fail in the operation after `num_operations` more."""
        self.cut_after = self.operations + num_operations

    # operations

    def take(self, zone, data):
        self._operate(b"write %d" % self.pointers[zone], partial(self._do, int(zone), data.copy()))

    def reset(self, zone):
        self._operate(b"reset %d" % zone, partial(self._do, int(zone), "reset"))

    def finish(self, zone):
        self._operate(b"finish %d" % zone, partial(self._do, int(zone), "finish"))

    def flush(self, requests):
        self._operate(b"flush", self._unsynced.clear)

    def _operate(self, what: bytes, operation: Callable[[], None]) -> None:
        if self._has_failed():
            raise PowerCut
        if self.on_operation is not None:
            self.on_operation(operation)
        self.operations += 1
        self.digest = zlib.crc32(what, self.digest)
        if not self._has_failed() or what != b"flush":  # a write may be done; a flush was not confirmed
            operation()
        if self._has_failed():
            raise PowerCut

    def _has_failed(self) -> bool:
        return self.cut_after is not None and self.operations > self.cut_after

    def _do(self, zone: int, step: np.ndarray | str) -> None:
        if zone not in self._unsynced:
            blocks = self.blocks[self._of(zone)].copy()
            self._unsynced[zone] = _Unsynced(self.states[zone], self.pointers[zone], blocks)
        self._unsynced[zone].steps.append(step)
        self._apply(zone, step)

    def _apply(self, zone: int, step: np.ndarray | str) -> None:
        if isinstance(step, str):
            {"reset": super().reset, "finish": super().finish}[step](zone)
        else:
            super().take(zone, step)

    def _of(self, zone: int) -> slice:
        return slice(self.starts[zone], self.starts[zone] + self.zone_lbas)

    # ends

    def restart(self) -> None:
        """The host is gone and comes back; the drive did not notice."""
        self.cut_after, self.on_operation = None, None

    def reboot(self) -> None:
        """The power is back."""
        self.restart()
        for zone, unsynced in self._unsynced.items():
            self._come_back(zone, unsynced)
        self._unsynced.clear()
        for zone in np.flatnonzero(np.isin(self.states, ACTIVE)):
            is_begun = self.pointers[zone] > self.starts[zone]
            self.states[zone] = ZoneState.CLOSED if is_begun else ZoneState.EMPTY

    def _come_back(self, zone: int, unsynced: _Unsynced) -> None:
        is_worn = self.states[zone] == ZoneState.READ_ONLY
        self.states[zone], self.pointers[zone] = unsynced.state, unsynced.pointer
        self.blocks[self._of(zone)] = unsynced.blocks
        num_kept = self.random.choice([0, len(unsynced.steps), self.random.integers(len(unsynced.steps) + 1)])
        kept = unsynced.steps[:num_kept]
        if kept and not isinstance(kept[-1], str) and self.random.random() < 0.5:
            num_blocks = len(kept[-1]) // self.block_bytes
            kept[-1] = kept[-1][: int(self.random.integers(num_blocks)) * self.block_bytes]
        for step in kept:
            self.states[zone] = ZoneState.CLOSED
            self._apply(zone, step)
        if is_worn:
            self.states[zone] = ZoneState.READ_ONLY

    @contextmanager
    def what_if(self) -> Iterator[None]:
        """Whatever happens to the drive inside has not happened afterwards."""
        arrays = [self.blocks, self.states, self.pointers]
        before = [array.copy() for array in arrays]
        plain = self.cut_after, self.operations, self.digest, deepcopy(self._unsynced), self.on_operation
        self.cut_after = self.on_operation = None
        try:
            yield
        finally:
            for array, old in zip(arrays, before, strict=True):
                array[...] = old
            self.cut_after, self.operations, self.digest, unsynced, self.on_operation = plain
            self._unsynced.clear()
            self._unsynced.update(unsynced)  # the operation under way has this very dictionary
