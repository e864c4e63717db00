"""Sequences that come and go on a drive kept at one fullness: the load of a KV cache, without its payload.

Several writers append to one sequence each, a chunk at a time in random turns. When the drive is at its
fullness, a finished sequence dies and all its extents are deallocated. The same seed gives the same trace on
any translation layer.
"""

from dataclasses import dataclass, field

import numpy as np

from ftl.translation import FlashTranslationLayer
from kvfs.allocator import Allocator
from kvfs.placement import Placement, PlacementPolicy

NUM_WRITERS = 32
DEATHS = ("random", "skewed", "fifo", "predicted")
HOT_SHARE, HOT_WEIGHT = 0.8, 10.0  # skewed: so many of the sequences die so much sooner
PREDICTION_ERROR = 0.05  # standard deviation of the logarithm of a predicted lifetime
CHUNKS_PER_UNIT = 32  # written at a time: 512 KiB of a unit of 16 MiB
FIRST_ID = 4  # as in kvfs: identifiers below are for metadata, tails and files
ONE_STREAM = Placement(0, 0, 0)


@dataclass
class LiveSequence:
    identifier: int
    num_pages: int
    weight: float  # how likely it dies next
    death: float  # when it dies, in pages written; what the policy is told is near it
    placement: Placement
    pages_written: int = 0
    extents: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class TraceOptions:
    """mean_units: mean size of a sequence in reclaim units; sizes are even from a quarter of it on
    by_lifetime: False has everything in one stream, which is what a page-mapped drive does
    sizes_known: whether a sequence's size is known when it begins, as that of a finished prefill is
    """

    fullness: float
    deaths: str
    mean_units: float = 4.0
    by_lifetime: bool = True
    sizes_known: bool = True
    seed: int = 1


class ChurnTrace:
    """Drives one translation layer. `run` goes on where it ended."""

    def __init__(self, ftl: FlashTranslationLayer, options: TraceOptions):
        self._ftl, self._options = ftl, options
        self._random = np.random.default_rng(options.seed)
        unit = ftl.geometry.pages_per_superblock
        self._live_pages_max = int(options.fullness * ftl.geometry.num_pages)
        if self._live_pages_max > ftl.num_lbas:
            raise ValueError(f"fullness: {options.fullness} of the flash is more than is offered as blocks")
        self._mean_pages = options.mean_units * unit
        self._chunk = max(1, min(unit // CHUNKS_PER_UNIT, int(self._mean_pages) // 16))
        self._allocator = Allocator(0, ftl.num_lbas - ftl.num_lbas % self._chunk, [])
        self._policy = PlacementPolicy(unit, FIRST_ID, 2.0 * self._live_pages_max)
        self._sources = np.zeros(self._chunk, np.uint64)
        self._finished: list[LiveSequence] = []
        self._live_pages = self._clock = self._born = 0
        self._writers = [self._birth() for _ in range(NUM_WRITERS)]

    def run(self, num_pages: int) -> None:
        """Write so many pages."""
        stop = self._clock + num_pages
        while self._clock < stop:
            for writer in self._random.integers(0, NUM_WRITERS, 256).tolist():
                self._append(writer)

    def _birth(self) -> LiveSequence:
        size = self._mean_pages * self._random.uniform(0.25, 1.75)
        num_pages = max(1, round(size))
        weight = HOT_WEIGHT if self._random.random() < HOT_SHARE else 1.0
        lifetime = self._random.exponential(self._live_pages_max)
        error = np.exp(PREDICTION_ERROR * self._random.standard_normal())
        self._born += 1
        placement = ONE_STREAM
        if self._options.by_lifetime:
            predictable = self._options.deaths == "predicted"
            placement = self._policy.place(
                self._born,
                num_pages if self._options.sizes_known else None,
                self._clock,
                self._clock + lifetime * error if predictable else None,
            )
        return LiveSequence(self._born, num_pages, weight, self._clock + lifetime, placement)

    def _append(self, writer: int) -> None:
        sequence = self._writers[writer]
        count = min(self._chunk, sequence.num_pages - sequence.pages_written)
        while self._live_pages + count > self._live_pages_max:
            self._kill()
        first = self._allocator.allocate(self._chunk)
        lbas = np.arange(first, first + count)
        stream = sequence.placement.identifier(sequence.pages_written)
        self._ftl.write(lbas, self._sources[:count], stream=stream)
        sequence.extents.append((first, self._chunk))
        sequence.pages_written += count
        self._live_pages += count
        self._clock += count
        if sequence.pages_written == sequence.num_pages:
            self._ftl.flush()
            self._finished.append(sequence)
            self._writers[writer] = self._birth()

    def _kill(self) -> None:
        sequence = self._finished.pop(self._next_to_die())
        self._ftl.deallocate(np.array(_merged(sequence.extents)))
        for first, count in sequence.extents:
            self._allocator.give_back(first, count)
        self._live_pages -= sequence.pages_written

    def _next_to_die(self) -> int:
        deaths, finished = self._options.deaths, self._finished
        if deaths == "fifo":
            return 0
        if deaths == "predicted":
            return int(np.argmin([sequence.death for sequence in finished]))
        while True:
            chosen = int(self._random.integers(len(finished)))
            if deaths == "random" or self._random.random() * HOT_WEIGHT < finished[chosen].weight:
                return chosen


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents in order, neighbours joined: the ranges that a store gives back."""
    ranges: list[tuple[int, int]] = []
    for first, count in sorted(extents):
        if ranges and sum(ranges[-1]) == first:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + count)
        else:
            ranges.append((first, count))
    return ranges
