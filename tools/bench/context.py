"""How the cost of attention grows: time and memory over the length of the context, bandwidth over the batch.

One layer's decode step: one query, fp16. Short contexts are taken in turn, as a model's layers are, so that
none is found in the processor's own caches. A line is fitted through the times by least squares of relative
errors, so that every length counts alike, from 4k tokens on: less is not handed to other threads. torch SDPA
attends over the same tokens in memory in the same rounds, in the dtype in which it is fastest.
"""

import itertools
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import limits
from kvfs_bench.attention import GB, READ_REQUEST_BYTES, measure_in_rounds
from kvfs_bench.figures import Figure

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 8, 4, 128
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # K and V of one layer, fp16
COLD_CACHE_BYTES = 64 << 20
SHARE_OF_MEMORY = 3  # what is free holds the cache, and torch's copy while it is made
METADATA_BYTES = 8 << 20  # what comes first on the flash may be the catalogue's
TORCH_DTYPES, DTYPE_ROUNDS = ("float16", "bfloat16", "float32"), 3
COLD_CALLS = 3  # of each length, per round
FIT_GOAL, FIT_FROM_TOKENS = 0.1, 4096
MEMORY_GOAL = 0.01  # growth over the growth of the context
MEMORY_CALLS = 5
MICROSECONDS, NANOSECONDS, MIB = 1e6, 1e9, 1 << 20


@dataclass(frozen=True)
class Scale:
    """Lengths and batches in sequences; cycle_tokens: of all sequences of one length together, at least."""

    contexts: tuple[int, ...] = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
    cycle_tokens: int = 1 << 16
    batches: tuple[int, ...] = (1, 4, 16, 64)
    tokens_each: int = 1 << 12
    rounds: int = 5

    def num_sequences(self, num_tokens: int) -> int:
        wanted = max(1, self.cycle_tokens // num_tokens)
        return max(wanted, self.batches[-1]) if num_tokens == self.tokens_each else wanted


QUICK = Scale(contexts=(512, 4096, 8192, 16384), cycle_tokens=16384, batches=(1, 4), tokens_each=512, rounds=1)


@dataclass(frozen=True)
class Line:
    """seconds = fixed + per_token * tokens, and how well it holds."""

    fixed: float
    per_token: float
    r_squared: float
    deviation: float  # largest, relative

    @staticmethod
    def through(seconds: dict[int, float]) -> "Line":
        """seconds: of an attend call by number of tokens, two at least."""
        tokens, found = np.array(list(seconds)), np.array(list(seconds.values()))
        terms = np.stack([1 / found, tokens / found], axis=1)
        (fixed, per_token), *_ = np.linalg.lstsq(terms, np.ones(len(found)))
        expected = fixed + per_token * tokens
        r_squared = 1 - ((found - expected) ** 2).sum() / ((found - found.mean()) ** 2).sum()
        return Line(float(fixed), float(per_token), float(r_squared), float(np.abs(expected / found - 1).max()))


def _long(seconds: dict[int, float]) -> dict[int, float]:
    """Of those times the ones that the line is for."""
    return {count: found for count, found in seconds.items() if count >= FIT_FROM_TOKENS}


def _label(num_tokens: int) -> str:
    return f"{num_tokens >> 10}k" if num_tokens % 1024 == 0 else str(num_tokens)


def _name(num_tokens: int, number: int) -> str:
    return f"context-{num_tokens}-{number}"


def _queries(batch: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return random.standard_normal((batch, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)).astype(np.float32)


def _tokens(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 keys and values [num_tokens, NUM_KV_HEADS, HEAD_DIM]."""
    random = np.random.default_rng(1)
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return tuple(random.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))


def _fill(path: Path, scale: Scale, keys, values) -> None:
    """A drive with sequences of every length; the same tokens come again and again."""
    num_tokens = sum(count * scale.num_sequences(count) for count in scale.contexts)
    kvfs.format(path, 2 * num_tokens * TOKEN_BYTES + (256 << 20))
    with kvfs.open(path) as store:
        model = store.add_model(
            "context",
            num_layers=1,
            num_query_heads=NUM_KV_HEADS * GROUP_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
        )
        position = itertools.cycle(range(0, len(keys), min(scale.contexts)))
        for count in scale.contexts:
            for number in range(scale.num_sequences(count)):
                sequence = store.create_sequence(model, _name(count, number))
                while sequence.num_tokens < count:
                    first = next(position) if count < len(keys) else 0
                    part = slice(first, first + count - sequence.num_tokens)
                    sequence.append(0, keys[part], values[part])
        store.flush()


def _sequences(store, scale: Scale, num_tokens: int) -> list:
    return [store.sequence(_name(num_tokens, i)) for i in range(scale.num_sequences(num_tokens))]


# in memory


def _kvfs_call(store, scale: Scale, num_tokens: int, batch: int) -> Callable[[], None]:
    """attend over `batch` sequences, the next ones at each call."""
    sequences = _sequences(store, scale, num_tokens)
    batches = itertools.cycle([sequences[i : i + batch] for i in range(0, len(sequences), batch)])
    queries = _queries(batch)
    return lambda: store.attend(0, queries, next(batches))


def _torch_call(keys, values, num_tokens: int, batch: int, dtype: str) -> Callable[[], None]:
    """SDPA over `batch` sequences, the next ones at each call. Raises ImportError without torch."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    total = max(len(keys), num_tokens * batch)
    key, value = (
        torch.from_numpy(array)
        .to(getattr(torch, dtype))
        .repeat(total // len(keys), 1, 1)
        .view(-1, num_tokens, NUM_KV_HEADS, HEAD_DIM)
        .permute(0, 2, 1, 3)
        .contiguous()
        .split(batch)
        for array in (keys, values)
    )
    query = torch.from_numpy(_queries(batch)).to(key[0].dtype).permute(0, 2, 1, 3).contiguous()
    batches = itertools.cycle(list(zip(key, value, strict=True)))

    def attend() -> None:
        with torch.inference_mode():
            scaled_dot_product_attention(query, *next(batches), enable_gqa=True)

    return attend


def _fastest_dtype(keys, values) -> str | None:
    """In which torch takes least time for all tokens in one sequence; None without torch."""
    try:
        calls = {dtype: (1, _torch_call(keys, values, len(keys), 1, dtype)) for dtype in TORCH_DTYPES}
    except ImportError:
        return None
    per_second, _ = measure_in_rounds(calls, DTYPE_ROUNDS)
    return max(per_second, key=per_second.get)


@dataclass(frozen=True)
class Measured:
    """Seconds of a call of kvfs, of the rival, and of reading the bytes of K and V from memory."""

    num_bytes: int
    ours: float
    memory: float
    rival: str | None = None
    rival_seconds: float | None = None


Case = tuple[int, int]  # tokens of a sequence, sequences of a call


def _measure(store, scale: Scale, keys, values, cases: list[Case], dtype: str | None) -> dict[Case, Measured]:
    """All cases have their turn in each round: the speed of a shared machine drifts."""
    calls = {}
    for num_tokens, batch in cases:
        call = calls["kvfs", num_tokens, batch] = _kvfs_call(store, scale, num_tokens, batch)
        for _ in range(-(-scale.num_sequences(num_tokens) // batch)):
            call()  # into the drive's cache
        if dtype:
            calls["torch", num_tokens, batch] = _torch_call(keys, values, num_tokens, batch, dtype)
    per_second, memory = measure_in_rounds({case: (1, call) for case, call in calls.items()}, scale.rounds)
    return {
        (num_tokens, batch): Measured(
            batch * num_tokens * TOKEN_BYTES,
            1 / per_second["kvfs", num_tokens, batch],
            batch * num_tokens * TOKEN_BYTES / memory,
            f"torch SDPA, {dtype}" if dtype else None,
            1 / per_second["torch", num_tokens, batch] if dtype else None,
        )
        for num_tokens, batch in cases
    }


def _warm(path: Path, scale: Scale, keys, values, seconds: dict[int, float]) -> Iterator[Figure]:
    """seconds: is filled with what each length takes."""
    dtype = _fastest_dtype(keys, values)
    cache_bytes = _available_bytes() // SHARE_OF_MEMORY
    fitting = [
        count
        for count in scale.contexts
        if count * scale.num_sequences(count) * TOKEN_BYTES < cache_bytes * 3 // 4
    ]
    with kvfs.open(path, cache_bytes=cache_bytes) as store:
        found = _measure(store, scale, keys, values, [(count, 1) for count in fitting], dtype)
        for (count, _), measured in found.items():
            seconds[count] = measured.ours
            yield _time(f"context.warm.{_label(count)}.time", measured)
        in_all = [(scale.cycle_tokens // batch, batch) for batch in scale.batches]
        each = [(scale.tokens_each, batch) for batch in scale.batches]
        for label, cases in (
            (f"{_label(scale.cycle_tokens)}_in_all", in_all),
            (f"{_label(scale.tokens_each)}_each", each),
        ):
            cases = [case for case in cases if case[0] in fitting]
            for (_, batch), measured in _measure(store, scale, keys, values, cases, dtype).items():
                yield _bandwidth(f"context.batch.{label}.{batch}.bandwidth", measured)


def _available_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10


def _time(name: str, found: Measured) -> Figure:
    return Figure(
        name,
        found.ours * MICROSECONDS,
        "us",
        rival=found.rival,
        rival_value=found.rival_seconds * MICROSECONDS if found.rival else None,
        ratio=found.ours / found.rival_seconds if found.rival else None,
        limit=found.memory * MICROSECONDS,
    )


def _bandwidth(name: str, found: Measured) -> Figure:
    return Figure(
        name,
        found.num_bytes / found.ours / GB,
        "GB/s",
        rival=found.rival,
        rival_value=found.num_bytes / found.rival_seconds / GB if found.rival else None,
        ratio=found.rival_seconds / found.ours if found.rival else None,
        limit=found.num_bytes / found.memory / GB,
    )


def _fit(prefix: str, seconds: dict[int, float]) -> Iterator[Figure]:
    if len(seconds := _long(seconds)) > 2:
        line = Line.through(seconds)
        yield Figure(f"{prefix}.fixed", line.fixed * MICROSECONDS, "us")
        yield Figure(f"{prefix}.per_token", line.per_token * NANOSECONDS, "ns/token")
        yield Figure(f"{prefix}.r_squared", line.r_squared, "fraction")
        yield Figure(f"{prefix}.deviation", line.deviation, "fraction", goal=FIT_GOAL, goal_is_maximum=True)


# from flash


def _cold_seconds(store, sequence) -> float:
    store._drive.cache.clear()
    start = time.perf_counter()
    store.attend(0, _queries(1), [sequence])
    return time.perf_counter() - start


def _cold(path: Path, scale: Scale, seconds: dict[int, float]) -> Iterator[Figure]:
    """As _warm, with a cache that is emptied before each call, and smaller than most contexts.

    All lengths and the disk itself have their turn in each round, for a disk whose speed drifts.
    """
    times: dict[int, list[float]] = {count: [] for count in scale.contexts}
    raw, depths = [], {}
    with kvfs.open(path, cache_bytes=COLD_CACHE_BYTES) as store:
        turns = {count: itertools.cycle(_sequences(store, scale, count)) for count in scale.contexts}
        first_byte = store._drive.ftl.media.layout.data_start + METADATA_BYTES
        for _ in range(scale.rounds):
            for count, sequences in turns.items():
                found = [_cold_seconds(store, next(sequences)) for _ in range(COLD_CALLS)]
                times[count].append(statistics.median(found))
            size = scale.contexts[-1] * TOKEN_BYTES
            if best := limits.fio_read_bandwidth(path, first_byte, size, READ_REQUEST_BYTES, **depths):
                raw.append(best[0])
                depths = {"depths": (best[1],)}
    seconds |= {count: statistics.median(found) for count, found in times.items()}
    disk = statistics.median(raw) if raw else None
    for count, found in seconds.items():
        limit = count * TOKEN_BYTES / disk * MICROSECONDS if disk else None
        yield Figure(
            f"context.cold.{_label(count)}.time",
            found * MICROSECONDS,
            "us",
            rival=f"fio read {READ_REQUEST_BYTES >> 10} KiB, best depth" if disk else None,
            rival_value=limit,
            ratio=found * MICROSECONDS / limit if disk else None,
            limit=limit,
        )


# memory


def _peak_bytes(path: Path, scale: Scale, num_tokens: int) -> int:
    """Most that this process has resident beyond the drive's cache while it attends from flash."""
    with kvfs.open(path, cache_bytes=COLD_CACHE_BYTES) as store:
        sequence = store.sequence(_name(num_tokens, 0))
        store._drive.cache._arena[:] = 0  # all of it is resident from here on
        store.attend(0, _queries(1), [store.sequence(_name(FIT_FROM_TOKENS, 0))])  # and all code, loaded
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(MEMORY_CALLS):
            _cold_seconds(store, sequence)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return (int(peak[1]) << 10) - store._drive.cache.capacity_bytes


def _memory(path: Path, scale: Scale) -> Iterator[Figure]:
    """Peaks of fresh processes, one for each length."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for count in scale.contexts:
        with ProcessPoolExecutor(1, context) as process:
            peaks[count] = process.submit(_peak_bytes, path, scale, count).result()
        yield Figure(f"context.memory.{_label(count)}.peak", peaks[count] / MIB, "MiB")
    first, last = scale.contexts[0], scale.contexts[-1]
    yield Figure(
        "context.memory.growth",
        max(0, peaks[last] - peaks[first]) / ((last - first) * TOKEN_BYTES),
        "of the context's bytes",
        goal=MEMORY_GOAL,
        goal_is_maximum=True,
    )


def measure(directory: Path, quick: bool = False) -> tuple[list[Figure], dict[str, dict[int, float]]]:
    """All figures; and seconds per call by tokens, for `plot`. A drive is made in a temporary folder of
    `directory` and removed."""
    scale = QUICK if quick else Scale()
    warm: dict[int, float] = {}
    cold: dict[int, float] = {}
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as scratch:
        path = Path(scratch) / "context.kvfs"
        keys, values = _tokens(scale.cycle_tokens)
        _fill(path, scale, keys, values)
        figures = [
            *_warm(path, scale, keys, values, warm),
            *_fit("context.warm.fit", warm),
            *_cold(path, scale, cold),
            *_fit("context.cold.fit", cold),
            *_memory(path, scale),
        ]
    return figures, {"in the drive's cache": warm, "from flash": cold}


def plot(times: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the times and their lines into the PNG file `path`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for label, seconds in times.items():
        if len(_long(seconds)) < 2:
            continue
        line = Line.through(_long(seconds))
        tokens = np.geomspace(min(seconds), max(seconds))
        (drawn,) = axes.loglog(list(seconds), [1e3 * value for value in seconds.values()], "o", label=label)
        expected = 1e3 * (line.fixed + line.per_token * tokens)
        axes.loglog(tokens, expected, "-", color=drawn.get_color(), alpha=0.5)
    axes.set(xlabel="tokens of context", ylabel="time of one layer's attention, ms")
    axes.set_title(f"{NUM_KV_HEADS} KV heads of {HEAD_DIM}, {GROUP_SIZE} query heads each, fp16")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
