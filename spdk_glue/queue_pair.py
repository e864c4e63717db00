"""A queue pair: command identifiers, the depth limit, and matching completions to commands.

The protocol rules live here; moving entries and data is the connection's business (a transport's end of
one queue pair). One thread at a time uses a queue pair, as NVMe demands of its hosts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from spdk_glue import dma
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.status import QueueFull

Buffer = np.ndarray | None  # uint8, C-contiguous: what the command reads from or writes to


class Connection(Protocol):
    """A transport's end of one queue pair."""

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        """Start a batch of commands; the buffers stay untouched by the caller until completion."""

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        """Run a batch to its end on the caller's thread; COMPLETION_ENTRY [num_commands]."""

    def poll(self, wait: bool) -> np.ndarray:
        """Completions that have arrived, at least one when `wait`; COMPLETION_ENTRY [any number]."""

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        """As QueuePair.transfer, with at most `depth` commands outstanding."""

    def close(self) -> None: ...


def places(buffers: Sequence[Buffer]) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, lengths) of buffers, int64 [n]; zeros for None."""
    found = [(0, 0) if buffer is None else (dma.address_of(buffer), buffer.nbytes) for buffer in buffers]
    return tuple(np.array(found, np.int64).reshape(-1, 2).T)


def execute_in_batches(
    connection: Connection, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
) -> np.ndarray:
    """Connection.transfer for a transport whose data pass as arrays: one batch of `depth` after the other."""
    completions = np.empty(len(entries), COMPLETION_ENTRY)
    for start in range(0, len(entries), depth):
        batch = slice(start, start + depth)
        pieces = zip(addresses[batch].tolist(), lengths[batch].tolist(), strict=True)
        buffers = [dma.view(address, length) for address, length in pieces]
        entries["cid"][batch] = range(len(buffers))
        completions[batch] = connection.execute(entries[batch], buffers)
    return completions


class QueuePair:
    """At most `depth` commands outstanding on one connection."""

    def __init__(self, connection: Connection, depth: int):
        if not 1 <= depth <= 0xFFFF:
            raise ValueError(f"a queue pair is 1 to 65535 commands deep, not {depth}")
        self._connection = connection
        self.depth = depth
        self._next_cid = 0
        self._outstanding: dict[int, Sequence[Buffer]] = {}  # cid to buffers: kept alive while in flight
        self._completed: dict[int, np.void] = {}

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    def _assign_cids(self, entries: np.ndarray) -> list[int]:
        if len(self._outstanding) + len(entries) > self.depth:
            raise QueueFull(self.depth)
        cids = []
        for _ in range(len(entries)):
            while self._next_cid in self._outstanding or self._next_cid in self._completed:
                self._next_cid = (self._next_cid + 1) & 0xFFFF
            cids.append(self._next_cid)
            self._next_cid = (self._next_cid + 1) & 0xFFFF
        entries["cid"] = cids
        return cids

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> list[int]:
        """Ring the doorbell for a batch: SUBMISSION_ENTRY [n] with a buffer each. Returns their cids.

        Raises QueueFull, with nothing submitted, when the batch does not fit.
        """
        if len(buffers) != len(entries):
            raise ValueError(f"{len(entries)} commands with {len(buffers)} buffers")
        cids = self._assign_cids(entries)
        self._connection.submit(entries, buffers)
        for cid, buffer in zip(cids, buffers, strict=True):
            self._outstanding[cid] = (buffer,)
        return cids

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        """Submit a batch and wait for it: COMPLETION_ENTRY [n] in the order of the commands."""
        self._assign_cids(entries)
        return self._connection.execute(entries, buffers)

    def transfer(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run any number of commands whose data lie at `addresses`, `lengths` bytes each, int64 [n].

        COMPLETION_ENTRY [n] in the order of the commands. As many are outstanding as the queue pair is deep,
        from the first to the last, without Python in between where the transport is native. The caller keeps
        the memory. Raises QueueFull while submitted commands are outstanding.
        """
        if self._outstanding:
            raise QueueFull(self.depth)
        return self._connection.transfer(entries, addresses, lengths, self.depth)

    def _collect(self, wait: bool) -> None:
        for completion in self._connection.poll(wait):
            cid = int(completion["cid"])
            del self._outstanding[cid]
            self._completed[cid] = completion

    def is_done(self, cids: Sequence[int]) -> bool:
        """Whether all of `cids` have completed; never blocks."""
        self._collect(wait=False)
        return all(cid in self._completed for cid in cids)

    def wait(self, cids: Sequence[int]) -> np.ndarray:
        """Completions of `cids`, COMPLETION_ENTRY [n] in their order; blocks until all have arrived.

        Raises ValueError for a cid that is not under way: its completion was handed out, or it never was.
        """
        for cid in cids:
            if cid not in self._outstanding and cid not in self._completed:
                raise ValueError(f"no command {cid} is outstanding")
        while any(cid not in self._completed for cid in cids):
            self._collect(wait=True)
        completions = np.empty(len(cids), COMPLETION_ENTRY)
        for position, cid in enumerate(cids):
            completions[position] = self._completed.pop(cid)
        return completions

    def close(self) -> None:
        try:
            if self._outstanding:
                self.wait(list(self._outstanding))
        finally:
            self._connection.close()
