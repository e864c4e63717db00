"""The plug-in for SPDK's target beside SPDK's own target, each polling the first CPU: see nvme_target.py."""

from collections.abc import Iterator

from kvfs_bench.figures import Figure
from kvfs_bench.nvme_target import beside_spdk
from kvfs_bench.served_drive import ServedDrive
from spdk_glue import spdk_target

GOALS = {"read_128k": 0.85, "random_read_4k": 0.85}


def measure(seconds: float, rounds: int) -> Iterator[Figure]:
    """Figures of each medium; none where the plug-in is not built."""
    if spdk_target.available()[0]:
        yield from beside_spdk("spdk_plug_in", _serve, GOALS, seconds, rounds)


def _serve(drive) -> ServedDrive:
    return ServedDrive(drive, options=["--poll"])
