"""How long a drive's flash takes for pages, on the FTL's virtual clock: dies, channels and the path behind
them.

Pages lie as the FTL puts them: what was written together is in one superblock, stripe by stripe. Rates are
those of long runs; the latency of the first page is apart.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ftl.geometry import Geometry
from ftl.virtual_clock import NandTiming, VirtualClock
from machine_model.machine import Drive

PAGES = 1 << 15  # of a run: many stripes of any drive
DENSITIES = 16  # scattered pages are timed at multiples of this part of all


@dataclass(frozen=True)
class FlashTime:
    """Seconds. page: each of a long run in order; first: until the first is there, beside that"""

    page: float
    first: float


def _shape(drive: Drive) -> tuple[Geometry, NandTiming]:
    planes = drive.channels * drive.dies_per_channel * drive.planes_per_die
    pages_per_block = 64
    superblocks = max(8, -(-4 * PAGES // (planes * pages_per_block)))
    return drive.geometry(superblocks, pages_per_block), drive.timing()


@lru_cache(maxsize=256)
def _read(geometry: Geometry, timing: NandTiming, density: int) -> FlashTime:
    """Of pages chosen at random, `density` in DENSITIES of all, read in the order in which they lie."""
    random = np.random.default_rng(1)
    all_pages = np.arange(geometry.num_pages, dtype=np.int64)
    if density < DENSITIES:
        all_pages = all_pages[random.random(len(all_pages)) < density / DENSITIES]
    count = min(PAGES, len(all_pages) // 2)
    short, long = (_clock(geometry, timing).read(all_pages[:size])[1] for size in (count, 2 * count))
    page = (long - short) / count * 1e-9
    return FlashTime(page, max(0.0, short * 1e-9 - count * page))


@lru_cache(maxsize=64)
def _program(geometry: Geometry, timing: NandTiming) -> FlashTime:
    pages = np.arange(2 * PAGES, dtype=np.int64)
    clocks = _clock(geometry, timing), _clock(geometry, timing)
    short, long = (
        clock.program(pages[:size])[1] for clock, size in zip(clocks, (PAGES, 2 * PAGES), strict=True)
    )
    page = (long - short) / PAGES * 1e-9
    return FlashTime(page, max(0.0, short * 1e-9 - PAGES * page))


def _clock(geometry: Geometry, timing: NandTiming) -> VirtualClock:
    return VirtualClock(geometry, timing)


@lru_cache(maxsize=1024)
def read_time(drive: Drive, share: float = 1.0) -> FlashTime:
    """Of pages that are this share of those among which they lie."""
    density = max(1, min(DENSITIES, round(share * DENSITIES)))
    return _read(*_shape(drive), density)


@lru_cache(maxsize=1024)
def program_time(drive: Drive) -> FlashTime:
    return _program(*_shape(drive))
