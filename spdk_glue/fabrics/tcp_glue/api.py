"""Typed calls into the C of this package. Everything here releases the GIL while it works.

Both ends of a connection use it. A stream is one thread's; only `wake` may be called from elsewhere.
"""

import os
import socket
import threading

import numpy as np

from spdk_glue.fabrics.pdu import (
    FRAME,
    PDU_OVERHEAD_BYTES,
    PIECE,
    RULE,
    RULES,
    FatalError,
    Framing,
)
from spdk_glue.fabrics.tcp_glue._tcp_glue import ffi, lib

assert FRAME.itemsize == ffi.sizeof("tcp_frame") and PIECE.itemsize == ffi.sizeof("tcp_piece")
assert RULE.itemsize == ffi.sizeof("tcp_rule") and {e.value for e in FatalError} >= {1, 3, 5}

MAX_FRAMES = 256
_RULES = ffi.from_buffer("const tcp_rule *", RULES)


class PeerClosed(ConnectionError):
    """The peer ended the connection, in order."""


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    return lib.tcp_crc32c(ffi.from_buffer("const uint8_t *", data), memoryview(data).nbytes)


def _framing(framing: Framing):
    return ffi.new(
        "tcp_framing *",
        [framing.from_host, framing.header_digest, framing.data_digest, 0, framing.max_data_bytes],
    )


def take_frames(received: bytes | np.ndarray, framing: Framing, max_frames: int = MAX_FRAMES):
    """(FRAME [n], bytes taken): the whole PDUs at the start of what was received, one refused at most."""
    frames = np.zeros(max_frames, FRAME)
    taken, wanted = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    count = lib.tcp_take_frames(
        _RULES,
        _framing(framing),
        ffi.from_buffer("const uint8_t *", received),
        len(received),
        ffi.from_buffer("tcp_frame *", frames),
        max_frames,
        taken,
        wanted,
    )
    return frames[:count], int(taken[0])


def pieces(headers: np.ndarray, data_addresses=0, data_lengths=0) -> np.ndarray:
    """PIECE [n] of PDU records [n], contiguous, and where their data lie. The caller keeps both."""
    found = np.empty(len(headers), PIECE)
    start = int(ffi.cast("uintptr_t", ffi.from_buffer(headers)))
    found["header_address"] = start + headers.itemsize * np.arange(len(headers), dtype=np.uint64)
    found["data_address"], found["data_length"] = data_addresses, data_lengths
    return found


class Stream:
    """A connected TCP socket. framing: what arrives, to be replaced once the peers have agreed.

    Raises OSError (ConnectionError, TimeoutError) where the connection is no more.
    """

    def __init__(self, connection: socket.socket, framing: Framing, spin_us: int = 0):
        self.socket = connection
        self.spin_us = spin_us
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._lock, self._is_closed = threading.Lock(), False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._frames = np.zeros(MAX_FRAMES, FRAME)
        self._out = ffi.from_buffer("tcp_frame *", self._frames)
        # Two PDUs of the largest size, so that one that is not all there yet seldom has to move.
        self.buffer = np.empty(2 * (framing.max_data_bytes + PDU_OVERHEAD_BYTES), np.uint8)
        self._record = ffi.new(
            "tcp_stream *",
            [
                connection.fileno(),
                self._wake_fd,
                ffi.from_buffer("uint8_t *", self.buffer),
                len(self.buffer),
                0,
                0,
                0,
                0,
            ],
        )
        self.framing = framing

    @property
    def framing(self) -> Framing:
        return self._agreed

    @framing.setter
    def framing(self, framing: Framing) -> None:
        self._agreed, self._in_c = framing, _framing(framing)

    def receive(self, timeout_ms: int, max_frames: int = MAX_FRAMES) -> np.ndarray:
        """FRAME [n], none where the time is over or somebody called `wake`; they hold until the next call.

        max_frames: 1 while the PDU that comes next decides how to read those behind it
        """
        count = lib.tcp_receive(
            self._record, _RULES, self._in_c, self._out, max_frames, timeout_ms, self.spin_us
        )
        if count >= 0:
            return self._frames[:count]
        if count == lib.TCP_WOKEN:
            return self._frames[:0]
        if count == lib.TCP_CLOSED:
            raise PeerClosed("the peer closed the connection")
        raise OSError(-count, os.strerror(-count))

    def send(self, batch: np.ndarray, timeout_ms: int) -> None:
        """Sends PIECE [n]. Raises TimeoutError where the peer takes nothing for so long."""
        result = lib.tcp_send(
            self._record.fd, ffi.from_buffer("const tcp_piece *", batch), len(batch), timeout_ms
        )
        if result:
            raise OSError(-result, os.strerror(-result))

    @property
    def num_waiting_bytes(self) -> int:
        """That have arrived and are in no frame yet."""
        return self._record.end - self._record.taken

    def wake(self) -> None:
        """Have `receive` return, now or when it is called next. Nothing once the stream is closed."""
        with self._lock:  # so that no descriptor of another's is woken
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self.socket.close()
            os.close(self._wake_fd)
