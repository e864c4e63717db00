"""The plug-in for SPDK's target beside SPDK's own target on the same medium, with spdk_nvme_perf as client.

Both targets poll the first CPU, the client polls the second; one of the targets is stopped while the other is
measured. Media: a file on disk by direct I/O, which SPDK reads through its aio block device, and a file in
memory, which both read through the kernel; SPDK's malloc block device, without file or checksums, is the other
bound.
"""

import os
import signal
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

from kvfs_bench.figures import Figure
from kvfs_bench.nvme import perf
from kvfs_bench.nvmf_target import Target
from kvfs_bench.served_drive import ServedDrive
from spdk_glue import spdk_target

GB = 1e9
GOAL = 0.85
DEPTH = 32
NAMESPACE_BYTES = 512 << 20
MEMORY_FOLDER = Path("/dev/shm")
PATTERNS = (
    ("read_128k", 128 << 10, "read", (128 << 10) / GB, "GB/s"),
    ("random_read_4k", 4096, "randread", 1, "reads/s"),
)


def measure(seconds: float, rounds: int) -> Iterator[Figure]:
    """Figures of each medium; none where the plug-in is not built."""
    if not spdk_target.available()[0]:
        return
    for medium, parent in (("disk", None), ("memory", MEMORY_FOLDER)):
        if parent is not None and not os.access(parent, os.W_OK):
            continue
        with tempfile.TemporaryDirectory(dir=parent) as folder, ExitStack() as stack:
            bdevs = {"file": ("aio", Path(folder) / "namespace")}
            if medium == "memory":
                bdevs["malloc"] = ("malloc", NAMESPACE_BYTES)
            theirs = stack.enter_context(closing(_rival(Path(folder), bdevs)))
            ours = stack.enter_context(closing(_served(Path(folder))))
            for nsid, bdev in enumerate(bdevs, start=1):
                yield from _compare(medium, bdev, nsid, ours, theirs, seconds, rounds)


def _rival(folder: Path, bdevs: dict) -> Target:
    content = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8).tobytes()
    with (folder / "namespace").open("wb") as file:
        for _ in range(NAMESPACE_BYTES // len(content)):
            file.write(content)
        os.fsync(file.fileno())
    return Target(folder, bdevs, max_io_size=1 << 20, cpu_mask="0x1", is_polling=True)


def _served(folder: Path) -> ServedDrive:
    """A drive of which every block was written."""
    from kvfs.embedded_drive import Drive, DriveConfig
    from spdk_glue.namespace import Namespace

    Drive.format(folder / "drive", size_bytes=NAMESPACE_BYTES)
    drive = Drive.open(folder / "drive", DriveConfig(num_workers=1))
    namespace = Namespace(drive.transport)
    content = np.random.default_rng(1).integers(0, 256, 8 << 20, np.uint8)
    step = len(content) // namespace.block_bytes
    for first in range(0, namespace.num_lbas, step):
        namespace.write(first, content[: (namespace.num_lbas - first) * namespace.block_bytes])
    namespace.flush()
    drive.close()
    return ServedDrive(folder / "drive", options=["--poll"])


@contextmanager
def _alone(*others):
    """Processes of ours that poll the same CPU, stopped meanwhile."""
    for other in others:
        other.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            other.process.send_signal(signal.SIGCONT)


def _compare(medium, bdev, nsid, ours, theirs, seconds, rounds) -> Iterator[Figure]:
    for name, io_bytes, pattern, scale, unit in PATTERNS:
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            with _alone(theirs):
                rates["ours"].append(perf(ours, io_bytes, pattern, DEPTH, seconds))
            with _alone(ours):
                rates["theirs"].append(perf(theirs, io_bytes, pattern, DEPTH, seconds, nsid))
        mine, rival = (statistics.median(side) * scale for side in rates.values())
        label = f"spdk_plug_in.{medium if bdev == 'file' else bdev}.{name}"
        how = "aio over a file there" if bdev == "file" else "malloc"
        yield Figure(
            label,
            mine,
            unit,
            rival=f"SPDK's target, {how}, depth {DEPTH}",
            rival_value=rival,
            ratio=mine / rival,
            limit=rival,
        )
        yield Figure(f"{label}.ratio", mine / rival, "ratio", goal=GOAL if bdev == "file" else None)
