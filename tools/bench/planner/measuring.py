"""Measuring this machine for a plan: seconds, each probe in the geometry and at the sizes planned for."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import limits
from kvfs_bench.planner import probe_sketch
from kvfs_bench.planner.model_shape import PAGE_SIZE
from kvfs_bench.planner.planning import Request
from kvfs_bench.planner.prediction import Command, command_seconds
from kvfs_bench.planner.probe_drive import (
    ROUNDS,
    ProbeDrive,
    ProbeSize,
    num_cpus,
    temporary_drives,
)
from kvfs_bench.planner.probe_sketch import SketchCommand, SketchProbe, command_prices, kernel_prices
from kvfs_bench.planner.rates import DriveRates, SketchCosts, SketchRates
from spdk_glue import dma

LINK_BYTES = 32 << 20
MEMORY_BYTES = 128 << 20

Status = Callable[[str], None]


def memory_bandwidth() -> float:
    return limits.memory_read_bandwidth(num_cpus(), MEMORY_BYTES, ROUNDS)


def link_bandwidth() -> float:
    """Bytes/s between host and drive: of drives in this process a copy in memory."""
    source, target = np.ones(LINK_BYTES, np.uint8), dma.allocate(LINK_BYTES)
    target[:] = 0
    return LINK_BYTES / _median_seconds(lambda: np.copyto(target, source))


def _median_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure_drives(
    request: Request,
    places: list[Path],
    num_drives: int,
    num_workers: list[int],
    status: Status,
) -> list[DriveRates]:
    """Rates with each number of workers. Raises OutOfSpace and what kvfs.open raises."""
    found = []
    with probe_location(request, places, num_drives) as location:
        for workers in num_workers:
            status(f"{num_drives} drive(s), {workers} worker(s)")
            with RatesProbe(request, location, num_drives, workers) as probe:
                for _ in range(ROUNDS):
                    probe.round()
                found.append(probe.rates())
    return found


@contextmanager
def probe_location(request: Request, places: list[Path], num_drives: int) -> Iterator[Path | list[Path]]:
    """New drives with room for a RatesProbe."""
    size = _probe_size(request)
    num_layers = size.num_layers + (probe_sketch.NUM_LAYERS if _is_sealed(request) else 0)
    with temporary_drives(places, num_drives, size.drive_bytes(num_layers)) as location:
        yield location


def _probe_size(request: Request) -> ProbeSize:
    planned = None if request.fits else request.cache_bytes
    return ProbeSize.of(request.shape.geometry, PAGE_SIZE, request.context, request.batch, planned)


def _is_sealed(request: Request) -> bool:
    """Whether compression may be worth something."""
    return not request.fits


class RatesProbe:
    """Rates of drives, found in rounds. Use as a context manager.

    All probes have their turn in each round, and in a round of cold commands at each layer: the speed of a
    shared machine drifts, so what is to be compared is measured side by side, and rates are medians.
    """

    def __init__(self, request: Request, location, num_drives: int, num_workers: int):
        size = _probe_size(request)
        cache_bytes = size.cache_bytes * (num_drives if request.fits else 1)
        self._counts = {"num_drives": num_drives, "num_workers": num_workers}
        self._share_cached = request.share_cached
        self._cached, self._cold, self._random = [], [], []
        self._sketched: tuple[list[SketchCommand], ...] = [], []
        with ExitStack() as stack:
            store = stack.enter_context(kvfs.open(location, cache_bytes=cache_bytes, num_workers=num_workers))
            self._probe = ProbeDrive(store, request.shape.geometry, size, request.batch)
            stack.callback(self._probe.close)
            self._sketches = None
            if _is_sealed(request):
                self._sketches = SketchProbe(store, request.shape.geometry, size, request.batch)
                stack.callback(self._sketches.close)
            self._probe.cached()  # compiles
            self._opened = stack.pop_all()

    def __enter__(self) -> "RatesProbe":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def round(self) -> None:
        self._cold += self._probe.cold(self._share_cached)
        self._cached.append(self._probe.cached())
        self._random.append(self._probe.media_random())
        if self._sketches is not None:
            for all_of_a_kind, found in zip(self._sketched, self._sketches.commands(), strict=True):
                all_of_a_kind += found

    def rates(self) -> DriveRates:
        """By all rounds; appends some tokens, so that more rounds would be of a little more."""
        probe, cold = self._probe, self._cold
        append = statistics.median(one.append for one in self._cached) / probe.batch
        bare = DriveRates(
            **self._counts,
            media=statistics.median(one.media for one in cold),
            media_around_cached=statistics.median(one.around_cached for one in cold),
            media_random=statistics.median(self._random),
            read_cpu=statistics.median(one.cpu for one in cold),
            kernel=statistics.median(one.kernel for one in self._cached) / probe.size.command_bytes,
            cached_command=0.0,
            cold_command=0.0,
            append=append,
            spill=probe.spill(append),
            tail=probe.tail(),
        )
        cached_command = statistics.median(
            _beside_its_bytes(bare, one.attend, Command(probe.size.command_bytes, 0)) for one in self._cached
        )
        whole = Command(probe.size.command_bytes, probe.size.command_bytes)
        cold_command = statistics.median(
            _beside_its_bytes(replace(bare, media=one.in_a_row), one.attend, whole) for one in cold
        )
        # a command that reads flash does all that one does which finds its pages
        cached_command = max(0.0, cached_command)
        return replace(
            bare,
            cached_command=cached_command,
            cold_command=max(cached_command, cold_command),
            sketch=self._sketch_rates(bare) if self._sketches is not None else None,
        )

    def _sketch_rates(self, bare: DriveRates) -> SketchRates:
        return SketchRates(*(self._sketch_costs(bare, found) for found in self._sketched))

    @staticmethod
    def _sketch_costs(bare: DriveRates, found: list[SketchCommand]) -> SketchCosts:
        """Of commands that all found as much in the cache."""
        costs = SketchCosts(*kernel_prices(found), 0.0, 0.0)
        with_kernels = replace(bare, sketch=SketchRates(costs, costs))
        beside: dict[int, list[float]] = {}
        for one in found:
            num_bytes = one.index_bytes + one.refined_bytes
            refined = {"refined_bytes": one.refined_bytes, "refined_from_flash": one.refined_from_flash}
            more = _beside_its_bytes(with_kernels, one.attend, Command(num_bytes, one.from_flash, **refined))
            beside.setdefault(one.refined_bytes, []).append(more)
        command, refined_command = command_prices(beside)
        return replace(costs, command=command, refined_command=refined_command)


def _beside_its_bytes(bare: DriveRates, attend: float, command: Command) -> float:
    """What a command takes more than its bytes account for; below 0 if the machine sped up meanwhile."""
    whole = replace(bare, media_around_cached=bare.media)
    return attend - command_seconds(whole, num_cpus(), command).total
