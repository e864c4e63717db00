"""kvfs's own NVMe/TCP target beside SPDK's on the same medium, by spdk_nvme_perf; attention over TCP.

Both targets have the first CPU, the client polls the second; SPDK's polls, ours sleeps when it has nothing to
do. One of them is stopped while the other is measured. Media: a file on disk by direct I/O, which SPDK reads
through its aio block device, and a file in memory, which both read through the kernel; SPDK's malloc block
device, without file or checksums, is the other bound.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

from kvfs_bench.figures import Figure
from kvfs_bench.nvmf_target import Target

GB = 1e9
DEPTH = 32
NAMESPACE_BYTES = 512 << 20
MEMORY_FOLDER = Path("/dev/shm")
PATTERNS = (
    ("read_128k", 128 << 10, "read", (128 << 10) / GB, "GB/s"),
    ("random_read_4k", 4096, "randread", 1, "reads/s"),
)
GOALS = {"read_128k": 0.6, "random_read_4k": 0.15}
NQN = "nqn.2026-11.io.kvfs:bench"
ATTENTION_ROUNDS = 1200
ATTENTION_TURNS = 3
ATTENTION_GOAL_US = 150
IN_PROCESS_GOAL_US = 30


class OwnTarget:
    """A `kvfsctl serve` process. cpu: where it runs, None for anywhere"""

    def __init__(self, drive: Path, *options: str, cpu: int | None = 0):
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        self.process = subprocess.Popen(
            [
                *(
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *pinned,
                    sys.executable,
                    "-m",
                    "kvfsctl",
                    "serve",
                    str(drive),
                ),
                *("--listen", "127.0.0.1:0", "--nqn", NQN, "--cache-bytes", "16MiB", "--json", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        text = ""
        for line in self.process.stdout:
            text += line
            if line.startswith("}"):
                break
        if not text:
            raise RuntimeError("the drive is not served")
        self.port = json.loads(text)["port"]

    @property
    def transport_id(self) -> str:
        return f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{self.port} subnqn:{NQN}"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()


def measure(seconds: float, rounds: int) -> Iterator[Figure]:
    """Figures of each medium, and of attention."""
    yield from beside_spdk("target", OwnTarget, GOALS, seconds, rounds)
    yield from attention(ATTENTION_ROUNDS if rounds > 1 else ATTENTION_ROUNDS // 8)


def beside_spdk(
    prefix: str, serve: Callable, goals: dict[str, float], seconds: float, rounds: int
) -> Iterator[Figure]:
    """Figures of each medium, their names with a prefix. serve: a drive's path to what exports it, with a
    `transport_id`, a `process` and `close`.
    """
    for medium, parent in (("disk", None), ("memory", MEMORY_FOLDER)):
        if parent is not None and not os.access(parent, os.W_OK):
            continue
        with tempfile.TemporaryDirectory(dir=parent) as folder, ExitStack() as stack:
            bdevs = {"file": ("aio", Path(folder) / "namespace")}
            if medium == "memory":
                bdevs["malloc"] = ("malloc", NAMESPACE_BYTES)
            theirs = stack.enter_context(closing(_rival(Path(folder), bdevs)))
            _write_drive(Path(folder) / "drive")
            ours = stack.enter_context(closing(serve(Path(folder) / "drive")))
            for nsid, bdev in enumerate(bdevs, start=1):
                label = f"{prefix}.{medium if bdev == 'file' else bdev}"
                how = "aio over a file there" if bdev == "file" else "malloc"
                wanted = goals if bdev == "file" else {}
                yield from _compare(label, how, wanted, nsid, ours, theirs, seconds, rounds)


def _rival(folder: Path, bdevs: dict) -> Target:
    content = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8).tobytes()
    with (folder / "namespace").open("wb") as file:
        for _ in range(NAMESPACE_BYTES // len(content)):
            file.write(content)
        os.fsync(file.fileno())
    return Target(folder, bdevs, max_io_size=1 << 20, cpu_mask="0x1", is_polling=True)


def _write_drive(path: Path) -> None:
    """A drive of which every block was written."""
    from kvfs.embedded_drive import Drive, DriveConfig
    from spdk_glue.namespace import Namespace

    Drive.format(path, size_bytes=NAMESPACE_BYTES)
    drive = Drive.open(path, DriveConfig(num_workers=1))
    namespace = Namespace(drive.transport)
    content = np.random.default_rng(1).integers(0, 256, 8 << 20, np.uint8)
    step = len(content) // namespace.block_bytes
    for first in range(0, namespace.num_lbas, step):
        namespace.write(first, content[: (namespace.num_lbas - first) * namespace.block_bytes])
    namespace.flush()
    drive.close()


@contextmanager
def _alone(other):
    """The other target polls the same CPU: it is stopped meanwhile."""
    other.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        other.process.send_signal(signal.SIGCONT)


def _compare(label, how, goals, nsid, ours, theirs, seconds, rounds) -> Iterator[Figure]:
    from kvfs_bench.nvme import perf

    for name, io_bytes, pattern, scale, unit in PATTERNS:
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            with _alone(theirs):
                rates["ours"].append(perf(ours, io_bytes, pattern, DEPTH, seconds))
            with _alone(ours):
                rates["theirs"].append(perf(theirs, io_bytes, pattern, DEPTH, seconds, nsid))
        mine, rival = (statistics.median(side) * scale for side in rates.values())
        yield Figure(
            f"{label}.{name}",
            mine,
            unit,
            rival=f"SPDK's target, {how}, depth {DEPTH}",
            rival_value=rival,
            ratio=mine / rival,
            limit=rival,
        )
        yield Figure(f"{label}.{name}.ratio", mine / rival, "ratio", goal=goals.get(name))


def attention(num_commands: int) -> Iterator[Figure]:
    """One attention command, in process and over TCP by our own host and by SPDK's: its time without that of
    the computation. The two hosts take turns: the speed of a shared machine drifts."""
    from accel.drive import Drive, DriveConfig

    with tempfile.TemporaryDirectory() as folder:
        drive = Path(folder) / "drive"
        descriptor, answer_bytes = _descriptor(drive)
        with closing(Drive.open(drive, DriveConfig(cache_bytes=16 << 20))) as here:
            over_here, _ = _times(here.transport, descriptor, answer_bytes, num_commands)
        np.save(Path(folder) / "descriptor.npy", descriptor)
        hosts = {"initiator": [], "target": []}
        with closing(OwnTarget(drive, cpu=None)) as target:
            locations = f"nvme+tcp://127.0.0.1:{target.port}/{NQN}", f"spdk:{target.transport_id}"
            for _ in range(ATTENTION_TURNS):
                for times, location in zip(hosts.values(), locations, strict=True):
                    how = (location, folder, answer_bytes, num_commands // ATTENTION_TURNS)
                    times.append(_in_a_process(*how))
    yield Figure(
        "attention.in_process.over_kernel", over_here, "us", goal=IN_PROCESS_GOAL_US, goal_is_maximum=True
    )
    for name, times in hosts.items():
        over, kernel = (statistics.median(column) for column in zip(*times, strict=True))
        yield Figure(f"{name}.attention.kernel", kernel, "us")
        yield Figure(f"{name}.attention.over_kernel", over, "us", goal=ATTENTION_GOAL_US, goal_is_maximum=True)


def _in_a_process(*arguments) -> tuple[float, float]:
    """What attention_times returns."""
    call = f"attention_times({', '.join(map(repr, arguments))})"
    done = subprocess.run(
        [sys.executable, "-c", f"from kvfs_bench.nvme_target import attention_times; print({call})"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:])
    return tuple(json.loads(done.stdout))


def _descriptor(drive: Path) -> tuple[np.ndarray, int]:
    """A new drive with a short sequence, and a command over it: (descriptor, bytes of its answer)."""
    import kvfs

    kvfs.format(drive, "64MiB")
    found = []
    rng = np.random.default_rng(2)
    with kvfs.open(drive, cache_bytes="16MiB") as store:
        model = store.add_model("m", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=128)
        sequence = store.create_sequence(model, "s")
        rows = rng.standard_normal((512, 2, 128), np.float32).astype(np.float16)
        sequence.append(0, rows, rows)
        sequence.flush()
        namespace = store._namespace
        submit, fetch = namespace.attention_submit, namespace.attention_fetch
        namespace.attention_submit = lambda descriptor: (found.append(descriptor.copy()), submit(descriptor))[1]
        namespace.attention_fetch = lambda ticket, size: (found.append(size), fetch(ticket, size))[1]
        queries = rng.standard_normal((1, 1, 8, 128), np.float32).astype(np.float16)
        store.attend(0, queries, [sequence])
    return found[0], found[1]


def attention_times(location: str, folder: str, answer_bytes: int, num_commands: int) -> str:
    """JSON [median us of a command over its kernel's time, that time]; in a process of its own."""
    from spdk_glue.transports.url import open_transport

    descriptor = np.load(Path(folder) / "descriptor.npy")
    return json.dumps(_times(open_transport(location), descriptor, answer_bytes, num_commands))


def _times(transport, descriptor: np.ndarray, answer_bytes: int, num_commands: int) -> tuple[float, float]:
    from spdk_glue.namespace import Namespace
    from spdk_glue.vendor_command import ANSWER_HEADER

    namespace = Namespace(transport)
    over, kernel = [], []
    for number in range(num_commands + 20):
        start = time.perf_counter_ns()
        answer = namespace.attend(descriptor, answer_bytes)
        spent = time.perf_counter_ns() - start
        if number >= 20:  # compiled, cached
            kernel_ns = int(answer[: ANSWER_HEADER.itemsize].view(ANSWER_HEADER)["kernel_ns"][0])
            over.append(spent - kernel_ns)
            kernel.append(kernel_ns)
    namespace.close()
    return statistics.median(over) / 1e3, statistics.median(kernel) / 1e3
