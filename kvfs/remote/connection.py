"""The client's side of a connection: requests, the shared memory, and what may go wrong between processes.

`with connection:` is one thread's turn. In it arrays are placed in the shared memory one behind another, and
requests either asked, with a reply, or posted, without. A reply ends all requests before it, and the memory is
free again. A turn that an exception ended (a KeyboardInterrupt, say) may leave replies behind: the next gets
in step first.
"""

import errno
import json
import os
import socket
import threading
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvfs.errors import (
    InvalidArgument,
    KvfsError,
    MediaFailure,
    NotADrive,
    NotPermitted,
    OtherProcess,
    ServerGone,
    StoreClosed,
)
from kvfs.remote.protocol import (
    HELLO,
    MAGIC,
    PROTOCOL_VERSION,
    REPLY,
    REQUEST,
    Flag,
    Operation,
    Reply,
    aligned,
    decode_error,
    parse_reply,
    plain,
    receive,
    record,
    send,
)
from kvfs.remote.shared_memory import SharedMemory

CONNECT_FILE = Path(".kvfs", "connect")
HANDSHAKE_SECONDS = 10.0
_DEAD_MOUNT = (errno.ENOTCONN, errno.ECONNABORTED)


class Connection:
    """path: the mount's folder. Raises NotADrive, NotPermitted, TooManyClients, ServerGone."""

    def __init__(self, path: str):
        self.path = path
        self._pid = os.getpid()
        self._is_inherited = False  # by a forked child: the connection is its parent's
        self._lock = threading.Lock()
        self._number = 0  # of the last request
        self.num_calls = 0  # any of them may have changed a sequence
        self._reply = bytearray(REPLY.itemsize)
        self._end = 0  # of what is placed in the shared memory
        self._in_step = True
        self._dropped: deque[tuple[int, int]] = deque()  # (handle, references) that nobody here holds any more
        self._is_gone = False
        self.is_closed = False
        self._socket, self.memory = _connect(path, _invitation(path))
        _connections.add(self)

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the connection, which ends when all its descriptors are closed."""
        self._is_inherited = True
        self._socket.close()

    def close(self) -> None:
        """End the connection, after the turn under way. Closing twice is allowed."""
        if self._is_inherited:
            return
        with self._lock:
            self.is_closed = True
            self._socket.close()

    def check_open(self) -> None:
        if self._is_inherited:
            raise OtherProcess(self.path, self._pid)
        if self.is_closed:
            raise StoreClosed
        if self._is_gone:
            raise ServerGone(self.path)

    @property
    def is_usable(self) -> bool:
        return not (self.is_closed or self._is_gone or self._is_inherited)

    # turns

    def __enter__(self) -> "Connection":
        self.check_open()  # before the lock, which a forked child may find taken for ever
        self._lock.acquire()
        try:
            self.check_open()
            if not self._in_step:
                self.settle()
            self._in_step = False
            while self._dropped:
                handle, references = self._dropped.popleft()
                self.post(Operation.RELEASE, sequence=handle, count=references)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._in_step = kind is None
        self._lock.release()

    def drop(self, handle: int, references: int) -> None:
        """Give references to a handle back with the next turn. Safe from a finalizer, at any point."""
        self._dropped.append((handle, references))

    # requests

    def post(self, operation: Operation, flags: int = 0, **fields) -> None:
        """Without a reply: the sequence's next `ask` raises a failure, and nothing of it in between is done."""
        self._send(b"", operation, flags | Flag.POSTED, fields)
        self.memory.posted = self._number  # from here on whoever looks at the store waits for it

    def ask(self, operation: Operation, body: bytes = b"", flags: int = 0, **fields) -> tuple[Reply, bytearray]:
        """(reply, its body). Raises what the owner raised."""
        self._send(body, operation, flags, fields)
        while True:
            self._receive(self._reply)
            reply = parse_reply(self._reply)
            if reply.magic != MAGIC:
                raise self._gone()
            answer = bytearray(reply.body_bytes)
            self._receive(answer)
            if reply.number == self._number:  # others are of turns that were interrupted
                break
        self._end = 0
        if reply.is_error:
            raise decode_error(answer)
        return reply, answer

    def call(self, name: str, /, **arguments):
        """One of kvfs.remote.calls."""
        return json.loads(self.call_for_bytes(name, **arguments))

    def call_for_bytes(self, name: str, /, **arguments) -> bytearray:
        try:
            body = json.dumps({"call": name, "arguments": arguments}, default=plain).encode()
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"arguments that cannot be sent: {error}") from error
        self.num_calls += 1
        return self.ask(Operation.CALL, body)[1]

    def settle(self) -> None:
        """Wait for all requests so far, whatever came of them."""
        self.ask(Operation.NOTHING)

    def _send(self, body: bytes, operation: Operation, flags: int, fields: dict) -> None:
        number = self._number + 1
        request = record(
            REQUEST,
            magic=MAGIC,
            number=number,
            operation=operation,
            flags=flags,
            body_bytes=len(body),
            **fields,
        )
        self._number = number
        try:
            send(self._socket, request, body)
        except OSError as error:
            raise self._gone() from error

    def _receive(self, buffer: bytearray) -> None:
        try:
            is_whole = receive(self._socket, buffer)
        except OSError as error:
            raise self._gone() from error
        if not is_whole:
            raise self._gone()

    def _gone(self) -> ServerGone:
        self._is_gone = True
        return ServerGone(self.path)

    # shared memory

    def place(self, num_bytes: int) -> int:
        """The offset of room for arrays. Raises InvalidArgument if there is never so much."""
        end = self._end + aligned(num_bytes)
        if end > self.memory.num_bytes and self._end:
            self.settle()
            end = aligned(num_bytes)
        if end > self.memory.num_bytes:
            raise InvalidArgument(f"{num_bytes} bytes of arrays, but only {self.memory.num_bytes} are shared")
        offset, self._end = self._end, end
        return offset


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for connection in _connections:
        connection.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def _invitation(path: str) -> dict:
    try:
        raw = Path(path, CONNECT_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotADrive(path, "a folder, but no kvfs drive is mounted there: name the drive's file") from error
    except PermissionError as error:
        raise NotPermitted(f"{path}: this user may not use the drive that is mounted there") from error
    except OSError as error:
        if error.errno in _DEAD_MOUNT:
            raise ServerGone(path) from error
        raise MediaFailure(f"{path}: {error}") from error
    try:
        message = json.loads(raw)
        facts = {"socket": str(message["socket"]), "token": bytes.fromhex(message["token"])}
        version = int(message["protocol"])
    except (ValueError, KeyError, TypeError) as error:
        raise NotADrive(path, f"{CONNECT_FILE} makes no sense: {error}") from error
    if version != PROTOCOL_VERSION:
        raise NotADrive(path, f"its owner speaks protocol version {version}, this kvfs {PROTOCOL_VERSION}")
    return facts


def _connect(path: str, invitation: dict) -> tuple[socket.socket, SharedMemory]:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(HANDSHAKE_SECONDS)
        connection.connect(invitation["socket"])
        hello = np.zeros(1, HELLO)
        hello["magic"], hello["version"] = MAGIC, PROTOCOL_VERSION
        hello["token"] = np.frombuffer(invitation["token"], HELLO["token"])
        with suppress(OSError):  # who is turned away may be so before saying hello: the reply says why
            connection.sendall(hello)
        raw, descriptors, _, _ = socket.recv_fds(connection, REPLY.itemsize, 1)
        try:
            if len(raw) != REPLY.itemsize:
                raise ServerGone(path)
            reply = parse_reply(raw)
            if reply.is_error:
                body = bytearray(reply.body_bytes)
                receive(connection, body)
                raise decode_error(body)
            memory = SharedMemory(descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        connection.settimeout(None)
        return connection, memory
    except BaseException as error:
        connection.close()
        if isinstance(error, (OSError, ValueError, IndexError)) and not isinstance(error, KvfsError):
            raise ServerGone(path) from error
        raise
