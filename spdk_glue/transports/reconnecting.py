"""Queue pairs over a driver that reports lost connections and makes them again: what is repeated, what is not.

What a lost connection interrupted is sent again once it is back, if doing it twice is the same as once; all
else is reported. Writes that no Flush had made durable may be gone when the drive comes back, since it may have
lost power meanwhile: if it has a volatile cache, every later Flush fails, and who relies on one has to recover.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from spdk_glue import status as nvme_status
from spdk_glue.command import COMPLETION_ENTRY, IoOpcode
from spdk_glue.queue_pair import Buffer, places
from spdk_glue.status import ConnectionLost, Status

REPEATABLE = [
    IoOpcode.FLUSH,
    IoOpcode.WRITE,
    IoOpcode.READ,
    IoOpcode.COMPARE,
    IoOpcode.DATASET_MANAGEMENT,
    IoOpcode.VERIFY,
]
MAX_LOSSES = 5  # one after the other with nothing done in between: a drive that does not stand these commands


class Controller(Protocol):
    """A driver's controller. transport_id, why_lost (the latest time): for messages."""

    transport_id: str
    may_have_lost_writes: bool
    why_lost: str

    def wait_connected(self) -> object: ...

    def admin(self, entry: np.ndarray, data: np.ndarray | None) -> np.ndarray: ...


class DriverQueuePair(Protocol):
    """See pyspdk.controller.QueuePair and fabrics.initiator.queue_pair.QueuePair."""

    depth: int

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int | None = None
    ) -> tuple[np.ndarray, bool]: ...

    def submit(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int: ...

    def poll(self, wait: bool) -> np.ndarray: ...

    def close(self) -> None: ...


class AdminConnection:
    """See queue_pair.Connection: one command at a time."""

    def __init__(self, controller: Controller):
        self._controller = controller
        self._arrived: list[np.ndarray] = []

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        """Admin commands are not sent twice: a lost connection is reported."""
        self._controller.wait_connected()
        completions = [self._controller.admin(entries[i : i + 1], buffer) for i, buffer in enumerate(buffers)]
        found = np.concatenate(completions)
        found["cid"] = entries["cid"]
        return found

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._arrived.append(self.execute(entries, buffers))

    def poll(self, wait: bool) -> np.ndarray:
        arrived, self._arrived = self._arrived, []
        return np.concatenate(arrived) if arrived else np.empty(0, COMPLETION_ENTRY)

    def close(self) -> None:
        """Nothing: the controller has it."""


class IoConnection:
    """See queue_pair.Connection."""

    def __init__(self, controller: Controller, native: DriverQueuePair):
        self._controller = controller
        self._native = native

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        return self._run(entries, addresses, lengths, depth)

    def _run(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int) -> np.ndarray:
        self._check_flush(entries)
        completions, was_lost = self._native.transfer(entries, addresses, lengths, depth)
        losses, num_left = 0, len(entries)
        while was_lost:
            left = np.flatnonzero(nvme_status.decode(completions["status"]) == Status.ABORTED_SQ_DELETION)
            if not np.isin(entries["opcode"][left], REPEATABLE).all():
                raise ConnectionLost(
                    f"{self._controller.transport_id}: the connection was lost during a command that is not "
                    "sent twice: whether it was done is not known"
                )
            losses = losses + 1 if len(left) == num_left else 0
            num_left = len(left)
            if losses == MAX_LOSSES:
                raise ConnectionLost(
                    f"{self._controller.transport_id}: the connection was lost {MAX_LOSSES} times during the"
                    f" same commands: {self._controller.why_lost}"
                )
            self._controller.wait_connected()
            self._check_flush(entries[left])
            completions[left], was_lost = self._native.transfer(
                entries[left], addresses[left], lengths[left], depth
            )
        self._check_flush(entries)
        return completions

    def _check_flush(self, entries: np.ndarray) -> None:
        if self._controller.may_have_lost_writes and (entries["opcode"] == IoOpcode.FLUSH).any():
            raise ConnectionLost(
                f"{self._controller.transport_id}: the connection was lost after writes that were not flushed, "
                "and the drive may have lost them: open it again"
            )

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        return self._run(entries, *places(buffers), len(entries))

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._check_flush(entries)
        addresses, lengths = places(buffers)
        started = 0
        while started < len(entries):  # SPDK may be short of requests for a moment
            part = slice(started, None)
            started += self._native.submit(entries[part], addresses[part], lengths[part])

    def poll(self, wait: bool) -> np.ndarray:
        return self._native.poll(wait)

    def close(self) -> None:
        self._native.close()
