"""Delayed writeback: decoding with every size of spill, and how fast what it wrote is read from flash.

Several sequences decode at once, a token at a time in all layers, so that their spills take turns on the flash.
They are of different lengths, so that they spill at different steps. Further tokens, enough to be read for a
while, are appended in the same order without attention. Then the same tokens are read cold: as they were
written, compacted, and on another drive where each layer of a sequence was written at once.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import limits
from kvfs_bench.attention import GB, READ_REQUEST_BYTES
from kvfs_bench.figures import Figure

NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 4, 8, 4, 128
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # K and V of one layer, fp16
GROUP_TOKENS = 256
WRITEBACK_TOKENS = (16, 32, 64, 128, 256)  # a page of fp16 to a whole group
STAGGER_TOKENS = 33  # of each sequence against the one before
COLD_CACHE_BYTES = 64 << 20
NEIGHBOURS = 16  # steps before and after one that spilled, to compare it with
SAMPLE_STEPS = 16
COLD_GOAL, STALL_GOAL = 0.7, 1.5
MICROSECONDS, MIB, KIB = 1e6, 1 << 20, 1 << 10


@dataclass(frozen=True)
class Scale:
    """num_tokens: appended to each sequence, whole groups of them; num_steps: so many of them with attention"""

    num_sequences: int = 8
    num_tokens: int = 2048
    num_steps: int = 512
    rounds: int = 2
    cold_passes: int = 5
    writeback_tokens: tuple[int, ...] = WRITEBACK_TOKENS

    @property
    def drive_bytes(self) -> int:
        return 4 * NUM_LAYERS * self.num_sequences * self.num_tokens * TOKEN_BYTES + (512 << 20)

    def lengths(self) -> list[int]:
        """Tokens that each sequence has before it decodes."""
        return [STAGGER_TOKENS * number for number in range(self.num_sequences)]


QUICK = Scale(
    num_sequences=2, num_tokens=512, num_steps=256, rounds=1, cold_passes=2, writeback_tokens=(16, 256)
)


@dataclass
class Decoding:
    """Seconds of each step and of each append, and the bytes whose writing it began."""

    steps: list[float] = field(default_factory=list)
    step_bytes: list[int] = field(default_factory=list)
    appends: list[float] = field(default_factory=list)
    append_bytes: list[int] = field(default_factory=list)
    tail_bytes: int = 0  # most of all sequences together
    waf: float = 0.0
    written: float = 0.0  # flash pages programmed per page of K and V

    def stall(self) -> float:
        """Median over steps that spilled: their time over the median of those around them that did not."""
        times, spilled = np.array(self.steps), np.array(self.step_bytes) > 0
        found = []
        for step in np.flatnonzero(spilled).tolist():
            near = slice(max(0, step - NEIGHBOURS), step + NEIGHBOURS + 1)
            if (~spilled[near]).any():
                found.append(times[step] / np.median(times[near][~spilled[near]]))
        return float(np.median(found))


@dataclass
class Found:
    """Of one number of tokens a spill, by round: tokens/s; bytes/s from flash as written and compacted."""

    decodings: list[Decoding] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    compacted: list[float] = field(default_factory=list)
    compaction: list[float] = field(default_factory=list)  # bytes/s


def _tokens(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 keys and values [num_tokens, NUM_KV_HEADS, HEAD_DIM]."""
    random = np.random.default_rng(1)
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return tuple(random.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))


def _queries(num_sequences: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return random.standard_normal((num_sequences, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)).astype(np.float32)


def _new_sequences(store, scale: Scale) -> list:
    model = store.add_model(
        "writeback",
        num_layers=NUM_LAYERS,
        num_query_heads=NUM_KV_HEADS * GROUP_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        group_tokens=GROUP_TOKENS,
    )
    return [store.create_sequence(model, str(number)) for number in range(scale.num_sequences)]


def _prefill(sequences, lengths: list[int], keys, values) -> None:
    for sequence, length in zip(sequences, lengths, strict=True):
        for layer in range(NUM_LAYERS):
            sequence.append(layer, keys[:length], values[:length])


def _decode(path: Path, scale: Scale, writeback_tokens: int, keys, values) -> Decoding:
    """Fill a new drive with sequences, token by token."""
    found = Decoding()
    queries = _queries(scale.num_sequences)
    kvfs.format(path, scale.drive_bytes)
    with kvfs.open(path, writeback_tokens=writeback_tokens) as store:
        sequences = _new_sequences(store, scale)
        _warm_up(store, sequences[0].model, keys, values)
        before = store.counters()["flash"]["bytes_written"]
        _prefill(sequences, scale.lengths(), keys, values)
        for step in range(scale.num_steps):
            _step(store, sequences, keys[step : step + 1], values[step : step + 1], queries, found)
            if step % SAMPLE_STEPS == SAMPLE_STEPS - 1:
                found.tail_bytes = max(found.tail_bytes, store.counters()["memory"]["tail_bytes"])
        for token in range(scale.num_steps, scale.num_tokens):
            for layer, sequence in itertools.product(range(NUM_LAYERS), sequences):
                sequence.append(layer, keys[token : token + 1], values[token : token + 1])
        store.flush()
        flash = store.counters()["flash"]
        found.waf = flash["waf"]
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        found.written = (flash["bytes_written"] - before) / (num_tokens * NUM_LAYERS * TOKEN_BYTES)
    return found


def _warm_up(store, model, keys, values) -> None:
    """Have all code compiled that decoding runs."""
    sequence = store.create_sequence(model, "warm-up")
    _prefill([sequence], [GROUP_TOKENS], keys, values)
    for tokens in (slice(0, 32), slice(32, 33)):
        sequence.append(0, keys[tokens], values[tokens])
        store.attend(0, _queries(1), [sequence])
    store.delete_sequence(sequence.name)


def _step(store, sequences, key, value, queries, found: Decoding) -> None:
    """One token more in all layers of all sequences, attended over."""
    step_started = time.perf_counter()
    appended = len(found.append_bytes)
    for layer in range(NUM_LAYERS):
        for sequence in sequences:
            bytes_before = sequence._bytes_spilled
            started = time.perf_counter()
            sequence.append(layer, key, value)
            found.appends.append(time.perf_counter() - started)
            found.append_bytes.append(sequence._bytes_spilled - bytes_before)
        store.attend(layer, queries, sequences)
    found.steps.append(time.perf_counter() - step_started)
    found.step_bytes.append(sum(found.append_bytes[appended:]))


def _cold_bandwidth(store, scale: Scale) -> float:
    """Bytes/s of attending from flash to the tokens that every drive has there, best of some passes."""
    sequences = [store.sequence(str(number)) for number in range(scale.num_sequences)]
    queries = _queries(scale.num_sequences)
    ranges = np.tile(np.array([0, scale.num_tokens]), (scale.num_sequences, 1, 1))
    num_bytes = NUM_LAYERS * scale.num_sequences * scale.num_tokens * TOKEN_BYTES
    found = []
    for _ in range(scale.cold_passes):
        started = time.perf_counter()
        for layer in range(NUM_LAYERS):
            store._drive.cache.clear()
            store.attend(layer, queries, sequences, token_ranges=ranges)
        found.append(num_bytes / (time.perf_counter() - started))
    return statistics.median(found[1:])


def _round(place: Path, scale: Scale, keys, values, found: dict[int, Found]) -> Iterator[tuple[float, tuple]]:
    """One measurement of each kind into `found`; yields (bytes/s of prefilled data from flash, fio's best)."""
    path = place / "writeback.kvfs"
    total = NUM_LAYERS * scale.num_sequences * scale.num_tokens * TOKEN_BYTES
    for writeback_tokens in scale.writeback_tokens:
        now = found[writeback_tokens]
        decoding = _decode(path, scale, writeback_tokens, keys, values)
        now.decodings.append(decoding)
        now.tokens_per_second.append(scale.num_sequences * scale.num_steps / sum(decoding.steps))
        with kvfs.open(path, cache_bytes=COLD_CACHE_BYTES) as store:
            now.cold.append(_cold_bandwidth(store, scale))
            started = time.perf_counter()
            for number in range(scale.num_sequences):
                store.sequence(str(number)).compact()
            now.compaction.append(total / (time.perf_counter() - started))
            now.compacted.append(_cold_bandwidth(store, scale))
        path.unlink()
    kvfs.format(path, scale.drive_bytes)
    with kvfs.open(path, cache_bytes=COLD_CACHE_BYTES) as store:
        lengths = [length + scale.num_tokens for length in scale.lengths()]
        _prefill(_new_sequences(store, scale), lengths, keys, values)
        store.flush()
        offset = store._drive.ftl.media.layout.data_start + (8 << 20)
        yield (
            _cold_bandwidth(store, scale),
            limits.fio_read_bandwidth(path, offset, total, READ_REQUEST_BYTES),
        )
    path.unlink()


def _percentile_us(seconds, percent: float) -> float:
    return float(np.percentile(seconds, percent)) * MICROSECONDS


def _figures_of_decoding(prefix: str, found: Found) -> Iterator[Figure]:
    last = found.decodings[-1]
    yield Figure(f"{prefix}.tokens_per_second", statistics.median(found.tokens_per_second), "tokens/s")
    yield Figure(f"{prefix}.flash_pages_per_host_page", last.waf, "ratio", limit=1.0)
    yield Figure(f"{prefix}.flash_pages_per_kv_page", last.written, "ratio", limit=1.0)
    yield Figure(f"{prefix}.tail_bytes", last.tail_bytes / MIB, "MiB")
    spills = [num_bytes for num_bytes in last.append_bytes if num_bytes]
    yield Figure(f"{prefix}.bytes_per_spill", statistics.median(spills) / KIB, "KiB")
    appends = np.concatenate([decoding.appends for decoding in found.decodings])
    spilled = np.concatenate([decoding.append_bytes for decoding in found.decodings]) > 0
    steps = np.concatenate([decoding.steps for decoding in found.decodings])
    step_spilled = np.concatenate([decoding.step_bytes for decoding in found.decodings]) > 0
    for kind, some in (
        ("append", appends[~spilled]),
        ("append_that_spills", appends[spilled]),
        ("step", steps[~step_spilled]),
        ("step_that_spills", steps[step_spilled]),
    ):
        for name, percent in (("median", 50), ("p99", 99), ("max", 100)):
            yield Figure(f"{prefix}.{kind}.{name}", _percentile_us(some, percent), "us")
    yield Figure(
        f"{prefix}.step_that_spills.over_others",
        statistics.median(decoding.stall() for decoding in found.decodings),
        "ratio",
        goal=STALL_GOAL,
        goal_is_maximum=True,
    )


def _figures_from_flash(prefix: str, found: Found, prefilled: float, disk: float | None) -> Iterator[Figure]:
    for name, values in (("as_written", found.cold), ("compacted", found.compacted)):
        bandwidth = statistics.median(values)
        rival = {"rival": "prefilled at once", "rival_value": prefilled / GB, "ratio": bandwidth / prefilled}
        limit = disk / GB if disk else None
        yield Figure(f"{prefix}.cold.{name}.bandwidth", bandwidth / GB, "GB/s", limit=limit, **rival)
        yield Figure(f"{prefix}.cold.{name}.of_prefilled", bandwidth / prefilled, "fraction", goal=COLD_GOAL)
    yield Figure(f"{prefix}.compaction.bandwidth", statistics.median(found.compaction) / GB, "GB/s")


def _best(name: str, found: dict[int, Found], value: Callable[[Found], list[float]]) -> Figure:
    return Figure(name, max(found, key=lambda count: statistics.median(value(found[count]))), "tokens a spill")


def measure(directory: Path, quick: bool = False) -> tuple[list[Figure], dict[int, dict[str, float]]]:
    """All figures; and by tokens a spill what `plot` draws. Drives are made in a temporary folder of
    `directory` and removed."""
    scale = QUICK if quick else Scale()
    keys, values = _tokens(scale.num_tokens + STAGGER_TOKENS * scale.num_sequences)
    found = {count: Found() for count in scale.writeback_tokens}
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as scratch:
        rounds = list(
            itertools.chain.from_iterable(
                _round(Path(scratch), scale, keys, values, found) for _ in range(scale.rounds)
            )
        )
    prefilled = statistics.median(bandwidth for bandwidth, _ in rounds)
    disk = statistics.median(best[0] for _, best in rounds) if all(best for _, best in rounds) else None
    figures = [
        Figure("writeback.prefilled.cold.bandwidth", prefilled / GB, "GB/s", limit=disk / GB if disk else None)
    ]
    for count, of_count in found.items():
        figures += _figures_of_decoding(f"writeback.{count}", of_count)
        figures += _figures_from_flash(f"writeback.{count}", of_count, prefilled, disk)
    figures += [
        _best("writeback.best.tokens_per_second", found, lambda of_count: of_count.tokens_per_second),
        _best("writeback.best.cold", found, lambda of_count: of_count.cold),
    ]
    curves = {
        count: {
            "decoding, tokens/s": statistics.median(of_count.tokens_per_second),
            "cold, as written": statistics.median(of_count.cold) / prefilled,
            "cold, compacted": statistics.median(of_count.compacted) / prefilled,
        }
        for count, of_count in found.items()
    }
    return figures, curves


def plot(curves: dict[int, dict[str, float]], path: Path) -> None:
    """Draw decoding and cold reads over the size of a spill into the PNG file `path`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    best = max(values["decoding, tokens/s"] for values in curves.values())
    for label in next(iter(curves.values())):
        scale = best if label == "decoding, tokens/s" else 1.0
        points = [values[label] / scale for values in curves.values()]
        axes.semilogx(
            list(curves), points, "o-", base=2, label=label if scale == 1.0 else f"decoding, 1 = {best:,.0f}/s"
        )
    axes.set(
        xlabel="tokens a spill", ylabel="share of prefilled data's rate, of the best decoding", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
