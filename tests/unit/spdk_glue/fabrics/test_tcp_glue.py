"""The C that moves PDUs. If these fail, bytes of one PDU end up in another, or what is refused gets in."""

import socket
import threading
import time

import numpy as np
import pytest

from spdk_glue.command import SUBMISSION_ENTRY
from spdk_glue.fabrics import crc32c, pdu
from spdk_glue.fabrics.pdu import FatalPduError, Framing, PduType
from spdk_glue.fabrics.tcp_glue import api

DIGESTS = [(False, False), (True, False), (False, True), (True, True)]


def python_frames(wire: bytes, framing: Framing):
    """What take_pdu finds: (header, data, intact) of each, and the error that ended it."""
    found = []
    try:
        while (taken := pdu.take_pdu(wire, framing)) is not None:
            found.append((taken[0].header, taken[0].data, taken[0].is_data_intact))
            wire = wire[taken[1] :]
    except FatalPduError as error:
        return found, (int(error.fes), error.fei)
    return found, None


def c_frames(wire: bytes, framing: Framing):
    frames, _ = api.take_frames(np.frombuffer(wire, np.uint8), framing)
    found, error = [], None
    for frame in frames:
        if frame["fes"]:
            error = int(frame["fes"]), int(frame["fei"])
            break
        header = frame["header"].tobytes()
        start = int(frame["data_at"])
        data = wire[start : start + int(frame["data_length"])]
        found.append((header[: header[pdu.HLEN_OFFSET]], data, bool(frame["is_data_intact"])))
    return found, error


def stream_of(rng, framing: Framing) -> bytes:
    """PDUs of a host, many of them damaged somewhere."""
    wire = b""
    for _ in range(rng.integers(1, 6)):
        body = rng.integers(0, 256, rng.integers(0, 40), np.uint8).tobytes()
        if rng.integers(2) or not body:
            header = pdu.capsule_commands(np.zeros(1, SUBMISSION_ENTRY), framing, len(body))
        else:
            header = pdu.data(PduType.H2C_DATA, 1, len(body), framing)
        wire += pdu.with_digests(header, body)
    damaged = bytearray(wire)
    for _ in range(rng.integers(0, 3)):
        damaged[rng.integers(0, min(len(wire), 90))] = rng.integers(0, 256)
    return bytes(damaged[: rng.integers(1, len(wire) + 1)])


@pytest.mark.parametrize("digests", DIGESTS)
def test_frames_are_those_of_the_definition(digests):
    seed = 11
    rng = np.random.default_rng(seed)
    framing = Framing(True, *digests, max_data_bytes=64)
    refused = 0
    for round_number in range(1500):
        wire = stream_of(rng, framing)
        expected = python_frames(wire, framing)
        assert c_frames(wire, framing) == expected, (seed, round_number, wire.hex())
        refused += expected[1] is not None
    assert refused > 100


def test_crc32c_is_that_of_the_definition():
    data = np.random.default_rng(1).integers(0, 256, 300, np.uint8).tobytes()
    for length in [*range(40), 300]:
        assert api.crc32c(data[:length]) == crc32c.crc32c(data[:length])


@pytest.fixture
def pair():
    listener = socket.create_server(("127.0.0.1", 0))
    host = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    stream = api.Stream(ours, Framing(True, True, True, max_data_bytes=1 << 16))
    yield host, stream
    stream.close()
    host.close()
    listener.close()


def test_a_stream_takes_pdus_however_they_arrive(pair):
    host, stream = pair
    rng = np.random.default_rng(3)
    bodies = [rng.integers(0, 256, int(n), np.uint8).tobytes() for n in rng.integers(1, 1 << 16, 40)]
    wire = b"".join(
        pdu.with_digests(pdu.data(PduType.H2C_DATA, i, len(body), stream.framing), body)
        for i, body in enumerate(bodies)
    )

    def send():
        at = 0
        while at < len(wire):
            step = int(rng.integers(1, 1 << 15))
            host.sendall(wire[at : at + step])
            at += step

    sender = threading.Thread(target=send)
    sender.start()
    found = []
    while len(found) < len(bodies):
        for frame in stream.receive(2000):
            assert not frame["fes"] and frame["is_data_intact"]
            start = int(frame["data_at"])
            found.append(stream.buffer[start : start + int(frame["data_length"])].tobytes())
    sender.join()
    assert found == bodies


def test_what_is_sent_is_what_the_definition_builds(pair):
    host, stream = pair
    to_host = Framing(False, True, True, alignment=64)
    bodies = [np.full(n, n % 251, np.uint8) for n in (1, 4096, 100_000)]
    headers = np.concatenate([pdu.data(PduType.C2H_DATA, 7, len(body), to_host) for body in bodies])
    addresses = [body.__array_interface__["data"][0] for body in bodies]
    stream.send(api.pieces(headers, addresses, [len(body) for body in bodies]), 1000)
    expected = b"".join(
        pdu.with_digests(header.reshape(1), body.tobytes())
        for header, body in zip(headers, bodies, strict=True)
    )
    got = b""
    while len(got) < len(expected):
        got += host.recv(1 << 20)
    assert got == expected


@pytest.mark.parametrize("spin_us", [0, 1000, 60_000_000])
def test_time_wake_and_end(pair, spin_us):
    host, stream = pair
    stream.spin_us = spin_us if spin_us < 1_000_000 else 0
    assert len(stream.receive(10)) == 0
    stream.spin_us = spin_us
    threading.Timer(0.05, stream.wake).start()
    start = time.monotonic()
    assert len(stream.receive(60_000)) == 0
    assert time.monotonic() - start < 30  # woken, neither spun to the end nor timed out
    host.close()
    with pytest.raises(api.PeerClosed):
        stream.receive(1000)


def test_who_waited_long_sleeps_at_once_the_next_time(pair):
    """Else a connection that is idle takes a CPU."""
    _, stream = pair
    stream.spin_us = 40_000
    used = []
    for _ in range(3):
        start = time.thread_time()
        assert len(stream.receive(60)) == 0
        used.append(time.thread_time() - start)
    assert max(used[1:]) < 0.01


def test_a_peer_that_takes_nothing_is_given_up(pair):
    _, stream = pair
    body = np.zeros(1 << 16, np.uint8)
    headers = pdu.data(PduType.C2H_DATA, 7, np.full(500, len(body)), Framing(False))
    batch = api.pieces(headers, body.__array_interface__["data"][0], len(body))
    with pytest.raises(TimeoutError):
        stream.send(batch, 50)


def test_what_was_refused_has_its_header(pair):
    host, stream = pair
    host.sendall(bytes([4, 0, 9, 0, 72, 0, 0, 0]))
    (frame,) = stream.receive(1000)
    assert (frame["fes"], frame["fei"], frame["header"][2]) == (1, pdu.HLEN_OFFSET, 9)
