"""Reading everything that is on the drive before anybody needs it."""

from collections.abc import Iterator
from dataclasses import dataclass

from spdk_glue.namespace import Namespace

STEP_LBAS = 4096  # verified by one command: 16 MiB, some milliseconds


@dataclass(frozen=True)
class Verified:
    """Progress of verify_all: blocks verified so far, of how many, and those found lost since the last one."""

    num_lbas: int
    total_lbas: int
    lost: list[int]


def verify_all(namespace: Namespace) -> Iterator[Verified]:
    """Have the drive read each block that is on flash; it repairs what parity can. A report per step."""
    extents = list(namespace.allocated())
    total = sum(count for _, count in extents)
    done = 0
    for first, count in extents:
        for start in range(first, first + count, STEP_LBAS):
            step = min(STEP_LBAS, first + count - start)
            lost = namespace.lost(start, step)
            done += step
            yield Verified(done, total, lost)
