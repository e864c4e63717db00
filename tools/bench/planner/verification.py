"""Running a plan: a temporary drive, K/V of the planned geometry, some decode steps, beside the prediction.

Between steps the drive and the model are measured again, as they were for the plan. So there are two
predictions: the plan's, made before, and one by the speed that the machine had meanwhile. The second tells a
wrong formula from a machine whose speed has changed.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.planner.formulas import tail_tokens
from kvfs_bench.planner.measuring import RatesProbe, probe_location
from kvfs_bench.planner.model_probe import (
    Decoder,
    ModelProbe,
    has_transformers,
    is_measured_whole,
    load,
    row_names,
)
from kvfs_bench.planner.planning import Candidate, Plan, compressed_workload, workload
from kvfs_bench.planner.prediction import Step, predict
from kvfs_bench.planner.probe_drive import add_model, random_rows, stores_of, temporary_drives
from kvfs_bench.planner.rates import DriveRates

NAME = "plan"
WARM_UP_STEPS = 8  # until a cache smaller than what is read has spread what it keeps
ROUNDS = 5  # of some steps, and of measuring
STEPS = 2  # of a round, at least
STEPS_SECONDS = 0.4  # of a round, at least, up to STEPS_MAX
STEPS_MAX = 16
SPARE_BYTES = 96 << 20
NUM_QUERIES = 257  # coprime to layers


@dataclass(frozen=True)
class Verification:
    """Of steps of which none fills a group. Bytes are those of one step, from the drives' counters.

    compression: None: dense; beside_seconds: predicted by what was measured between the steps
    """

    num_drives: int
    num_workers: int
    compression: int | None
    with_model: bool
    predicted_seconds: float
    beside_seconds: float
    measured_seconds: float
    steps_seconds: tuple[float, ...]
    predicted_flash_bytes: float
    measured_flash_bytes: float
    predicted_cached_bytes: float
    measured_cached_bytes: float
    batch: int

    @property
    def error(self) -> float:
        """Of the predicted tokens/s."""
        return self.measured_seconds / self.predicted_seconds - 1

    @property
    def error_beside(self) -> float:
        return self.measured_seconds / self.beside_seconds - 1

    def as_dict(self) -> dict:
        return {
            "num_drives": self.num_drives,
            "num_workers": self.num_workers,
            "compression": self.compression,
            "with_model": self.with_model,
            "predicted": {
                "seconds": self.predicted_seconds,
                "seconds_by_rates_beside": self.beside_seconds,
                "tokens_per_second": self.batch / self.predicted_seconds,
                "flash_bytes": self.predicted_flash_bytes,
                "cached_bytes": self.predicted_cached_bytes,
            },
            "measured": {
                "seconds": self.measured_seconds,
                "tokens_per_second": self.batch / self.measured_seconds,
                "flash_bytes": self.measured_flash_bytes,
                "cached_bytes": self.measured_cached_bytes,
                "steps": list(self.steps_seconds),
            },
            "error": self.error,
            "error_by_rates_beside": self.error_beside,
        }


def verify(
    plan: Plan,
    candidate: Candidate,
    compression: int | None,
    places: list[Path],
    status: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Decode some steps with a candidate's drives and workers, dense or with a compression.

    With the model if Transformers can make it, else attention alone.
    """
    request, geometry = plan.request, plan.request.shape.geometry
    with_model = request.shape.folder is not None and has_transformers()
    is_default = plan.writeback_tokens == geometry.group_tokens
    spare = 2 * request.tail_bytes + SPARE_BYTES
    size = (2 * request.kv_bytes + spare) // candidate.num_drives + SPARE_BYTES
    options = {
        "cache_bytes": request.cache_bytes,
        "num_workers": candidate.num_workers,
        "tail_bytes": 2 * request.tail_bytes,
        "writeback_tokens": None if is_default else plan.writeback_tokens,
    }
    with ExitStack() as stack:
        location = stack.enter_context(temporary_drives(places, candidate.num_drives, size))
        with kvfs.open(location, cache_bytes="64MiB") as store:
            _fill(store, plan, compression, status)
        status("the drive beside it")
        probes = [_drive_probe(stack, plan, candidate, places)]
        if with_model and is_measured_whole(request.shape):
            model = ModelProbe(request.shape, request.context, request.batch, places[0])
            probes.append(stack.enter_context(model))
        store = stack.enter_context(kvfs.open(location, **options))
        make_step = _model_step if with_model else _attention_step
        step = make_step(store, plan, compression)
        for number in range(WARM_UP_STEPS):
            status(f"warm-up step {number + 1} of {WARM_UP_STEPS}")
            step()
        before, seconds = _pages(store), []
        for number in range(ROUNDS):
            status(f"round {number + 1} of {ROUNDS}")
            for probe in probes:
                probe.round()
            seconds += _steps(step)
        after = _pages(store)
        rates_beside = probes[0].rates()
        model_beside = probes[1].seconds() if len(probes) > 1 else plan.rates.model.seconds or 0.0
    num_steps = len(seconds) + ROUNDS
    flash, cached = ((b - a) / num_steps * request.layout.page_size for a, b in zip(before, after, strict=True))
    tail = tail_tokens(geometry, request.context, plan.writeback_tokens) + WARM_UP_STEPS + (num_steps + 1) / 2
    work = workload(request, plan.writeback_tokens, tail)
    if compression is not None:
        work = compressed_workload(request, work, compression)

    def expected(rates: DriveRates, model_seconds: float) -> Step:
        return predict(rates, plan.rates.num_cpus, work, model_seconds if with_model else 0.0)

    predicted = expected(plan.rates_of(candidate), plan.rates.model.seconds or 0.0)
    beside = expected(rates_beside, model_beside)
    return Verification(
        candidate.num_drives,
        candidate.num_workers,
        compression,
        with_model,
        predicted.total - predicted.spills,
        beside.total - beside.spills,
        statistics.median(seconds),
        tuple(seconds),
        predicted.flash_bytes,
        flash,
        work.num_layers * work.layer_bytes - predicted.flash_bytes,
        cached,
        request.batch,
    )


def _drive_probe(stack: ExitStack, plan: Plan, candidate: Candidate, places: list[Path]) -> RatesProbe:
    location = stack.enter_context(probe_location(plan.request, places, candidate.num_drives))
    return stack.enter_context(RatesProbe(plan.request, location, candidate.num_drives, candidate.num_workers))


def _steps(step: Callable[[], float]) -> list[float]:
    """Of a round; the first one is only to have the CPUs' caches as they are while it decodes."""
    step()
    seconds: list[float] = []
    while len(seconds) < STEPS or (sum(seconds) < STEPS_SECONDS and len(seconds) < STEPS_MAX):
        seconds.append(step())
    return seconds


def _fill(store, plan: Plan, compression: int | None, status) -> None:
    request, geometry = plan.request, plan.request.shape.geometry
    model = add_model(store, NAME, geometry)
    names = row_names(NAME, request.batch)
    sequences = [store.create_sequence(model, name) for name in names]
    rows = random_rows(geometry, request.context)
    for layer, sequence in itertools.product(range(geometry.num_layers), sequences):
        status(f"layer {layer + 1} of {geometry.num_layers} is written")
        sequence.append(layer, *rows)
    store.flush()
    if compression is not None:
        status("sketches are made")
        for sequence in sequences:
            sequence.seal("sketch")
        store.flush()


def _attention_step(store, plan: Plan, compression: int | None) -> Callable[[], float]:
    request, geometry = plan.request, plan.request.shape.geometry
    sequences = [store.sequence(name) for name in row_names(NAME, request.batch)]
    token = random_rows(geometry, 1)
    shape = (NUM_QUERIES, request.batch, 1, geometry.num_query_heads, geometry.head_dim)
    # each step asks for something else, or a compressed one would find all that it chooses in the cache
    queries = itertools.cycle(np.random.default_rng(2).standard_normal(shape).astype(np.float16))

    def step() -> float:
        begun = time.perf_counter()
        for layer in range(geometry.num_layers):
            for sequence in sequences:
                sequence.append(layer, *token)
            store.attend(layer, next(queries), sequences, compression=compression)
        return time.perf_counter() - begun

    return step


def _model_step(store, plan: Plan, compression: int | None) -> Callable[[], float]:
    request = plan.request
    return Decoder(load(request.shape), store, NAME, request.batch, request.context, compression).step


def _pages(store) -> tuple[int, int]:
    """(pages from flash, from cache) of attention commands so far, all drives."""
    found = [one.counters()["attention"] for one in stores_of(store)]
    return tuple(sum(counters[f"pages_from_{source}"] for counters in found) for source in ("flash", "cache"))
