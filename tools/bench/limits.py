"""What the machine allows: memory bandwidth, and the disk's through fio or through direct writes."""

import json
import os
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
from numba import njit

REPEATS = 7


@njit(nogil=True, fastmath=True, cache=True)
def _sum(values):
    total = np.float32(0)
    for index in range(len(values)):
        total += values[index]
    return total


def run_threads(function, count: int) -> float:
    """Seconds in which `count` threads, each on a CPU of its own, run function(thread number)."""
    cpus = sorted(os.sched_getaffinity(0))
    ready, done = threading.Barrier(count + 1), threading.Barrier(count + 1)

    def run(number: int) -> None:
        os.sched_setaffinity(0, {cpus[number % len(cpus)]})
        ready.wait()
        function(number)
        done.wait()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    done.wait()
    return time.perf_counter() - start


def memory_read_bandwidth(num_threads: int, size_bytes: int = 512 << 20, repeats: int = REPEATS) -> float:
    """Bytes/s of reading memory once with all threads, median."""
    values = np.ones(size_bytes // 4, np.float32)
    _sum(values[:16])
    parts = np.array_split(values, num_threads)
    return statistics.median(
        size_bytes / run_threads(lambda number: _sum(parts[number]), num_threads) for _ in range(repeats)
    )


def fio_read_bandwidth(path: Path, offset: int, size: int, request_bytes: int, depths=(2, 4, 8, 16)):
    """(bytes/s, queue depth): fio's best sequential direct read of a range of a file; None without fio."""
    if shutil.which("fio") is None:
        return None
    best = (0.0, 0)
    for depth in depths:
        command = [
            "fio", "--name=read", f"--filename={path}", "--rw=read", f"--bs={request_bytes}", "--direct=1",
            "--ioengine=io_uring", f"--iodepth={depth}", f"--offset={offset}", f"--size={size}",
            "--readonly", "--output-format=json", "--loops=2",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        bandwidth = json.loads(result.stdout)["jobs"][0]["read"]["bw_bytes"]
        best = max(best, (float(bandwidth), depth))
    return best


def fio_write_bandwidth(directory: Path, size: int, request_bytes: int = 1 << 20, depths=(4, 8)):
    """(bytes/s, queue depth): fio's best sequential direct write of a new file; None without fio."""
    if shutil.which("fio") is None:
        return None
    best = (0.0, 0)
    for depth in depths:
        path = directory / "kvfs-bench-write.tmp"
        try:
            command = [
                "fio", "--name=write", f"--filename={path}", "--rw=write", f"--bs={request_bytes}",
                "--direct=1",
                "--ioengine=io_uring", f"--iodepth={depth}", f"--size={size}", "--fallocate=none",
                "--end_fsync=1", "--output-format=json",
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True, check=True)
        finally:
            path.unlink(missing_ok=True)
        best = max(best, (float(json.loads(result.stdout)["jobs"][0]["write"]["bw_bytes"]), depth))
    return best
