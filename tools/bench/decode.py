"""The attention part of decoding with a KV cache four times as large as memory, against who offloads it.

A decode step takes each layer in turn: append the new token's K and V, attend over everything. Contenders
have a process each, held to the same memory cap, and take turns on the same disk, for a machine whose
speed drifts. In a turn the first step is not counted: it finds what was read ahead while others had theirs.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvfs_bench import decode_lmcache, limits
from kvfs_bench.decode_kvfs import Kvfs, KvfsInt8, KvfsWriter
from kvfs_bench.decode_process import ContenderProcess, Step, drop_from_page_cache
from kvfs_bench.decode_rivals import Direct, FlexGen, InMemory, LayerFile
from kvfs_bench.decode_shape import Shape, prompt, reference
from kvfs_bench.figures import Figure
from kvfs_bench.memory_cap import MemoryCap, memory_cap

FULL = Shape(cap_bytes=512 << 20, num_layers=32, num_tokens=16_384)
QUICK = Shape(cap_bytes=48 << 20, num_layers=24, num_tokens=2048)
WARM_UP_STEPS = 2  # a cache that learns what is read again knows it by then
TURNS = 3
STEPS_PER_TURN = 3  # the first of which does not count
REST_SECONDS = 0.2  # what others have begun to read ahead has come
FIO_REQUEST_BYTES = 256 << 10
FIO_DEPTHS = (4, 16)
MB, GB = 1e6, 1e9

KVFS, KVFS_INT8, FLEXGEN, DIRECT = "kvfs", "kvfs_int8", "flexgen", "direct"
LMCACHE, IN_MEMORY = "lmcache", "in_memory"
CLASSES = {
    KVFS: Kvfs,
    KVFS_INT8: KvfsInt8,
    FLEXGEN: FlexGen,
    DIRECT: Direct,
    LMCACHE: decode_lmcache.LMCache,
    IN_MEMORY: InMemory,
}
MEANING = {
    KVFS_INT8: "kvfs, int8 pages",
    FLEXGEN: "FlexGen's way: mapped files, copy threads",
    DIRECT: "direct I/O ahead of torch SDPA",
    LMCACHE: "LMCache's local-disk backend, then torch SDPA",
    IN_MEMORY: "torch SDPA, all in memory, no cap",
}
ERROR_GOAL = {KVFS: 1e-3, KVFS_INT8: 5e-2}
RATIO_GOAL = {FLEXGEN: 3.46, DIRECT: 1.5, LMCACHE: None}


@dataclass
class Run:
    """One contender's part. peak_bytes: charged to its group, None without one."""

    process: ContenderProcess
    cap: MemoryCap | None
    turns: list[list[Step]] = field(default_factory=list)  # the steps that count
    num_steps: int = 0
    out: np.ndarray | None = None  # of the last step

    def take_turn(self, num_uncounted: int, num_counted: int) -> None:
        steps = []
        for _ in range(num_uncounted + num_counted):
            steps.append(self.process.step(self.num_steps))
            self.num_steps += 1
        self.out = steps[-1].out
        self.turns.append(steps[num_uncounted:])

    @property
    def steps(self) -> list[Step]:
        return [step for turn in self.turns for step in turn]

    @property
    def tokens_per_second(self) -> float:
        return 1 / statistics.median(step.seconds for step in self.steps)

    @property
    def disk_bytes(self) -> float:
        """Per token."""
        return statistics.mean(step.disk_bytes for step in self.steps)

    @property
    def disk_bandwidth(self) -> float:
        return self.disk_bytes * self.tokens_per_second

    def fraction_of(self, disk: "Disk") -> float:
        """Of what fio read in the same turn, median of the turns: the disk's speed drifts."""
        return statistics.median(
            sum(step.disk_bytes for step in turn) / sum(step.seconds for step in turn) / bandwidth
            for turn, (bandwidth, _) in zip(self.turns, disk.found, strict=True)
        )


def _write(shape: Shape, folder: Path, status: Callable[[str], None]) -> dict[str, Path]:
    """Each contender's file; none of it is left in the page cache."""
    paths = {name: folder / name for name in (KVFS, KVFS_INT8, FLEXGEN, DIRECT)}
    writers = [
        KvfsWriter(shape, paths[KVFS], Kvfs.DTYPE),
        KvfsWriter(shape, paths[KVFS_INT8], KvfsInt8.DTYPE),
        LayerFile(shape, paths[FLEXGEN], is_head_major=False),
        LayerFile(shape, paths[DIRECT], is_head_major=True),
    ]
    write_prompt(shape, writers, status)
    for path in paths.values():
        drop_from_page_cache(path)
    return paths | {IN_MEMORY: paths[DIRECT], LMCACHE: folder / LMCACHE}


def write_prompt(shape: Shape, writers: Iterable, status: Callable[[str], None]) -> None:
    """All layers to all writers, which are closed in the end."""
    for layer in range(shape.num_layers):
        status(f"layer {layer + 1} of {shape.num_layers} is written for all")
        keys, values = prompt(shape, layer)
        for writer in writers:
            writer.write(layer, keys, values)
    for writer in writers:
        writer.close()


def _written_range(path: Path) -> tuple[int, int]:
    """(offset, size) of the longest part of a file that was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        best, end, size = (0, 0), 0, os.fstat(descriptor).st_size
        while end < size:
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            best = max(best, (end - start, start))
    finally:
        os.close(descriptor)
    return best[1], best[0]


class Disk:
    """fio's best direct read of a file, of some depths, found anew in each turn.

    It reads all of the file: below a virtual disk there may be a cache, and who reads a part again and again
    measures that.
    """

    def __init__(self, path: Path):
        self._path = path
        self._offset, self._size = _written_range(path)
        self.found: list[tuple[float, int]] = []  # bytes/s and the depth, of each turn

    def measure(self) -> None:
        """Adds nothing without fio."""
        best = limits.fio_read_bandwidth(
            self._path, self._offset, self._size, FIO_REQUEST_BYTES, depths=FIO_DEPTHS
        )
        self.found.extend([best] if best is not None else [])

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s, median of the turns; None if unknown."""
        return statistics.median(found for found, _ in self.found) if self.found else None

    @property
    def setting(self) -> str:
        if not self.found:
            return "its limit is unknown without fio"
        turns = ", ".join(f"{depth} in flight {bandwidth / GB:.2f} GB/s" for bandwidth, depth in self.found)
        return f"fio, direct, {FIO_REQUEST_BYTES >> 10} KiB: {turns}"


def _relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def measure_shape(
    shape: Shape,
    directory: Path,
    turns: int,
    status: Callable[[str], None],
    classes: dict[str, type] = CLASSES,
    write: Callable[[Shape, Path, Callable[[str], None]], dict[str, Path]] = _write,
) -> tuple[dict[str, Run], Disk, dict[str, str]]:
    """(what each contender did, the disk, settings in words), files made in `directory` and removed.

    classes: contenders by name, KVFS among them; write: makes their files
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-")))
        paths = write(shape, folder, status)
        disk = Disk(paths[KVFS])
        runs = {}
        for name, contender in classes.items():
            if name == LMCACHE and not decode_lmcache.is_installed():
                continue
            status(f"{name} is set up")
            cap = None
            if name != IN_MEMORY:
                cap = stack.enter_context(memory_cap(f"kvfs-bench-{name}", shape.cap_bytes))
            process = ContenderProcess(contender, shape, paths[name], cap)
            stack.callback(process.close)
            runs[name] = Run(process, cap)
        for turn in range(turns):
            disk.measure()
            for name, run in runs.items():
                status(f"turn {turn + 1} of {turns}: {name}")
                time.sleep(REST_SECONDS)
                run.take_turn(1 if turn else WARM_UP_STEPS, STEPS_PER_TURN - 1)
        peaks = {name: run.cap.peak_bytes() for name, run in runs.items() if run.cap is not None}
        settings = {name: run.process.setting for name, run in runs.items()}
        if LMCACHE in classes:
            settings.setdefault(LMCACHE, "not installed: pip install lmcache")
        settings["memory cap"] = _cap_in_words(shape, peaks)
        settings["disk"] = disk.setting
    return runs, disk, settings


def _cap_in_words(shape: Shape, peaks: dict[str, int | None]) -> str:
    size = f"KV {shape.kv_bytes >> 20} MiB in {shape.num_layers} layers, cap {shape.cap_bytes >> 20} MiB"
    if not peaks:
        return f"{size}, NOT ENFORCED: this user can make no memory control group"
    used = ", ".join(f"{name} {peak >> 20}" for name, peak in peaks.items() if peak is not None)
    return (
        f"{size} by a control group, page cache included, on what a process takes after its imports, tuning and"
        f" compiling; most used, MiB: {used or 'unknown'}"
    )


def _figures(shape: Shape, runs: dict[str, Run], disk: Disk) -> Iterator[Figure]:
    ours = runs[KVFS]
    for name, goal in RATIO_GOAL.items():
        if name not in runs:
            continue
        ratio = ours.tokens_per_second / runs[name].tokens_per_second
        yield Figure(
            f"decode.ratio_vs_{name}",
            ratio,
            "ratio",
            rival=MEANING[name],
            rival_value=runs[name].tokens_per_second,
            ratio=ratio,
            goal=goal,
        )
    for name, run in runs.items():
        in_memory = runs[IN_MEMORY].tokens_per_second
        yield Figure(
            f"decode.{name}.tokens_per_second",
            run.tokens_per_second,
            "tokens/s",
            rival=MEANING[IN_MEMORY] if name == KVFS else None,
            rival_value=in_memory if name == KVFS else None,
            ratio=run.tokens_per_second / in_memory if name == KVFS else None,
        )
    limit = disk.bandwidth
    for name, run in runs.items():
        if name == IN_MEMORY:
            continue
        yield Figure(
            f"decode.{name}.disk_bytes_per_token", run.disk_bytes / MB, "MB", limit=shape.kv_bytes / MB
        )
        yield Figure(
            f"decode.{name}.disk_bandwidth",
            run.disk_bandwidth / GB,
            "GB/s",
            limit=limit / GB if limit else None,
        )
        if limit:
            yield Figure(
                f"decode.{name}.fraction_of_device_bandwidth",
                run.fraction_of(disk),
                "fraction",
                goal=0.95 if name == KVFS else None,
            )
    for name, run in runs.items():
        cpu = statistics.mean(step.cpu_seconds for step in run.steps)
        yield Figure(f"decode.{name}.cpu_seconds_per_token", cpu, "s")
    expected = reference(shape, shape.checked_layer, ours.num_steps)
    for name, run in runs.items():
        # float16 and bfloat16 rivals round as their dtype does; who computed something else is off by 1
        yield Figure(
            f"decode.{name}.relative_error_max",
            _relative_error(run.out, expected),
            "fraction",
            goal=ERROR_GOAL.get(name, 2e-2),
            goal_is_maximum=True,
        )


def measure(
    directory: Path, quick: bool = False, status: Callable[[str], None] = lambda text: None
) -> tuple[list[Figure], dict[str, str]]:
    """(figures, settings in words)."""
    shape = QUICK if quick else FULL
    runs, disk, settings = measure_shape(shape, directory, 1 if quick else TURNS, status)
    return list(_figures(shape, runs, disk)), settings


def plot(directory: Path, path: Path, quick: bool = False, status: Callable[[str], None] = lambda text: None):
    """Tokens/s of every contender over the size of the KV cache, measured anew for each size, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    full = QUICK if quick else FULL
    lines: dict[str, list[float]] = {}
    times_cap = []
    for part in (8, 4, 2, 1):  # half of the cap to four times
        shape = Shape(full.cap_bytes, full.num_layers // part, full.num_tokens)
        times_cap.append(shape.kv_bytes / shape.cap_bytes)
        runs, _, _ = measure_shape(shape, directory, 1, status)
        for name, run in runs.items():
            lines.setdefault(name, []).append(run.tokens_per_second)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, values in lines.items():
        axes.plot(times_cap, values, marker="o", label=MEANING.get(name, name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(times_cap, [f"{value:g}" for value in times_cap])
    axes.set_xlabel(f"KV cache as a multiple of memory ({full.cap_bytes >> 20} MiB)")
    axes.set_ylabel("decode attention, tokens/s")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
