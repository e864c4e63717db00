"""What a compressed command takes: two layers of the planned geometry, sealed and read as in decoding."""

import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np

import kvfs
from kvfs.layout import KvGeometry
from kvfs_bench.planner.probe_drive import ProbeSize, add_model, random_rows, stores_of

NUM_LAYERS = 2
NUM_QUERIES = 31
REPEATS = 3
# of one few units are refined, of the other many: so both kinds of pages have their price
COMPRESSIONS = (8, 4)


@dataclass(frozen=True)
class SketchCommand:
    """An attend call. kernel: seconds of all workers together; from_flash: of both kinds of bytes"""

    attend: float
    kernel: float
    index_bytes: int
    refined_bytes: int
    from_flash: int

    @property
    def refined_from_flash(self) -> int:
        """Index pages are kept before refinements are."""
        return min(self.from_flash, self.refined_bytes)


class SketchProbe:
    """`batch` sequences beside a ProbeDrive's, of as many tokens."""

    def __init__(self, store, geometry: KvGeometry, size: ProbeSize, batch: int):
        self._store, self._geometry = store, geometry
        model = add_model(store, "probe-sketch", geometry, NUM_LAYERS)
        self._sequences = [store.create_sequence(model, f"probe-sketch-{i}") for i in range(batch)]
        rows = random_rows(geometry, size.num_tokens)
        for layer in range(NUM_LAYERS):
            for sequence in self._sequences:
                sequence.append(layer, *rows)
        store.flush()
        for sequence in self._sequences:
            sequence.seal("sketch")
        shape = (batch, 1, geometry.num_query_heads, geometry.head_dim)
        # each command asks for something else, or would find in the cache what the last one has chosen
        self._queries = itertools.cycle(
            np.random.default_rng(2).standard_normal((NUM_QUERIES, *shape)).astype(np.float16)
        )
        self.commands()  # compiles

    def commands(self) -> tuple[list[SketchCommand], list[SketchCommand]]:
        """(cold ones, others with what these have left in the cache): each compression on each layer."""
        cold, kept = [], []
        for layer, compression in itertools.product(range(NUM_LAYERS), COMPRESSIONS):
            for store in stores_of(self._store):
                store._drive.cache.clear()
            cold.append(self._command(layer, compression, next(self._queries)))
            kept += [self._command(layer, compression, next(self._queries)) for _ in range(REPEATS)]
        return cold, kept

    def _command(self, layer: int, compression: int, queries: np.ndarray) -> SketchCommand:
        counts, before = kvfs.PageCounts(), self._kernel_ns()
        begun = time.perf_counter()
        self._store.attend(layer, queries, self._sequences, compression=compression, counts=counts)
        seconds = time.perf_counter() - begun
        page_size = stores_of(self._store)[0]._drive.ftl.page_size
        return SketchCommand(
            seconds,
            (self._kernel_ns() - before) / 1e9,
            counts.index_pages * page_size,
            counts.chosen_pages * page_size,
            counts.pages_from_flash * page_size,
        )

    def _kernel_ns(self) -> int:
        return sum(store.counters()["attention"]["kernel_ns"] for store in stores_of(self._store))

    def close(self) -> None:
        for sequence in self._sequences:
            self._store.delete_sequence(sequence.name)


def kernel_prices(found: list[SketchCommand]) -> tuple[float, float]:
    """Thread seconds of (an index byte, a refined byte): two prices that explain all commands best."""
    pages = np.array([(one.index_bytes, one.refined_bytes) for one in found], float)
    seconds = np.array([one.kernel for one in found])
    prices, *_ = np.linalg.lstsq(pages, seconds, rcond=None)
    if prices.min() < 0:  # noise, or only one kind of pages was read
        return (seconds.sum() / pages.sum(),) * 2
    return tuple(prices.tolist())


def command_prices(beside: dict[int, list[float]]) -> tuple[float, float]:
    """(seconds of a command, more for each refined byte), of seconds beside its bytes by refined bytes: the
    line through the medians of the fewest and the most, neither below 0."""
    few, most = min(beside), max(beside)
    first, last = statistics.median(beside[few]), statistics.median(beside[most])
    slope = max(0.0, (last - first) / (most - few)) if most > few else 0.0
    slope = min(slope, max(0.0, first) / few) if few else slope
    return max(0.0, first - slope * few), slope
