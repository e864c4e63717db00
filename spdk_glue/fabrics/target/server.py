"""The target's sockets and threads: one listener, and a thread for each connection.

A connection's thread receives, runs commands and sends; what others finish for it (attention tickets, long
commands) wakes it. A peer that is slow, silent or half gone holds up its own thread and nothing else.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from spdk_glue.fabrics.pdu import PDU_OVERHEAD_BYTES
from spdk_glue.fabrics.target.connection import Connection
from spdk_glue.fabrics.target.states import State
from spdk_glue.fabrics.target.subsystem import Subsystems
from spdk_glue.fabrics.tcp_glue.api import MAX_FRAMES, PeerClosed, Stream
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)

BACKLOG = 128
GOODBYE_SECONDS = 1.0  # for the peer to read why it was let go
CLOSE_SECONDS = 10.0
NUM_BACKGROUND_THREADS = 64
# After so long without an acknowledgement the network, or the peer's machine, is gone.
USER_TIMEOUT_MS = 30_000


class CannotListen(NvmeError):
    """The address is taken, or not ours; says which."""


class Server:
    """Serves `subsystems` on one TCP address until closed.

    spin_us: a connection's thread looks so long for the next PDU before it sleeps, if the one before it came as
    soon. Raises CannotListen, UnauthenticatedListener.
    """

    def __init__(self, subsystems: Subsystems, host: str, port: int, *, spin_us: int = 0):
        self._subsystems = subsystems
        self._spin_us = spin_us
        self._listener = _listen(subsystems, host, port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._later = ThreadPoolExecutor(NUM_BACKGROUND_THREADS, thread_name_prefix="kvfs-target-long")
        self._lock = threading.Lock()
        self._peers: dict[threading.Thread, _Peer] = {}
        self._is_closing = threading.Event()
        self._wake_reading, self._wake_writing = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="kvfs-target-accept")
        self._acceptor.start()

    @property
    def num_connections(self) -> int:
        return len(self._peers)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._listener, selectors.EVENT_READ)
            waiting.register(self._wake_reading, selectors.EVENT_READ)
            while not self._is_closing.is_set():
                waiting.select()
                try:
                    connection, address = self._listener.accept()
                except BlockingIOError:
                    continue  # it went away again, or we are closing
                except OSError as error:  # no descriptor left: wait for one
                    log.error("cannot accept a connection: %s", error)
                    self._is_closing.wait(0.1)
                    continue
                self._start(connection, f"{address[0]}:{address[1]}")

    def _start(self, connection: socket.socket, name: str) -> None:
        with self._lock:
            if len(self._peers) >= self._subsystems.limits.max_connections:
                log.warning("%s: refused, there are %d connections", name, len(self._peers))
                connection.close()
                return
            try:
                peer = _Peer(self._subsystems, connection, name, self._spin_us, self._later.submit)
            except OSError as error:
                log.warning("%s: %s", name, error)
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(peer,), name=f"kvfs-target-{name}")
            self._peers[thread] = peer
        thread.start()

    def _serve(self, peer: "_Peer") -> None:
        try:
            peer.serve(self._is_closing.is_set)
        finally:
            with self._lock:
                del self._peers[threading.current_thread()]

    def close(self) -> None:
        """Ends all connections; commands that are running finish first. Once more does nothing."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._wake_writing.send(b"x")
        self._acceptor.join()
        self._listener.close()
        self._subsystems.end_all("the target closes")
        with self._lock:
            peers = dict(self._peers)
        for peer in peers.values():
            peer.stream.wake()
        give_up = time.monotonic() + CLOSE_SECONDS
        for thread in peers:
            thread.join(max(0.0, give_up - time.monotonic()))
        self._later.shutdown(wait=True)
        self._wake_reading.close()
        self._wake_writing.close()


class _Peer:
    """One socket with its connection's state."""

    def __init__(
        self,
        subsystems: Subsystems,
        connection: socket.socket,
        name: str,
        spin_us: int,
        later: Callable[[Callable[[], None]], object],
    ):
        self._limits = subsystems.limits
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        address = connection.getsockname()
        self._connection = Connection(
            subsystems,
            (address[0], address[1]),
            name,
            wake=lambda: self.stream.wake(),
            later=later,
            now=time.monotonic(),
        )
        self.stream = Stream(connection, self._connection.framing, spin_us)

    def serve(self, is_closing: Callable[[], bool]) -> None:
        connection = self._connection
        try:
            while connection.is_open and not is_closing():
                self._step()
            if connection.is_open:
                connection.end("the target closes")
            else:
                self._say_goodbye()
        except PeerClosed:
            connection.end()
        except OSError as error:
            connection.end(str(error))
        except Exception:
            # A bug of ours costs one connection, never the others.
            log.exception("%s: the connection is given up", connection.peer)
            connection.end("an error of ours, see the log")
        finally:
            connection.end()
            log.info("%s: closed: %s", connection.peer, connection.closed_because)
            self.stream.close()

    def _step(self) -> None:
        connection, stream = self._connection, self.stream
        # ICReq decides how to read what follows it
        max_frames = 1 if connection.state is State.AWAIT_IC else MAX_FRAMES
        now = time.monotonic()
        frames = stream.receive(int(connection.seconds_to_poll(now) * 1000) + 1, max_frames)
        now = time.monotonic()
        if len(frames):
            self._stalled_since = None
            for batch in connection.receive(frames, stream.buffer, now):
                self._send(batch)
            if stream.framing is not connection.framing:
                stream.framing = connection.framing
        elif stream.num_waiting_bytes:  # of a PDU that is not all there
            self._stalled_since = self._stalled_since or (now, 0)
            since, seen = self._stalled_since
            if stream.num_waiting_bytes != seen:
                self._stalled_since = now, stream.num_waiting_bytes
            elif now - since > self._limits.stall_seconds:
                raise TimeoutError("the peer does not send the rest of a PDU")
        for batch in connection.poll(now):
            self._send(batch)

    _stalled_since: tuple[float, int] | None = None

    def _send(self, batch) -> None:
        self.stream.send(batch, int(self._limits.stall_seconds * 1000))

    def _say_goodbye(self) -> None:
        """Let the peer read our last PDU: closing at once would throw it away with what it still sends."""
        with contextlib.suppress(OSError):
            sock = self.stream.socket
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.1)
            give_up = time.monotonic() + GOODBYE_SECONDS
            while time.monotonic() < give_up:
                try:
                    if not sock.recv(PDU_OVERHEAD_BYTES):
                        return
                except TimeoutError:
                    continue


def _listen(subsystems: Subsystems, host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # what no name of a host can be is a UnicodeError
        raise CannotListen(f"cannot listen on {host}: {getattr(error, 'strerror', error)}") from error
    family, _, _, _, address = found[0]
    subsystems.access.check_listen([address[0]])
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
