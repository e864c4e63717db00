"""The model against this machine: rates measured, tokens/s predicted from them, the same run on real drives.

What is measured apart is what the model takes as given: bytes/s of the disk as commands read it, seconds of the
kernels, and what a command takes beside its bytes. Predicted is the attention of decode steps over other
lengths, from flash, from the drives' caches, and on two drives that share the disk. All have their turns in
each round, for a disk whose speed drifts.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import kvfs
from kvfs.layout import KvGeometry
from kvfs_bench.planner.probe_drive import (
    ProbeDrive,
    ProbeSize,
    add_model,
    num_cpus,
    random_rows,
    temporary_drives,
)
from kvfs_bench.planner.rates import WINDOW_BYTES
from machine_model.catalogue import load_machine
from machine_model.events import Simulation
from machine_model.language_model import LanguageModel
from machine_model.machine import Machine
from machine_model.situation import Situation
from machine_model.systems.near_data import Dense
from machine_model.systems.system import Pass
from machine_model.workload import Workload

GEOMETRY = KvGeometry(num_layers=1, num_query_heads=32, num_kv_heads=8, head_dim=128)
LAYERS = 32  # tokens/s are of so many layers' attention: Llama-3-8B's
CONTEXTS = (8192, 16_384, 32_768, 65_536)
PROBE_TOKENS, PROBE_LAYERS = 16_384, 4
CACHE_BYTES = 400 << 20
ROUNDS = 12
WARM_CALLS = 3
UNLIMITED = 1e12


@dataclass(frozen=True)
class Rates:
    """Of this machine, with `num_drives` drives. disk: bytes/s of all drives, as commands read; kernels:
    bytes/s of K and V in memory, all threads; cold_command, warm_command: seconds beside a command's bytes"""

    num_drives: int
    disk: float
    kernels: float
    cold_command: float
    warm_command: float


@dataclass(frozen=True)
class Comparison:
    """Tokens/s of the attention of LAYERS layers. source: flash or cache"""

    source: str
    num_drives: int
    context: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    rates: tuple[Rates, ...]
    comparisons: tuple[Comparison, ...]

    def as_dict(self) -> dict:
        found = asdict(self)
        for row, one in zip(found["comparisons"], self.comparisons, strict=True):
            row["error"] = one.error
        return found


def calibrate(
    place: Path,
    contexts: tuple[int, ...] = CONTEXTS,
    rounds: int = ROUNDS,
    probe_tokens: int = PROBE_TOKENS,
) -> Calibration:
    """contexts: tokens, predicted and measured; probe_tokens: of the commands by which rates are found.

    Drives are made in a temporary folder of `place` and removed. Raises what kvfs.open raises."""
    rates, comparisons = [], []
    for num_drives in (1, 2):
        found, measured = _of_drives(place, num_drives, contexts, rounds, probe_tokens)
        rates.append(found)
        # of two drives kernels and commands are known from one; a disk's rate is that of the moment
        known = replace(found, kernels=rates[0].kernels, cold_command=rates[0].cold_command)
        for (source, count), seconds in measured.items():
            predicted = 1 / (LAYERS * _predicted(known, count, source))
            comparisons.append(Comparison(source, num_drives, count, predicted, 1 / (LAYERS * seconds)))
    return Calibration(tuple(rates), tuple(comparisons))


def _of_drives(
    place: Path, num_drives: int, contexts: tuple[int, ...], rounds: int, probe_tokens: int
) -> tuple[Rates, dict[tuple[str, int], float]]:
    """Rates, and seconds of an attend call by source and context."""
    tokens = sum(contexts) + 2 * PROBE_LAYERS * probe_tokens
    token_bytes = GEOMETRY.token_bytes
    size_bytes = 2 * tokens * token_bytes // num_drives + (256 << 20)
    with ExitStack() as stack:
        location = stack.enter_context(temporary_drives([place], num_drives, size_bytes))
        store = stack.enter_context(kvfs.open(location, cache_bytes=CACHE_BYTES))
        size = ProbeSize(probe_tokens, PROBE_LAYERS, probe_tokens * token_bytes)
        probe = ProbeDrive(store, GEOMETRY, size, 1)
        stack.callback(probe.close)
        calls = {count: _call(store, count) for count in contexts}
        cached = [count for count in contexts if count * token_bytes < CACHE_BYTES // 2]
        cold: dict[int, list[float]] = {count: [] for count in contexts}
        warm: dict[int, list[float]] = {count: [] for count in cached}
        commands, kernels = [], []
        probe.cached()  # compiles
        for _ in range(rounds):
            commands += probe.cold(0.0)
            kernels.append(probe.cached())
            for count, call in calls.items():
                probe.clear_cache()
                cold[count].append(_seconds(call))
            for count in cached:
                calls[count]()
            for count in cached * WARM_CALLS:  # in turn, as layers are: out of the CPUs' own caches
                warm[count].append(_seconds(calls[count]))
        rates = _rates(num_drives, probe, commands, kernels)
    times = {("flash", count): found for count, found in cold.items()}
    times |= {("cache", count): found for count, found in warm.items()}
    return rates, {case: statistics.median(found) for case, found in times.items()}


def _call(store, num_tokens: int) -> Callable[[], object]:
    sequence = store.create_sequence(add_model(store, "calibration", GEOMETRY), f"{num_tokens} tokens")
    for first in range(0, num_tokens, 8192):
        sequence.append(0, *random_rows(GEOMETRY, min(8192, num_tokens - first), seed=first))
    store.flush()
    shape = (1, 1, GEOMETRY.num_query_heads, GEOMETRY.head_dim)
    queries = np.random.default_rng(2).standard_normal(shape).astype(np.float16)
    return lambda: store.attend(0, queries, [sequence])


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _rates(num_drives: int, probe: ProbeDrive, commands, kernels) -> Rates:
    num_bytes = probe.size.command_bytes
    kernel = statistics.median(one.kernel for one in kernels) / num_cpus()  # a worker for each
    window = min(1.0, WINDOW_BYTES * num_drives / num_bytes)
    cold = statistics.median(
        one.attend - max(num_bytes / one.in_a_row + window * kernel, kernel) for one in commands
    )
    warm = statistics.median(one.attend - kernel for one in kernels)
    disk = statistics.median(one.media for one in commands)
    return Rates(num_drives, disk, num_bytes / kernel, max(0.0, cold), max(0.0, warm))


def machine_of(rates: Rates, source: str) -> Machine:
    """This machine: drives in files, so that they share the disk, and the host's CPUs compute for all."""
    command = rates.cold_command if source == "flash" else rates.warm_command
    changed = {
        "drive.channel_bandwidth": UNLIMITED,
        "drive.link_bandwidth": UNLIMITED,
        "drive.internal_bandwidth": UNLIMITED,
        "drive.read_seconds": 1e-7,
        "drive.read_share": 1.0,
        "drive.command_seconds": command,
        "drive.window_bytes": WINDOW_BYTES,
        "links.drives": rates.disk if source == "flash" else UNLIMITED,
        "links.latency": 0.0,
        "host.memory_bandwidth": UNLIMITED,
        "host.attention_bandwidth": rates.kernels,
        "host.tail_seconds": 0.0,
    }
    machine = load_machine("a100-pm9a3")
    for path, value in changed.items():
        machine = machine.with_value(path, value)
    return machine


def _predicted(rates: Rates, context: int, source: str) -> float:
    """Seconds of one layer's attention."""
    model = LanguageModel("calibration", "calibration", GEOMETRY, 4096, 14336, 3, 128_256, "Llama-3-8B's shape")
    work = Workload(1, context, 1, writeback_tokens=1)
    at = Situation(machine_of(rates, source), model, work, rates.num_drives, context)
    simulation = Simulation()
    last = Dense().attention(Pass(simulation, at), None)
    return simulation.run(last).seconds
