"""What the translation layer costs: CPU time per page mapped, time per read beside the raw media, memory, and
how evenly it wears the flash."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ftl.collector import CollectorOptions
from ftl.geometry import Geometry
from ftl.media_file import FileMedia
from ftl.media_memory import CountingMedia
from ftl.state import FlashState
from ftl.translation import FlashTranslationLayer
from kvfs_bench.figures import Figure
from spdk_glue import dma

MAP_GOAL = 5e6  # pages/s per core
MAP_BATCH = 1 << 20  # the batch of the figure that counts; smaller and larger beside it
MAP_BATCHES = (256 << 10, 1 << 20, 8 << 20)
READ_BYTES = 1 << 20
READ_GOAL = 0.10
RAM_GOAL = 0.0012
RAM_CAPACITY = 64 << 30
RATED_CYCLES = 3000
WEAR_GOAL = 0.10


class NoMedia(CountingMedia):
    """Programs that do nothing: what is left is mapping, allocation and OOB records."""

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        pass


def map_pages_per_second(batch_bytes: int, rounds: int, num_superblocks: int = 512) -> float:
    """Pages/s of CPU time, best round: each fills a fresh drive, batches in turn over 8 streams."""
    geometry = Geometry(num_superblocks=num_superblocks, spare_percent=1)
    count = batch_bytes // geometry.page_size
    sources = np.zeros(count, np.uint64)
    best = 0.0
    for _ in range(rounds):
        ftl = FlashTranslationLayer.format(NoMedia(geometry))
        batches = np.arange(ftl.num_lbas // count * count).reshape(-1, count)
        start = time.thread_time()
        for number, lbas in enumerate(batches):
            ftl.write(lbas, sources, stream=number % 8)
        best = max(best, batches.size / (time.thread_time() - start))
    return best


def _map_figures(quick: bool) -> Iterator[Figure]:
    for batch_bytes in MAP_BATCHES:
        speed = map_pages_per_second(batch_bytes, 1 if quick else 7, 128 if quick else 512)
        size = f"{batch_bytes >> 10}k"
        yield Figure(f"ftl.map_pages_per_second.{size}", speed, "pages/s", goal=MAP_GOAL)
        if batch_bytes == MAP_BATCH:
            yield Figure("ftl.map_pages_per_second", speed, "pages/s", goal=MAP_GOAL)


def _read_figures(directory: Path, quick: bool) -> Iterator[Figure]:
    """Reads of one extent through the layer and of its pages from the media, in turn."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        media = FileMedia.create(Path(folder) / "drive", Geometry(num_superblocks=64))
        try:
            ftl = FlashTranslationLayer.format(media)
            buffer = dma.allocate(READ_BYTES)
            buffer[:] = np.random.default_rng(1).integers(0, 256, READ_BYTES, np.uint8)
            count = READ_BYTES // ftl.page_size
            addresses = dma.page_addresses(buffer, ftl.page_size)
            extents = np.arange(16 * count).reshape(16, count)
            for lbas in extents:
                ftl.write(lbas, addresses)
            ftl.flush()
            times: dict[str, list[float]] = {"raw": [], "ftl": []}
            for number in range(32 if quick else 2000):
                lbas = extents[number % 16]
                pages = ftl.resolve(lbas)
                calls = [("raw", lambda p=pages: media.read(p, addresses)),
                         ("ftl", lambda x=lbas: ftl.read(x, addresses))]  # fmt: skip
                for name, call in calls if number % 2 else calls[::-1]:
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
            ftl.close()
        finally:
            media.close()
    raw, through = (statistics.median(times[name]) for name in ("raw", "ftl"))
    yield Figure(
        "ftl.read_overhead", through / raw - 1, "fraction", rival="raw media",
        rival_value=raw * 1e6, ratio=through / raw, goal=READ_GOAL, goal_is_maximum=True,
    )  # fmt: skip


def _array_bytes(thing) -> int:
    """Bytes of the arrays that an object, or what it holds, owns."""
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(_array_bytes(value) for value in thing.values())
    return sum(_array_bytes(v) for v in vars(thing).values() if isinstance(v, (np.ndarray, dict)))


def _ram_figure() -> Figure:
    geometry = Geometry.for_capacity(RAM_CAPACITY)
    state = FlashState(CountingMedia(geometry))  # its records are never touched, so they take no memory
    for superblock in range(geometry.num_superblocks):
        state.checksums.begin(superblock)  # as many columns as it ever keeps
    used = sum(_array_bytes(part) for part in (state.mapping, state.checksums, state.superblocks))
    return Figure(
        "ftl.ram_fraction", used / geometry.capacity_bytes, "fraction", goal=RAM_GOAL, goal_is_maximum=True
    )


def wear(mean_cycles: float, pages_per_erase_block: int = 4) -> Iterator[Figure]:
    """Half of a full drive is written once, pages of the other half over and over."""
    geometry = Geometry(pages_per_erase_block=pages_per_erase_block, num_superblocks=64)
    ftl = FlashTranslationLayer.format(CountingMedia(geometry), CollectorOptions(rated_cycles=RATED_CYCLES))
    random, batch = np.random.default_rng(1), 64
    sources = np.zeros(ftl.num_lbas, np.uint64)
    ftl.write(np.arange(ftl.num_lbas), sources)
    while ftl.erase_counts().mean() < mean_cycles:
        for _ in range(64):
            ftl.write(random.integers(ftl.num_lbas // 2, ftl.num_lbas, batch), sources[:batch])
    counts, counters = ftl.erase_counts(), ftl.counters
    yield Figure(
        "wear.spread", float(counts.max() - counts.min()) / RATED_CYCLES, "fraction",
        goal=WEAR_GOAL, goal_is_maximum=True,
    )  # fmt: skip
    yield Figure("wear.mean_cycles", float(counts.mean()), "cycles")
    leveled = counters.wear_leveling_pages_written / counters.host_pages_written
    yield Figure("wear.leveling_writes", leveled, "fraction")


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """All figures. quick: small sizes, to see that it runs."""
    figures = [*_map_figures(quick), *_read_figures(directory, quick), _ram_figure()]
    return [*figures, *wear(30 if quick else 1000)]
