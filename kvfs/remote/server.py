"""The owner's side: whoever holds an invitation is served, a thread for each client."""

import errno
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvfs.errors import KvfsError, NotPermitted, TooManyClients
from kvfs.remote import shared_memory
from kvfs.remote.invitations import Invitations
from kvfs.remote.protocol import HELLO, MAGIC, PROTOCOL_VERSION, REPLY, encode_error, record, send
from kvfs.remote.rights import Client, may
from kvfs.remote.session import May, Session
from kvfs.remote.shared_memory import SharedMemory
from kvfs.remote.socket_folder import listen, new_socket_path
from kvfs.store import Store
from kvfs.telemetry.events import EVENTS
from kvfs.tree import Caller

HANDSHAKE_SECONDS = 5.0
DEFAULT_MEMORY_BYTES = 64 << 20  # shared with each client; takes memory only as far as it is used
DEFAULT_MAX_CLIENTS = 32
SETTLE_SECONDS = 1.0  # at most without progress, for a client that says it has posted what it has not
SETTLE_STEP_SECONDS = 50e-6
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_REST_SECONDS = 0.1  # until descriptors may be free again
log = logging.getLogger(__name__)


class RemoteServer:
    """Serves a store to other processes until `close`; the store stays open. Use as a context manager.

    socket_path: where to listen, a new name in the runtime folder by default
    for_everyone: users beside this one may connect, if they are invited
    may: what an invited client may do with a sequence, see kvfs.remote.rights
    read_only: clients change nothing
    """

    def __init__(
        self,
        store: Store,
        socket_path: str | os.PathLike | None = None,
        *,
        for_everyone: bool = False,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        max_clients: int = DEFAULT_MAX_CLIENTS,
        may: May = may,
        read_only: bool = False,
    ):
        self._store = store
        self._memory_bytes = memory_bytes
        self._max_clients = max_clients
        self._may = may
        self._read_only = read_only
        self._invitations = Invitations()
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._sessions: tuple[Session, ...] = ()
        self._closing = False
        self.socket_path = Path(socket_path) if socket_path else new_socket_path(for_everyone)
        self._listener = listen(self.socket_path, max_clients, for_everyone)
        self._acceptor = threading.Thread(target=self._accept, name="kvfs-remote", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> "RemoteServer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def invite(self, caller: Caller) -> bytes:
        """What the mount's file `.kvfs/connect` says to who has opened it."""
        token = self._invitations.invite(caller.uid).hex()
        message = {"socket": str(self.socket_path), "token": token, "protocol": PROTOCOL_VERSION}
        return json.dumps(message).encode() + b"\n"

    def is_settled(self) -> bool:
        """Whether all that clients have posted so far is in the store."""
        return not any(session.is_behind for session in self._sessions)

    def settle(self) -> None:
        """Wait for what clients have posted so far: for them it is done, so whoever looks must find it."""
        waiting = [(session, session.posted) for session in self._sessions if session.is_behind]
        if not waiting:
            return
        for session, posted in waiting:
            served, since = session.served, time.monotonic()
            while session.served < posted and session in self._sessions:
                if session.served > served:
                    served, since = session.served, time.monotonic()
                elif time.monotonic() > since + SETTLE_SECONDS:
                    session.disbelieve(posted)
                    break
                time.sleep(SETTLE_STEP_SECONDS)

    def close(self) -> None:
        """Stop listening and end all connections, each after the request under way."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            clients = dict(self._clients)
        with suppress(OSError):
            self.socket_path.unlink()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
        self._acceptor.join()
        self._listener.close()
        for connection, thread in clients.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                if error.errno in _NO_DESCRIPTORS:
                    time.sleep(_REST_SECONDS)
                continue
            try:
                self._admit(connection)
            except OSError:  # it has gone already
                connection.close()

    def _admit(self, connection: socket.socket) -> None:
        """Start a thread for a user who has an invitation; who says its token there is served."""
        client = Client.of(connection)
        if not self._invitations.is_expected(client.uid):
            _refuse(connection, NotPermitted(f"user {client.uid} has no invitation"))
            connection.close()
            return
        thread = threading.Thread(
            target=self._serve, args=(connection, client), name=f"kvfs-client-{client.pid}", daemon=True
        )
        with self._lock:
            is_full = len(self._clients) >= self._max_clients
            if not is_full and not self._closing:
                self._clients[connection] = thread
                thread.start()
                return
        _refuse(connection, TooManyClients(self._max_clients))
        connection.close()

    def _serve(self, connection: socket.socket, client: Client) -> None:
        try:
            memory = self._shake_hands(connection, client)
            if memory is not None:
                who = f"process {client.pid} of user {client.uid}"
                EVENTS.note("client_connected", f"{who} is connected", pid=client.pid, uid=client.uid)
                self._run(
                    Session(self._store, connection, memory, client, self._may, self._read_only, self.settle)
                )
                EVENTS.note("client_gone", f"{who} is gone", pid=client.pid, uid=client.uid)
        except OSError as error:  # the client was killed, or never said anything
            log.info("process %d of user %d is gone: %s", client.pid, client.uid, error)
        finally:
            with self._lock:
                self._clients.pop(connection, None)
            connection.close()

    def _run(self, session: Session) -> None:
        with self._lock:
            self._sessions += (session,)
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions = tuple(other for other in self._sessions if other is not session)

    def _shake_hands(self, connection: socket.socket, client: Client) -> SharedMemory | None:
        connection.settimeout(HANDSHAKE_SECONDS)
        raw = connection.recv(HELLO.itemsize)
        hello = np.frombuffer(raw, HELLO)[0] if len(raw) == HELLO.itemsize else None
        if hello is None or hello["magic"] != MAGIC:
            return None
        if not self._invitations.accept(client.uid, hello["token"].tobytes()):
            _refuse(connection, NotPermitted("no such invitation: it was used, or is older than a minute"))
            return None
        if hello["version"] != PROTOCOL_VERSION:
            versions = f"version {PROTOCOL_VERSION} of the protocol, not {hello['version']}"
            _refuse(connection, KvfsError(f"the process that owns the drive speaks {versions}"))
            return None
        descriptor = shared_memory.create(self._memory_bytes)
        try:
            memory = SharedMemory(descriptor)
            socket.send_fds(connection, [record(REPLY, magic=MAGIC)], [descriptor])
        finally:
            os.close(descriptor)
        connection.settimeout(None)
        return memory


def _refuse(connection: socket.socket, error: KvfsError) -> None:
    body = encode_error(error)
    connection.settimeout(HANDSHAKE_SECONDS)
    send(connection, record(REPLY, magic=MAGIC, is_error=1, body_bytes=len(body)), body)
