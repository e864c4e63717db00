"""Controllers and queue pairs of SPDK's NVMe driver.

Commands are SUBMISSION_ENTRY records, answers COMPLETION_ENTRY records (spdk_glue/command.py). Data lie at
addresses, uint64 [n], with their lengths in bytes; the caller keeps them until the completion.
"""

import contextlib
import errno
import os
import threading
from dataclasses import dataclass

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.pyspdk import environment
from spdk_glue.pyspdk.environment import last_error, library
from spdk_glue.status import ConnectionLost, ConnectionRefused, NvmeError, QueuePairInUse

COMMAND_TIMEOUT_MS = 30_000
RECONNECT_MS = 15_000
MAX_QUEUE_DEPTH = 1024


@dataclass(frozen=True)
class NamespaceFacts:
    nsid: int
    block_bytes: int
    num_lbas: int


class Controller:
    """One NVMe controller. A thread of its own keeps the connection alive, and restores it after a loss.

    transport_id: as SPDK's tools take it, `trtype:TCP traddr:127.0.0.1 trsvcid:4420 subnqn:...`,
    `trtype:VFIOUSER traddr:FOLDER`, `trtype:PCIe traddr:0000:01:00.0`.
    Raises SpdkUnavailable, ConnectionRefused.
    """

    def __init__(
        self,
        transport_id: str,
        *,
        hostnqn: str | None = None,
        header_digest: bool = False,
        data_digest: bool = False,
        keep_alive_ms: int = 10_000,
        queue_depth: int = 512,
        reconnect_ms: int = RECONNECT_MS,
    ):
        environment.start(pci="PCIE" in transport_id.upper())
        self.transport_id = transport_id
        self.reconnect_ms = reconnect_ms
        self._ffi, self._lib = ffi, lib = library()
        name = ffi.NULL if hostnqn is None else ffi.new("char[]", hostnqn.encode())
        options = ffi.new(
            "pyspdk_controller_options *",
            {
                "keep_alive_ms": keep_alive_ms,
                "io_queue_size": queue_depth + 1,
                "hostnqn": name,
                "header_digest": header_digest,
                "data_digest": data_digest,
            },
        )
        result = ffi.new("int *")
        self._handle = lib.pyspdk_connect(transport_id.encode(), options, result)
        if self._handle == ffi.NULL:
            if result[0] == -errno.EINVAL:
                raise ConnectionRefused(f"{transport_id!r} is not a transport id: {last_error('malformed')}")
            raise ConnectionRefused(
                f"no NVMe controller answers at {transport_id}: {last_error('no reason given')}"
            )
        self._lock = threading.Lock()
        self._queue_pairs: set[QueuePair] = set()
        self.max_transfer_bytes = lib.pyspdk_max_transfer_bytes(self._handle)
        self.moves_by_dma = bool(lib.pyspdk_moves_by_dma(self._handle))

    def __repr__(self) -> str:
        return f"Controller({self.transport_id!r})"

    @property
    def is_lost(self) -> bool:
        """Whether the connection is down at this moment."""
        return bool(self._lib.pyspdk_state(self._open_handle) & 1)

    @property
    def may_have_lost_writes(self) -> bool:
        """Whether the connection went at some time with writes in the drive that no Flush had made durable."""
        return bool(self._lib.pyspdk_state(self._open_handle) & 2)

    @property
    def why_lost(self) -> str:
        return last_error("SPDK gives no reason")

    @property
    def _open_handle(self):
        if self._handle is None:
            raise ValueError("the controller is closed")
        return self._handle

    def namespaces(self) -> list[NamespaceFacts]:
        """The active namespaces."""
        found, nsid = [], 0
        num_lbas = self._ffi.new("uint64_t *")
        while nsid := self._lib.pyspdk_next_namespace(self._open_handle, nsid):
            block_bytes = self._lib.pyspdk_namespace(self._open_handle, nsid, num_lbas)
            if block_bytes:
                found.append(NamespaceFacts(nsid, block_bytes, num_lbas[0]))
        return found

    def wait_connected(self) -> None:
        """Return once the connection is there. Raises ConnectionLost after `reconnect_ms`."""
        if self._lib.pyspdk_wait_connected(self._open_handle, self.reconnect_ms):
            raise self.lost("no connection")

    def lost(self, what: str) -> ConnectionLost:
        return ConnectionLost(
            f"{self.transport_id}: {what} for {self.reconnect_ms / 1000:g} s: "
            "see whether the target runs and can be reached"
        )

    def admin(self, entry: np.ndarray, data: np.ndarray | None) -> np.ndarray:
        """Run one admin command, its data uint8 [any]: COMPLETION_ENTRY [1].

        Raises ConnectionLost, ValueError for more data than one command moves.
        """
        size = 0 if data is None else data.nbytes
        memory = self._ffi.NULL if data is None else self._ffi.from_buffer("uint8_t *", data)
        completion = np.zeros(1, COMPLETION_ENTRY)
        result = self._lib.pyspdk_admin(
            self._open_handle,
            self._ffi.from_buffer("pyspdk_entry *", entry),
            memory,
            size,
            COMMAND_TIMEOUT_MS,
            self._ffi.from_buffer("pyspdk_completion *", completion),
        )
        if result == -errno.EMSGSIZE:
            raise ValueError(f"{size} bytes are more than one command moves ({self.max_transfer_bytes})")
        if result == -errno.ETIMEDOUT:
            raise ConnectionLost(
                f"{self.transport_id}: no answer to an admin command in {COMMAND_TIMEOUT_MS // 1000} s"
            )
        if result == -errno.ENXIO:
            raise self.lost("the connection was lost during an admin command, not back")
        if result:
            raise NvmeError(f"{self.transport_id}: admin command not sent: {os.strerror(-result)}")
        return completion

    def create_queue_pair(self, depth: int, blocks_of: NamespaceFacts | None = None) -> "QueuePair":
        """A queue pair of at most `depth` outstanding commands. Raises ConnectionLost, NvmeError."""
        queue_pair = QueuePair(self, depth, blocks_of)
        with self._lock:
            self._queue_pairs.add(queue_pair)
        return queue_pair

    def close(self) -> None:
        """Close the queue pairs and the connection. Raises QueuePairInUse where a thread works on one."""
        if self._handle is None:
            return
        for queue_pair in list(self._queue_pairs):
            queue_pair.close()
        self._lib.pyspdk_disconnect(self._handle)
        self._handle = None


class QueuePair:
    """One thread at a time, or QueuePairInUse. See Controller.create_queue_pair.

    Lengths are checked here: what a raw command has wrong would cost the whole connection.
    """

    def __init__(self, controller: Controller, depth: int, blocks_of: NamespaceFacts | None):
        self._controller = controller
        self._ffi, self._lib = library()
        self._wrong = self._ffi.new("size_t *")  # index of a command that C has refused
        result = self._ffi.new("int *")
        nsid, block_bytes = (0, 0) if blocks_of is None else (blocks_of.nsid, blocks_of.block_bytes)
        self._handle = self._lib.pyspdk_create_queue_pair(
            controller._open_handle, depth, nsid, block_bytes, result
        )
        if self._handle == self._ffi.NULL:
            self._handle = None
            if result[0] == -errno.ENXIO:
                raise controller.lost("no connection for a queue pair")
            raise NvmeError(
                f"{controller.transport_id}: no further queue pair: {last_error('the drive has no more')}"
            )
        self.depth = self._lib.pyspdk_depth(self._handle)

    def _open(self):
        if self._handle is None:
            raise ValueError("the queue pair is closed")
        return self._handle

    def _result(self, result: int, entries=None, lengths=None) -> int:
        if result >= 0:
            return result
        if result == -errno.EBUSY:
            raise QueuePairInUse("a queue pair is one thread's at a time: make one for each thread")
        if result == -errno.ENXIO:
            raise self._controller.lost("the connection was lost, not back")
        if result in (-errno.EMSGSIZE, -errno.EINVAL, -errno.EPROTOTYPE) and entries is not None:
            entry, length = entries[self._wrong[0]], int(lengths[self._wrong[0]])
            if result == -errno.EMSGSIZE:
                limit = self._controller.max_transfer_bytes
                raise ValueError(f"{length} bytes are more than one command moves ({limit})")
            if result == -errno.EINVAL:
                num_blocks = int(entry["cdw12"] & 0xFFFF) + 1
                raise ValueError(f"a command of {num_blocks} blocks with {length} bytes of memory")
            raise ValueError(f"{length} bytes for opcode {int(entry['opcode']):#04x}, which moves none")
        raise NvmeError(
            f"{self._controller.transport_id}: {os.strerror(-result)}: {last_error('no reason given')}"
        )

    def _pointers(self, entries, addresses, lengths):
        return (
            self._ffi.from_buffer("pyspdk_entry *", entries),
            self._ffi.from_buffer("uint64_t *", addresses),
            self._ffi.from_buffer("uint64_t *", lengths),
        )

    @staticmethod
    def _as_arrays(entries, addresses, lengths):
        return (
            np.ascontiguousarray(entries),
            np.ascontiguousarray(addresses, np.uint64),
            np.ascontiguousarray(lengths, np.uint64),
        )

    def submit(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
        """Start a batch; how many of it were started. Their `cid` comes back with their completions.

        Raises ConnectionLost with none started, QueuePairInUse, ValueError.
        """
        arrays = self._as_arrays(entries, addresses, lengths)
        result = self._lib.pyspdk_submit(self._open(), *self._pointers(*arrays), len(entries), self._wrong)
        return self._result(result, entries, lengths)

    def poll(self, wait: bool, max_completions: int = 256) -> np.ndarray:
        """Completions that have come, COMPLETION_ENTRY [n]; at least one if `wait` and any is outstanding.

        Commands that a lost connection took complete with status 08h (aborted).
        """
        completions = np.zeros(max_completions, COMPLETION_ENTRY)
        pointer = self._ffi.from_buffer("pyspdk_completion *", completions)
        count = self._lib.pyspdk_poll(self._open(), pointer, max_completions, wait, COMMAND_TIMEOUT_MS)
        return completions[: self._result(count)]

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int | None = None
    ) -> tuple[np.ndarray, bool]:
        """Run any number of commands in one call, `depth` at a time, from the first to the last.

        (COMPLETION_ENTRY [n] in their order, whether the connection was lost meanwhile). What was lost has
        status 08h (aborted). Raises QueuePairInUse, ValueError, NvmeError.
        """
        arrays = self._as_arrays(entries, addresses, lengths)
        completions = np.empty(len(entries), COMPLETION_ENTRY)
        result = self._lib.pyspdk_transfer(
            self._open(),
            *self._pointers(*arrays),
            len(entries),
            min(depth or self.depth, self.depth),
            self._ffi.from_buffer("pyspdk_completion *", completions),
            COMMAND_TIMEOUT_MS,
            self._wrong,
        )
        if result == -errno.ENXIO:
            return completions, True
        self._result(result, entries, lengths)
        return completions, False

    def close(self) -> None:
        """Give it back; commands under way are aborted. Raises QueuePairInUse."""
        if self._handle is None:
            return
        self._result(self._lib.pyspdk_destroy_queue_pair(self._handle))
        self._handle = None
        with self._controller._lock, contextlib.suppress(KeyError):
            self._controller._queue_pairs.remove(self)
