"""Running a sequence of bring_up.py, or one command, on a queue with nothing else under way."""

import time

import numpy as np

from spdk_glue import dma
from spdk_glue.fabrics.initiator.queue import Queue
from spdk_glue.status import ConnectionRefused

TIMEOUT_MS = 5000  # of each command


def place(data: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, lengths) of one command's data."""
    if data is None:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    return np.array([dma.address_of(data)], np.int64), np.array([data.nbytes], np.int64)


def run_with_data(queue: Queue, entry: np.ndarray, data: np.ndarray | None) -> np.ndarray:
    """COMPLETION_ENTRY [1]. Raises ConnectionRefused where the connection is lost."""
    completions, was_lost = queue.transfer(entry, *place(data), timeout_ms=TIMEOUT_MS)
    if was_lost:
        raise ConnectionRefused(queue.fault)
    return completions


def run_steps(sequence, queue: Queue) -> None:
    """A sequence to its end. Raises ConnectionRefused, AuthenticationFailed."""
    cid = 0
    while (step := sequence.step()) is not None:
        if step.pause_ms:
            time.sleep(step.pause_ms / 1000)
        step.entry["cid"] = cid
        cid = cid + 1 & 0xFFF
        sequence.answered(run_with_data(queue, step.entry, step.data))
