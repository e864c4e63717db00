"""One queue's connection: its socket, and the state in C that tcp_glue keeps for it.

A batch is three arrays: `entries` SUBMISSION_ENTRY [n], `addresses` and `lengths` int64 or uint64 [n].
Calls into C run without the GIL. One thread at a time; another may call `shut_down`, which ends whatever waits.
"""

import errno
import socket
import threading
from dataclasses import dataclass

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics.initiator import faults, handshake
from spdk_glue.fabrics.initiator.handshake import Agreement
from spdk_glue.fabrics.tcp_glue._tcp_glue import ffi, lib
from spdk_glue.status import ConnectionRefused, QueuePairInUse

COMMAND_TIMEOUT_MS = 30_000
CONNECT_SECONDS = 5.0  # of each step until a connection is there
MAX_TRANSFER_BYTES = 1 << 30  # of a target that tells no limit
FABRICS_IN_CAPSULE_BYTES = 8192  # of admin and fabrics commands, on every target


@dataclass(frozen=True)
class Limits:
    """What a queue's commands may have: how many at once, and their data. block_bytes, nsid: of the namespace
    whose Reads and Writes are checked before they leave; 0 for none."""

    queue_id: int
    depth: int
    in_capsule_bytes: int = FABRICS_IN_CAPSULE_BYTES
    max_transfer_bytes: int = MAX_TRANSFER_BYTES
    block_bytes: int = 0
    nsid: int = 0


def connect_socket(
    host: str, port: int, header_digest: bool, data_digest: bool
) -> tuple[socket.socket, Agreement]:
    """A connection after ICReq and ICResp. Raises ConnectionRefused."""
    try:
        found = socket.create_connection((host, port), CONNECT_SECONDS)
    except (OSError, ValueError) as error:  # what no name of a host can be is a UnicodeError
        raise ConnectionRefused(f"no connection: {getattr(error, 'strerror', None) or error}") from error
    try:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.sendall(handshake.request(header_digest, data_digest))
        received = b""
        while len(received) < handshake.RESPONSE_BYTES:
            piece = found.recv(handshake.RESPONSE_BYTES - len(received))
            if not piece:
                raise ConnectionRefused(
                    "the other end closed the connection before it said anything of NVMe/TCP"
                )
            received += piece
            if len(received) >= 8 and received[0] != 1:
                break  # agree() says what is wrong
        agreement = handshake.agree(received, header_digest, data_digest)
        found.setblocking(False)
    except OSError as error:
        found.close()
        what = (
            "what answers does not speak NVMe/TCP"
            if isinstance(error, TimeoutError)
            else "the connection broke"
        )
        raise ConnectionRefused(f"{what}: {error.strerror or error}") from error
    except BaseException:
        found.close()
        raise
    return found, agreement


class Queue:
    """Commands over one socket, which it closes in the end.

    account: of the controller's queues together, see new_account
    """

    def __init__(self, connection: socket.socket, agreement: Agreement, limits: Limits, account=None):
        self._socket = connection
        self.limits = limits
        self._lock = threading.Lock()
        self._account = account if account is not None else new_account()
        options = ffi.new(
            "host_options *",
            {
                "queue_id": limits.queue_id,
                "depth": limits.depth,
                "header_digest": agreement.header_digest,
                "data_digest": agreement.data_digest,
                "data_alignment": agreement.data_alignment,
                "max_h2c_data_bytes": agreement.max_h2c_data_bytes,
                "in_capsule_bytes": limits.in_capsule_bytes,
                "block_bytes": limits.block_bytes,
                "nsid": limits.nsid,
                "max_transfer_bytes": min(limits.max_transfer_bytes, MAX_TRANSFER_BYTES),
                "account": self._account,
            },
        )
        state = lib.host_create(options)
        if state == ffi.NULL:
            raise MemoryError(f"a queue of {limits.depth} commands")
        self._state = ffi.gc(state, lib.host_destroy)
        self._wrong, self._detail = ffi.new("size_t *"), ffi.new("uint32_t *")
        self._quiet_since = ffi.new("uint64_t *")
        self._transferred: Batch | None = None  # the latest: who sends the same arrays again pays once
        self._arrived = np.empty(limits.depth, COMPLETION_ENTRY)
        self._arrived_at = ffi.from_buffer("host_completion *", self._arrived)

    @property
    def fault(self) -> str:
        """Why the connection is of no use any more; empty while it is."""
        number = lib.host_fault_of(self._state, self._detail)
        return faults.describe(number, self._detail[0]) if number else ""

    def _call(self, function, *arguments) -> int:
        if not self._lock.acquire(blocking=False):
            raise QueuePairInUse("a queue pair is one thread's at a time: make one for each thread")
        try:
            if self._socket is None:
                raise ValueError("the queue pair is closed")
            return function(self._state, self._socket.fileno(), *arguments)
        finally:
            self._lock.release()

    def transfer(
        self,
        entries: np.ndarray,
        addresses: np.ndarray,
        lengths: np.ndarray,
        depth: int | None = None,
        timeout_ms: int = COMMAND_TIMEOUT_MS,
    ) -> tuple[np.ndarray, bool]:
        """Run any number of commands, `depth` at a time, whose CIDs differ from those around them.

        (COMPLETION_ENTRY [n] in their order, whether the connection was lost). What was lost has status 08h
        (aborted). Raises QueuePairInUse, ValueError with nothing sent.
        """
        batch = self._transferred
        if batch is None or not batch.is_of(entries, addresses, lengths):
            batch = self._transferred = Batch(entries, addresses, lengths)
        completions = np.empty(len(entries), COMPLETION_ENTRY)
        out = ffi.from_buffer("host_completion *", completions)
        depth = min(depth or self.limits.depth, self.limits.depth)
        result = self._call(lib.host_transfer, batch.in_c, depth, out, timeout_ms, self._wrong)
        if result == -errno.ENXIO:
            return completions, True
        self._check(result, entries, lengths)
        return completions, False

    def submit(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> bool:
        """Start a batch; False, with none started, where the connection is lost. Raises as transfer."""
        batch = Batch(entries, addresses, lengths)
        result = self._call(lib.host_submit, batch.in_c, self._wrong)
        if result == -errno.ENXIO:
            return False
        self._check(result, entries, lengths)
        return True

    def poll(self, wait_ms: int, timeout_ms: int = COMMAND_TIMEOUT_MS) -> np.ndarray:
        """Completions of submitted commands, COMPLETION_ENTRY [n], aborted ones where the connection is lost;
        none after `wait_ms`, or at once if nothing is under way."""
        count = self._call(
            lib.host_poll, self._arrived_at, len(self._arrived), wait_ms, timeout_ms, self._quiet_since
        )
        if count:
            self._quiet_since[0] = 0
        return self._arrived[:count].copy()

    def _check(self, result: int, entries: np.ndarray, lengths: np.ndarray) -> None:
        if not result:
            return
        if result == -errno.EBUSY:
            raise ValueError("a command identifier that is under way, or more commands than the queue holds")
        entry, length = entries[self._wrong[0]], int(lengths[self._wrong[0]])
        if result == -errno.EMSGSIZE:
            limit = self.limits.max_transfer_bytes
            raise ValueError(f"{length} bytes are more than one command moves ({limit})")
        if result == -errno.EPROTOTYPE:
            raise ValueError(f"{length} bytes for opcode {int(entry['opcode']):#04x}, which moves none")
        num_blocks = int(entry["cdw12"] & 0xFFFF) + 1
        raise ValueError(f"a command of {num_blocks} blocks with {length} bytes of memory")

    def shut_down(self) -> None:
        """From any thread: end the connection, and with it what waits for it."""
        connection = self._socket
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                if error.errno not in (errno.ENOTCONN, errno.EBADF):  # it was over already
                    raise

    def close(self) -> None:
        """Raises QueuePairInUse."""
        if not self._lock.acquire(blocking=False):
            raise QueuePairInUse("a thread works on the queue pair that is to be closed")
        try:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        finally:
            self._lock.release()


def new_account():
    """What a controller's queues count together: see tcp_glue/host_records.h."""
    return ffi.new("host_account *")


def _words(array: np.ndarray) -> np.ndarray:
    """Contiguous, of 64 bits."""
    return np.ascontiguousarray(array if array.itemsize == 8 else array.astype(np.uint64))


class Batch:
    """A batch as C takes it. Where the arrays were as C wants them, what is written to them later holds."""

    def __init__(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray):
        if not len(entries) == len(addresses) == len(lengths):
            raise ValueError(f"{len(entries)} commands, {len(addresses)} addresses and {len(lengths)} lengths")
        given = entries, addresses, lengths
        used = np.ascontiguousarray(entries), _words(addresses), _words(lengths)
        # whether these arrays are what C reads: then they are this batch however often they change
        self._arrays = given if all(a is b for a, b in zip(given, used, strict=True)) else ()
        self._kept = (
            ffi.from_buffer("const host_entry *", used[0]),
            ffi.from_buffer("const uint64_t *", used[1]),
            ffi.from_buffer("const uint64_t *", used[2]),
        )
        self.in_c = ffi.new("host_batch *", [*self._kept, len(entries)])

    def is_of(self, *arrays: np.ndarray) -> bool:
        return bool(self._arrays) and all(a is b for a, b in zip(self._arrays, arrays, strict=True))
