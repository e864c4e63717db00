"""The mount beside pyfuse3's bare passthrough of a folder on the same disk, and beside that disk itself.

fio moves the data, a process of its own makes, looks at and removes files. Every target is measured in turn,
each round anew; medians are compared. Nothing that is read is in a cache before: the pages of the folder are
dropped, and the drive reads flash past them.
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
    repeats: int


FULL = Scale(file_bytes=1 << 30, num_files=100_000, random_s=10, repeats=3)
QUICK = Scale(file_bytes=32 << 20, num_files=500, random_s=1, repeats=1)


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


def _data_rates(folder: Path, backing: Path, scale: Scale) -> dict[str, float]:
    """Bytes/s of 1 MiB requests and requests/s of 4 KiB, on one file that is removed in the end."""
    path, size = folder / "bench.dat", scale.file_bytes
    rates = {}
    for kind, direct in (("buffered", 0), ("direct", 1)):
        path.unlink(missing_ok=True)
        job = fio(path, size, rw="write", bs="1M", direct=direct, end_fsync=1, fallocate="none")
        rates[f"write_1m_{kind}"] = job["write"]["bw_bytes"]
        drop_caches(backing)
        job = fio(path, size, rw="read", bs="1M", direct=direct)
        rates[f"read_1m_{kind}"] = job["read"]["bw_bytes"]
    drop_caches(backing)
    job = fio(path, size, rw="randread", bs="4k", direct=1, runtime=scale.random_s, time_based=1)
    rates["read_4k"] = job["read"]["iops"]
    path.unlink()
    return rates


def _kv_rates(keys: Path, backing: Path) -> dict[str, float]:
    rates = {}
    for kind, direct in (("buffered", 0), ("direct", 1)):
        drop_caches(backing)
        size = keys.stat().st_size >> 20 << 20
        job = fio(keys, size, rw="read", bs="1M", direct=direct, readonly=None)
        rates[f"kv_read_1m_{kind}"] = job["read"]["bw_bytes"]
    return rates


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
    rates: dict[str, dict[str, list[float]]] = {target: {} for target in (DISK, PASSTHROUGH, MOUNT)}
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
            DISK: (folder, folder, folder / "keys.npy"),
            PASSTHROUGH: (root / "passthrough", folder, root / "passthrough" / "keys.npy"),
            MOUNT: (root / "mount", drive, root / "mount" / keys),
        }
        for number in range(scale.repeats):
            for target, (place, backing, keys_path) in targets.items():
                progress(f"round {number + 1} of {scale.repeats}: {target}")
                found = {
                    **_data_rates(place, backing, scale),
                    **_kv_rates(keys_path, backing),
                    **metadata_rates(place, scale.num_files),
                }
                for name, value in found.items():
                    rates[target].setdefault(name, []).append(value)
    progress("a store in another process")
    return [*_figures(rates), *remote.measure(directory, quick)]


GOALS = {"read_4k": RANDOM_GOAL, "create": METADATA_GOAL, "stat": METADATA_GOAL, "unlink": METADATA_GOAL}


def _figures(rates: dict[str, dict[str, list[float]]]) -> Iterator[Figure]:
    median = {
        target: {name: statistics.median(values) for name, values in of_target.items()}
        for target, of_target in rates.items()
    }
    for name, value in median[MOUNT].items():
        scale, unit = (1e9, "GB/s") if "1m" in name else (1.0, "/s")
        rival = median[PASSTHROUGH][name]
        yield Figure(
            f"mount.{name}", value / scale, unit, rival=PASSTHROUGH, rival_value=rival / scale,
            ratio=value / rival, limit=median[DISK][name] / scale,
            goal=GOALS.get(name, SEQUENTIAL_GOAL) * rival / scale,
        )  # fmt: skip
