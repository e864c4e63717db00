"""An I/O queue of a controller: a connection that is made again when it is used after a loss."""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spdk_glue.fabrics.initiator.queue import Queue


@dataclass(frozen=True)
class NamespaceFacts:
    nsid: int
    block_bytes: int
    num_lbas: int


class Association(Protocol):
    """What a queue pair needs of its controller; see controller.Controller."""

    generation: int | None

    def connect_io_queue(self, queue_id: int, depth: int, facts: NamespaceFacts) -> tuple[Queue, int]: ...

    def lose(self, generation: int, why: str) -> None: ...

    def is_proof_due(self, proven_at: float) -> bool: ...

    def are_refused_for_proof(self, completions: np.ndarray) -> np.ndarray: ...

    def prove_again(self, queue: Queue, generation: int) -> None: ...

    def forget(self, queue_pair: "QueuePair") -> None: ...


class QueuePair:
    """One thread at a time, or QueuePairInUse. See Controller.create_queue_pair."""

    def __init__(self, controller: Association, queue_id: int, depth: int, facts: NamespaceFacts):
        self._controller = controller
        self.queue_id = queue_id
        self._facts = facts
        self._aborted: list[np.ndarray] = []  # of submitted commands that a lost connection took
        self._num_submitted = 0
        self._queue, self._generation = controller.connect_io_queue(queue_id, depth, facts)
        self._proven_at = time.monotonic()
        self.depth = self._queue.limits.depth

    def _ready(self) -> Queue:
        """The queue, connected again where that is needed. Raises ConnectionLost, ValueError when closed."""
        if self._queue is None:
            raise ValueError("the queue pair is closed")
        if self._queue.fault or self._generation != self._controller.generation:
            self._queue.shut_down()
            while self._num_submitted > sum(map(len, self._aborted)):
                self._aborted.append(self._queue.poll(wait_ms=1000))
            self._queue.close()
            queue, self._generation = self._controller.connect_io_queue(self.queue_id, self.depth, self._facts)
            self._queue, self._proven_at = queue, time.monotonic()
        return self._queue

    def _prove(self) -> None:
        self._controller.prove_again(self._queue, self._generation)
        self._proven_at = time.monotonic()

    def _lost(self) -> None:
        self._controller.lose(self._generation, self._queue.fault)

    @property
    def fault(self) -> str:
        """Why the connection was lost."""
        return self._queue.fault

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int | None = None
    ) -> tuple[np.ndarray, bool]:
        """See queue.Queue.transfer. Raises ConnectionLost where the connection does not come back,
        AuthenticationFailed."""
        queue = self._ready()
        if self._controller.is_proof_due(self._proven_at) and not self._num_submitted:
            self._prove()
        depth = min(depth or self.depth, queue.limits.depth)
        completions, was_lost = queue.transfer(entries, addresses, lengths, depth)
        refused = self._controller.are_refused_for_proof(completions)
        if refused.any() and not was_lost and not self._num_submitted:
            self._prove()
            completions[refused], was_lost = queue.transfer(
                entries[refused], addresses[refused], lengths[refused], depth
            )
        if was_lost:
            self._lost()
        return completions, was_lost

    def submit(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
        """Start a batch: their number. Raises as transfer."""
        while not self._ready().submit(entries, addresses, lengths):
            self._lost()
        self._num_submitted += len(entries)
        return len(entries)

    def poll(self, wait: bool) -> np.ndarray:
        """Completions of submitted commands, COMPLETION_ENTRY [n], with `wait` at least one if any is
        outstanding.

        Commands that a lost connection took complete with status 08h (aborted).
        """
        if self._aborted:
            found = np.concatenate(self._aborted)
            self._aborted.clear()
        else:
            found = self._queue.poll(0)
            while wait and not len(found) and self._num_submitted:
                found = self._queue.poll(1000)
            if self._queue.fault:
                self._lost()
        self._num_submitted -= len(found)
        return found

    def shut_down(self) -> None:
        queue = self._queue
        if queue is not None:
            queue.shut_down()

    def close(self) -> None:
        """Give it back; commands under way are aborted. Raises QueuePairInUse."""
        if self._queue is None:
            return
        self._queue.close()
        self._queue = None
        self._controller.forget(self)
