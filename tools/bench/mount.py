"""The mount beside pyfuse3's bare passthrough of a folder on the same disk, and beside that disk itself.

fio moves the data, a process of its own makes, looks at and removes files. For every figure all targets are
measured one right after the other, in turn and round after round; the ratio is the median of the rounds' own.
Nothing that is read is in a cache before: the pages of the folder are dropped, and the drive reads flash past
them.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import remote
from kvfs_bench.figures import Figure

DISK, PASSTHROUGH, MOUNT = "disk", "pyfuse3 passthrough", "kvfs"
SEQUENTIAL_GOAL, RANDOM_GOAL, METADATA_GOAL = 0.9, 0.7, 0.5  # of the passthrough
START_S = 60


@dataclass(frozen=True)
class Scale:
    file_bytes: int
    num_files: int
    random_s: int
    rounds: int
    file_rounds: int


FULL = Scale(file_bytes=512 << 20, num_files=100_000, random_s=5, rounds=7, file_rounds=2)
QUICK = Scale(file_bytes=32 << 20, num_files=500, random_s=1, rounds=1, file_rounds=1)
Rates = dict[str, dict[str, list[float]]]  # by figure, then by target, of each round


@contextmanager
def served(command: list[str], mountpoint: Path) -> Iterator[Path]:
    """A mount served by a process of its own until the end."""
    mountpoint.mkdir()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_S
        while not os.path.ismount(mountpoint):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"{' '.join(command)}: {server.communicate()[1].strip()}")
            time.sleep(0.05)
        yield mountpoint
    finally:
        if os.path.ismount(mountpoint):
            unmount = ["fusermount3", "-u"] if shutil.which("fusermount3") else ["umount"]
            subprocess.run([*unmount, str(mountpoint)], check=True)
        server.wait(START_S)


def drop_caches(folder: Path) -> None:
    """What the kernel keeps of a folder's files leaves memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fio(path: Path, size: int, **options) -> dict:
    """One fio job on one file; the job's figures."""
    command = ["fio", "--name=job", f"--filename={path}", f"--size={size}", "--ioengine=psync"]
    command += ["--output-format=json", "--invalidate=1", "--allow_mounted_write=1"]
    command += [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"fio: {result.stderr.strip() or result.stdout.strip()}")
    return json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]


METADATA_CLIENT = """
import os, sys, time
folder, count = sys.argv[1], int(sys.argv[2])
per_folder = 1000
folders = [f"{folder}/{number:03}" for number in range(-(-count // per_folder))]
for name in folders: os.mkdir(name)
paths = [f"{folders[number // per_folder]}/file-{number:06}" for number in range(count)]
times = [time.perf_counter()]
for path in paths: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
times.append(time.perf_counter())
for path in paths: os.stat(path)
times.append(time.perf_counter())
for path in paths: os.unlink(path)
times.append(time.perf_counter())
for name in folders: os.rmdir(name)
print(*(count / (stop - start) for start, stop in zip(times, times[1:])))
"""


def metadata_rates(folder: Path, count: int) -> dict[str, float]:
    """Files created, looked at and removed per second."""
    target = folder / "many"
    target.mkdir()
    command = [sys.executable, "-c", METADATA_CLIENT, str(target), str(count)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    target.rmdir()
    return dict(zip(("create", "stat", "unlink"), map(float, output.split()), strict=True))


@dataclass(frozen=True)
class Target:
    """place: a folder to work in; backing: what lies on the disk for it; keys: a KV file, or its copy."""

    place: Path
    backing: Path
    keys: Path

    @property
    def _file(self) -> Path:
        return self.place / "bench.dat"

    def figures(self, scale: Scale) -> dict[str, Callable[[], float]]:
        """In the order in which they are measured: bytes/s of 1 MiB requests, requests/s of 4 KiB."""
        found = {}
        for kind, direct in (("buffered", 0), ("direct", 1)):
            found[f"write_1m_{kind}"] = partial(self._write, scale, direct)
            found[f"read_1m_{kind}"] = partial(self._read, self._file, direct)
        found["read_4k"] = partial(self._read_4k, scale)
        for kind, direct in (("buffered", 0), ("direct", 1)):
            found[f"kv_read_1m_{kind}"] = partial(self._read, self.keys, direct)
        return found

    def _write(self, scale: Scale, direct: int) -> float:
        self._file.unlink(missing_ok=True)
        os.sync()  # what removing it takes is not the next one's to pay
        options = {"rw": "write", "bs": "1M", "end_fsync": 1, "fallocate": "none"}
        return fio(self._file, scale.file_bytes, direct=direct, **options)["write"]["bw_bytes"]

    def _read(self, path: Path, direct: int) -> float:
        drop_caches(self.backing)
        size = path.stat().st_size >> 20 << 20
        return fio(path, size, rw="read", bs="1M", direct=direct, readonly=None)["read"]["bw_bytes"]

    def _read_4k(self, scale: Scale) -> float:
        drop_caches(self.backing)
        options = {"rw": "randread", "bs": "4k", "runtime": scale.random_s, "time_based": 1}
        return fio(self._file, scale.file_bytes, direct=1, readonly=None, **options)["read"]["iops"]


def _write_sequence(drive: Path, num_tokens: int) -> None:
    """One layer and head, so that a file of keys is as large as it can be."""
    with kvfs.open(drive) as store:
        model = store.add_model("bench", num_layers=1, num_query_heads=8, num_kv_heads=8, head_dim=128)
        sequence = store.create_sequence(model, "long")
        rows = np.random.default_rng(1).standard_normal((4096, 8, 128), np.float32).astype(np.float16)
        for _ in range(0, num_tokens, len(rows)):
            sequence.append(0, rows, rows)


def measure(directory: Path, quick: bool, progress: Callable[[str], None]) -> list[Figure]:
    """All figures. progress: told what begins. Raises RuntimeError where a mount or fio fails."""
    scale = QUICK if quick else FULL
    num_tokens = scale.file_bytes // 8 // 256
    rates: Rates = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=directory)))
        folder, drive = root / "folder", root / "drive"
        folder.mkdir()
        drive.mkdir()
        image = drive / "bench.kvfs"
        kvfs.format(image, 6 * scale.file_bytes + (256 << 20))
        _write_sequence(image, num_tokens)
        keys = "kv/bench/long/layer_00/kv_head_00/keys.npy"
        python = [sys.executable, "-m"]
        passthrough = [*python, "kvfs_bench.passthrough", str(folder), str(root / "passthrough")]
        stack.enter_context(served(passthrough, root / "passthrough"))
        mount = [*python, "kvfsctl", "mount", str(image), str(root / "mount"), "--foreground"]
        stack.enter_context(served(mount, root / "mount"))
        # the rival reads a copy of the same bytes
        shutil.copyfile(root / "mount" / keys, folder / "keys.npy")
        targets = {
            DISK: Target(folder, folder, folder / "keys.npy"),
            PASSTHROUGH: Target(root / "passthrough", folder, root / "passthrough" / "keys.npy"),
            MOUNT: Target(root / "mount", drive, root / "mount" / keys),
        }
        figures = {name: target.figures(scale) for name, target in targets.items()}
        for number in range(scale.rounds):
            progress(f"round {number + 1} of {scale.rounds}")
            for name in figures[MOUNT]:
                for target in _rotated(list(targets), number):
                    rates.setdefault(name, {}).setdefault(target, []).append(figures[target][name]())
        for number in range(scale.file_rounds):
            for target in _rotated(list(targets), number):
                progress(f"round {number + 1} of {scale.file_rounds}: files in the {target}")
                for name, value in metadata_rates(targets[target].place, scale.num_files).items():
                    rates.setdefault(name, {}).setdefault(target, []).append(value)
    progress("a store in another process")
    return [*_figures(rates), *remote.measure(directory, quick)]


GOALS = {"read_4k": RANDOM_GOAL, "create": METADATA_GOAL, "stat": METADATA_GOAL, "unlink": METADATA_GOAL}


def _rotated(targets: list[str], number: int) -> list[str]:
    """Who is first changes from round to round."""
    start = number % len(targets)
    return targets[start:] + targets[:start]


def _figures(rates: Rates) -> Iterator[Figure]:
    """A disk's speed changes from minute to minute: what was measured one after the other is compared."""
    for name, of_targets in rates.items():
        scale, unit = (1e9, "GB/s") if "1m" in name else (1.0, "/s")
        ratio = statistics.median(
            value / rival for value, rival in zip(of_targets[MOUNT], of_targets[PASSTHROUGH], strict=True)
        )
        median = {target: statistics.median(values) / scale for target, values in of_targets.items()}
        yield Figure(
            f"mount.{name}", median[MOUNT], unit, rival=PASSTHROUGH, rival_value=median[PASSTHROUGH],
            ratio=ratio, limit=median[DISK], goal=GOALS.get(name, SEQUENTIAL_GOAL) * median[MOUNT] / ratio,
        )  # fmt: skip
