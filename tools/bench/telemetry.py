"""What being seen costs: attention of which nothing is recorded, with metrics, and traced, in turns.

A turn is one decode step over a sequence in the drive's cache, where attention takes least and telemetry the
largest share. Each round has a turn of every kind in random order; a kind's cost is the median over rounds of
its time over that of the step in the same round of which nothing is recorded.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.figures import Figure
from spdk_glue.probes import Probe
from spdk_glue.trace import TRACE

NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 2, 8, 4, 128
METRICS_GOAL, TRACE_GOAL = 0.01, 0.05  # shares of attention throughput
PERCENT, MICROSECONDS, MILLISECONDS = 100.0, 1e6, 1e3
PROBE_CALLS = 20_000


@dataclass(frozen=True)
class Scale:
    """contexts: tokens attended over, figures of each; seconds: of all turns of a context"""

    contexts: tuple[int, ...] = (512, 4096, 16384)
    seconds: float = 8.0
    min_rounds: int = 200


QUICK = Scale(contexts=(512,), seconds=0.1, min_rounds=4)


class _Nothing:
    """A probe that records nothing: what is left is reading the clock and a call."""

    def since(self, start_ns: int, count: int = 1, note: dict | None = None) -> None:
        pass

    def between(self, start_ns: int, stop_ns: int, count: int = 1, note: dict | None = None) -> None:
        pass


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    scale = QUICK if quick else Scale()
    figures = [_probe_cost()]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "drive.kvfs"
        kv_bytes = sum(scale.contexts) * 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 2
        kvfs.format(path, 3 * kv_bytes + (256 << 20))
        with kvfs.open(path, cache_bytes=4 * kv_bytes + (64 << 20)) as store:
            shape = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
            model = store.add_model("m", num_query_heads=NUM_KV_HEADS * GROUP_SIZE, **shape)
            for num_tokens in scale.contexts:
                figures += _of_context(store, model, num_tokens, scale)
            figures.append(_scrape_cost(store))
    return figures


def _probe_cost() -> Figure:
    probe = Probe("host", "attend")
    started = time.perf_counter()
    for _ in range(PROBE_CALLS):
        probe.since(time.perf_counter_ns())
    each = (time.perf_counter() - started) / PROBE_CALLS
    return Figure("telemetry.probe", each * MICROSECONDS, "us")


def _scrape_cost(store) -> Figure:
    from kvfs.telemetry.metrics import metrics_text

    times = []
    for _ in range(5):
        started = time.perf_counter()
        metrics_text(store.telemetry())
        times.append(time.perf_counter() - started)
    return Figure("telemetry.scrape", statistics.median(times) * MILLISECONDS, "ms")


def _of_context(store, model, num_tokens: int, scale: Scale) -> Iterator[Figure]:
    numbers = np.random.default_rng(0)
    sequence = store.create_sequence(model, f"of-{num_tokens}")
    rows = numbers.standard_normal((num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
    for layer in range(NUM_LAYERS):
        sequence.append(layer, rows, rows)
    sequence.flush()
    queries = numbers.standard_normal((1, 1, model.geometry.num_query_heads, HEAD_DIM), np.float32)
    attend_unrecorded = type(store).attend.__wrapped__

    def step() -> None:
        for layer in range(NUM_LAYERS):
            store.attend(layer, queries, sequence)

    def step_unrecorded() -> None:
        for layer in range(NUM_LAYERS):
            attend_unrecorded(store, layer, queries, sequence)

    kinds = {
        "unrecorded": (_context(store, _Nothing(), False), step_unrecorded),
        "metrics": (_context(store, None, False), step),
        "trace": (_context(store, None, True), step),
    }
    times = _in_turns(kinds, scale)
    yield Figure(f"telemetry.{num_tokens}.attend", _median(times["unrecorded"]) / NUM_LAYERS, "us")
    for kind, goal in (("metrics", METRICS_GOAL), ("trace", TRACE_GOAL)):
        ratios = [mine / base for mine, base in zip(times[kind], times["unrecorded"], strict=True)]
        cost = (statistics.median(ratios) - 1) * PERCENT
        name = f"telemetry.{num_tokens}.{kind}.cost"
        yield Figure(name, cost, "%", goal=goal * PERCENT, goal_is_maximum=True)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) * MICROSECONDS


def _context(store, instead: _Nothing | None, is_traced: bool) -> Callable:
    """A context with the probes on attention's way, or with `instead` of each.

    All kinds do the same before a step: whatever Python runs there is warm in the step. Instances change, not
    classes: for a changed class Python would learn its functions anew.
    """
    owners = [
        (owner, name, probe)
        for owner in (store._namespace.probes, store._drive.probes)
        for name, probe in vars(owner).items()
        if isinstance(probe, Probe)
    ]

    @contextmanager
    def context() -> Iterator[None]:
        TRACE.start()
        TRACE.is_on = is_traced
        for owner, name, probe in owners:
            setattr(owner, name, instead or probe)
        try:
            yield
        finally:
            for owner, name, probe in owners:
                setattr(owner, name, probe)
            TRACE.stop()

    return context


def _in_turns(kinds: dict[str, tuple[Callable, Callable]], scale: Scale) -> dict[str, list[float]]:
    """Seconds of a step, by kind and round."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = [*kinds]
    shuffled = random.Random(0)
    for _ in range(3):  # compiles kernels, fills the cache
        kinds["metrics"][1]()
    until = time.perf_counter() + scale.seconds
    while time.perf_counter() < until or len(times["metrics"]) < scale.min_rounds:
        shuffled.shuffle(order)
        for kind in order:
            context, step = kinds[kind]
            with context():
                started = time.perf_counter()
                step()
                times[kind].append(time.perf_counter() - started)
    return times
