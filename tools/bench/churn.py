"""Write amplification of the translation layer, over media that count and keep no payload.

Three parts: uniform random overwrites, whose amplification is known, to see that the simulation is right; churn
of whole sequences, placed by lifetime and page-mapped (one stream) on the same trace; and collection policies
side by side. Everything follows from seeds: a figure is the same on every machine.

WAF counts every page programmed (data, copies, metadata, parity) and every page left out as padding, over the
pages that the host wrote.
"""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from ftl.collector import CollectorOptions
from ftl.geometry import Geometry
from ftl.media_memory import CountingMedia
from ftl.provisioning import GC_RESERVE
from ftl.translation import FlashTranslationLayer
from kvfs_bench.churn_trace import DEATHS, ChurnTrace, TraceOptions
from kvfs_bench.figures import Figure

# Greedy with 256 pages per erase block, by over-provisioning in percent: shared/ALGORITHMS.md.
KNOWN_UNIFORM_WAF = {7.0: 7.506, 12.5: 4.572, 28.0: 2.455}
UNIFORM_TOLERANCE = 0.04
WAF_GOAL = {0.9: 1.02, 0.95: 1.05}
SHORT_UNITS, SHORT_GOAL = 0.5, 1.25
MEAN_UNITS = 4.0
CURVE = (0.85, 0.9, 0.95)
POLICIES = ("greedy", "cost-benefit", "d-choices")


@dataclass(frozen=True)
class Scale:
    """Sizes in superblocks and turnovers (host writes over the flash's size); a short run shows that it runs.

    4096 superblocks are what a drive of 64 GiB has: fewer leave a drive at 95% no room for 64 open ones. Units
    are of fewer pages than there, which only makes metadata weigh more.
    """

    uniform: int = 2048
    churn: int = 4096
    policies: int = 1024
    warm_turnovers: float = 1.5
    turnovers: float = 0.75
    pages_per_unit: int = 128
    uniform_pages_per_unit: int = 256  # as the known values
    fullness: tuple[float, ...] = tuple(WAF_GOAL)
    deaths: tuple[str, ...] = DEATHS[:3]
    curve: tuple[float, ...] = CURVE
    over_provisioning: tuple[float, ...] = tuple(KNOWN_UNIFORM_WAF)
    policy_fullness: float = 0.9


SHORT = Scale(
    uniform=256,
    churn=1024,
    policies=256,
    warm_turnovers=0.4,
    turnovers=0.4,
    pages_per_unit=32,
    uniform_pages_per_unit=64,
    fullness=(0.9,),
    deaths=("random",),
    curve=(0.9,),
    over_provisioning=(12.5, 28.0),
    policy_fullness=0.85,
)


@dataclass(frozen=True)
class Amplification:
    """What became of a run's host pages, each as a share of them."""

    waf: float
    collection: float
    metadata: float


def _drive(num_superblocks: int, pages_per_unit: int, policy: str = "greedy"):
    geometry = Geometry(
        pages_per_erase_block=pages_per_unit // Geometry.num_channels,
        num_superblocks=num_superblocks,
        spare_percent=1,
    )
    return FlashTranslationLayer.format(CountingMedia(geometry), CollectorOptions(policy=policy))


class _Meter:
    """Counts from where it is made."""

    def __init__(self, ftl: FlashTranslationLayer):
        self._ftl = ftl
        self._start = self._now()

    def _now(self) -> dict[str, int]:
        return {**self._ftl.counters.as_dict(), **self._ftl.media.counters.as_dict()}

    def amplification(self) -> Amplification:
        now = self._now()
        done = {name: now[name] - self._start[name] for name in now}
        host = done["host_pages_written"]
        return Amplification(
            waf=(done["pages_programmed"] + done["padding_pages"]) / host,
            collection=done["gc_pages_written"] / host,
            metadata=done["metadata_pages_written"] / host,
        )


def churn(scale: Scale, num_superblocks: int, options: TraceOptions, policy: str = "greedy") -> Amplification:
    ftl = _drive(num_superblocks, scale.pages_per_unit, policy)
    trace = ChurnTrace(ftl, options)
    num_pages = ftl.geometry.num_pages
    trace.run(int((options.fullness + scale.warm_turnovers) * num_pages))
    meter = _Meter(ftl)
    trace.run(int(scale.turnovers * num_pages))
    return meter.amplification()


def uniform(scale: Scale, over_provisioning_percent: float) -> Amplification:
    """Single pages overwritten at random. The flash that counts leaves out what is never full: the reserve, and
    two superblocks that are half full on average (the host's and collection's)."""
    ftl = _drive(scale.uniform, scale.uniform_pages_per_unit)
    physical = (scale.uniform - GC_RESERVE - 1) * ftl.geometry.pages_per_superblock
    num_lbas = int(physical / (1 + over_provisioning_percent / 100))
    random, batch = np.random.default_rng(1), 512
    sources = np.zeros(batch, np.uint64)
    for first in range(0, num_lbas, batch):
        lbas = np.arange(first, min(first + batch, num_lbas))
        ftl.write(lbas, sources[: len(lbas)])
    for turnovers in (scale.warm_turnovers, scale.turnovers):
        meter = _Meter(ftl)
        for _ in range(int(turnovers * num_lbas) // batch):
            ftl.write(random.integers(0, num_lbas, batch), sources)
    return meter.amplification()


def _percent(fullness: float) -> str:
    return f"full{round(100 * fullness)}"


class Runs:
    """Simulations by name, over all CPUs."""

    def __init__(self):
        self._jobs: dict[str, tuple] = {}
        self.results: dict[str, Amplification] = {}

    def add(self, name: str, function, *arguments) -> None:
        self._jobs[name] = (function, *arguments)

    def run(self, num_processes: int | None = None) -> None:
        num_processes = num_processes or len(os.sched_getaffinity(0))
        if num_processes == 1:
            self.results = {name: function(*rest) for name, (function, *rest) in self._jobs.items()}
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context) as pool:
            waiting = {name: pool.submit(*job) for name, job in self._jobs.items()}
            self.results = {name: future.result() for name, future in waiting.items()}


def _plan(scale: Scale) -> Runs:
    runs = Runs()

    def add_churn(name: str, fullness: float, deaths: str, **options) -> None:
        trace = TraceOptions(fullness, deaths, **options)
        runs.add(f"{name}.{deaths}.{_percent(fullness)}", churn, scale, scale.churn, trace)

    points = {(fullness, deaths) for fullness in scale.fullness for deaths in scale.deaths}
    points |= {(fullness, "random") for fullness in scale.curve}
    for fullness, deaths in sorted(points):  # the long ones first
        add_churn("page_mapped", fullness, deaths, mean_units=MEAN_UNITS, by_lifetime=False)
    for fullness, deaths in sorted(points):
        add_churn("placed", fullness, deaths, mean_units=MEAN_UNITS)
    for fullness, deaths in sorted(points):
        if fullness in scale.fullness and deaths != "fifo":
            add_churn("sizes_unknown", fullness, deaths, mean_units=MEAN_UNITS, sizes_known=False)
    add_churn("short", 0.9, "predicted", mean_units=SHORT_UNITS)
    add_churn("short_page_mapped", 0.9, "predicted", mean_units=SHORT_UNITS, by_lifetime=False)
    for policy in POLICIES:
        trace = TraceOptions(scale.policy_fullness, "skewed", MEAN_UNITS, by_lifetime=False)
        runs.add(f"policy.{policy}", churn, scale, scale.policies, trace, policy)
    for op in scale.over_provisioning:
        runs.add(f"uniform.{op}", uniform, scale, op)
    return runs


def measure(short: bool = False, num_processes: int | None = None) -> tuple[list[Figure], dict]:
    """(figures, {name of a line: [(fullness, WAF)]} for the plot). short: seconds, and no result."""
    scale = SHORT if short else Scale()
    runs = _plan(scale)
    runs.run(num_processes)
    found = runs.results
    figures = [*_uniform_figures(found, scale), *_churn_figures(found, scale), *_short_figures(found)]
    figures += [Figure(f"gc.policy.{p}.waf", found[f"policy.{p}"].waf, "ratio") for p in POLICIES]
    lines = {
        label: [(fullness, found[f"{name}.random.{_percent(fullness)}"].waf) for fullness in scale.curve]
        for name, label in (("placed", "placed by lifetime"), ("page_mapped", "page-mapped greedy"))
    }
    return figures, lines


def _uniform_figures(found: dict[str, Amplification], scale: Scale) -> Iterable[Figure]:
    for op in scale.over_provisioning:
        known = KNOWN_UNIFORM_WAF[op]
        waf = found[f"uniform.{op}"].waf
        name = f"gc.uniform.op{op:g}".replace("12.5", "12_5")
        yield Figure(f"{name}.waf", waf, "ratio", rival="known value", rival_value=known, ratio=waf / known)
        yield Figure(
            f"{name}.deviation",
            abs(waf / known - 1),
            "fraction",
            goal=UNIFORM_TOLERANCE,
            goal_is_maximum=True,
        )


def _waf_figure(name: str, found: Amplification, rival: Amplification, goal: float) -> Figure:
    return Figure(
        name,
        found.waf,
        "ratio",
        rival="page-mapped greedy",
        rival_value=rival.waf,
        ratio=found.waf / rival.waf,
        limit=1.0,
        goal=goal,
        goal_is_maximum=True,
    )


def _churn_figures(found: dict[str, Amplification], scale: Scale) -> Iterable[Figure]:
    for deaths in scale.deaths:
        for fullness in scale.fullness:
            goal, case = WAF_GOAL[fullness], f"{deaths}.{_percent(fullness)}"
            placed, rival = found[f"placed.{case}"], found[f"page_mapped.{case}"]
            yield _waf_figure(f"churn.{case}.waf", placed, rival, goal)
            yield Figure(f"churn.{case}.collection", placed.collection, "fraction")
            yield Figure(f"churn.{case}.metadata", placed.metadata, "fraction")
            yield Figure(f"churn.{case}.waf_page_mapped_greedy", rival.waf, "ratio")
            unknown = found.get(f"sizes_unknown.{case}")
            if unknown:
                yield _waf_figure(f"churn.{case}.waf_sizes_unknown", unknown, rival, goal)


def _short_figures(found: dict[str, Amplification]) -> Iterable[Figure]:
    short, rival = found["short.predicted.full90"], found["short_page_mapped.predicted.full90"]
    yield _waf_figure("churn.short_predicted.full90.waf", short, rival, SHORT_GOAL)
    yield Figure("churn.short_predicted.full90.metadata", short.metadata, "fraction")
    yield Figure("churn.short_predicted.full90.waf_page_mapped_greedy", rival.waf, "ratio")


def plot(lines: dict[str, list[tuple[float, float]]], path) -> None:
    """Draw WAF against fullness into the PNG file `path`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for (label, points), style in zip(lines.items(), ("o-", "s--"), strict=True):
        if points:
            fullness, waf = zip(*points, strict=True)
            axes.plot([100 * share for share in fullness], waf, style, label=label)
    axes.set(xlabel="live data, % of the flash", ylabel="write amplification", ylim=(0.9, None))
    axes.set_title(f"random deaths, sequences of {MEAN_UNITS:g} reclaim units")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
