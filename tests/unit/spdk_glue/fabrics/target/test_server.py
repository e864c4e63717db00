"""The target's sockets and threads. If these fail, one bad peer takes the drive from all the others."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.pdu import Framing, PduType
from spdk_glue.fabrics.target.host_access import AllowedHost, HostAccess, UnauthenticatedListener
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.server import CannotListen, Server
from spdk_glue.fabrics.target.subsystem import ServedDrive, Subsystems
from tests.unit.kvfsctl.command_line import kvfsctl
from tests.unit.spdk_glue.fabrics.scripted_target import wait_until
from tests.unit.spdk_glue.fabrics.target.hosts import BLOCK, HOST, HOST_ID, SUBSYSTEM
from tests.unit.spdk_glue.memory_drive import MemoryDrive

ROOT = Path(__file__).resolve().parents[5]
SHORT = Limits(handshake_seconds=2, stall_seconds=2)  # enough for a host that shares its CPU
PATIENT = Limits()
NUM_READS, PATIENCE = 20, 60
TO_TARGET, FROM_TARGET = Framing(True), Framing(False, max_data_bytes=1 << 30)


@contextmanager
def serving(limits=PATIENT, drive=None, when_fetchable=lambda ticket, call: call()):
    drive = drive or MemoryDrive(block_bytes=BLOCK, num_lbas=1024)
    subsystems = Subsystems(ServedDrive(drive.device, when_fetchable), HostAccess.anyone(), limits, SUBSYSTEM)
    server = Server(subsystems, "127.0.0.1", 0)
    try:
        yield server
    finally:
        server.close()
    assert server.num_connections == 0 and not subsystems._associations


class Peer:
    """A host's socket, blocking."""

    def __init__(self, server, qid=0, cntlid=0xFFFF, hostnqn=HOST, is_connected=True):
        self.socket = socket.create_connection(server.address, 5)
        self.socket.settimeout(5)
        self._received, self._cid = b"", 0
        if is_connected:
            self.socket.sendall(pdu.ic_request(header_digest=False, data_digest=False).tobytes())
            assert self.next().type == PduType.IC_RESPONSE
            data = records.connect_data(HOST_ID, hostnqn, SUBSYSTEM, cntlid).tobytes()
            completion = self.run(records.connect(qid, 32), data)
            assert completion["status"] == 0
            self.cntlid = int(completion["cdw0"]) & 0xFFFF
        if is_connected and qid == 0:
            assert self.run(records.property_set(records.Property.CC, records.CC_ENABLE))["status"] == 0

    def send(self, entry, data=b"", room=0):
        entry = entry.copy()
        self._cid += 1
        entry["cid"], entry["flags"] = self._cid, records.PSDT_SGL
        if data or room:
            kind = records.SGL_IN_CAPSULE if data else records.SGL_TRANSPORT
            entry["dptr"] = np.void(records.sgl(kind, len(data) or room).tobytes())
        self.socket.sendall(pdu.capsule_commands(entry, TO_TARGET, len(data)).tobytes() + data)
        return self._cid

    def next(self):
        while True:
            found = pdu.take_pdu(self._received, FROM_TARGET)
            if found is not None:
                self._received = self._received[found[1] :]
                return found[0]
            piece = self.socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("closed")
            self._received += piece

    def completion(self, cid):
        self.data = b""
        while True:
            found = self.next()
            if found.type == PduType.C2H_DATA:
                self.data += found.data
            elif found.record["entry"]["cid"] == cid:
                return found.record["entry"]

    def run(self, entry, data=b"", room=0):
        return self.completion(self.send(entry, data, room))

    def is_closed(self) -> bool:
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True


def test_write_and_read_over_a_socket():
    with serving() as server:
        admin = Peer(server)
        io = Peer(server, 1, admin.cntlid)
        content = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8).tobytes()
        assert io.run(command.write(7, 1), content)["status"] == 0
        assert io.run(command.read(7, 1), room=BLOCK)["status"] == 0
        assert io.data == content


def test_slow_peers_are_let_go_and_hold_up_nobody():
    """Silent, half a PDU, half a transfer, taking nothing: each is given up, while a good host is served."""
    with serving(SHORT) as server:
        silent = Peer(server, is_connected=False)
        half = Peer(server, is_connected=False)
        half.socket.sendall(pdu.ic_request(header_digest=False, data_digest=False).tobytes()[:50])
        admin = Peer(server)
        stalled = Peer(server, 1, admin.cntlid)
        stalled.send(command.write(0, 1), room=BLOCK)  # the R2T's data never come
        cut = Peer(server, 2, admin.cntlid)
        cut.socket.sendall(bytes([4, 0, 72, 0, 72, 0, 0, 0]) + bytes(20))
        greedy = Peer(server, 3, admin.cntlid)
        greedy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(31):
            greedy.send(command.read(0, 256), room=256 * BLOCK)  # and nothing is taken
        good = Peer(server, 4, admin.cntlid)
        for _ in range(NUM_READS):
            assert good.run(command.read(0, 1), room=BLOCK)["status"] == 0
        assert server.num_connections == 7  # all are still there: none was waited for
        give_up = time.monotonic() + PATIENCE
        while server.num_connections > 2 and time.monotonic() < give_up:
            assert good.run(command.read(0, 1), room=BLOCK)["status"] == 0
            time.sleep(0.02)
        assert server.num_connections == 2  # admin and good
        for peer in (silent, half, stalled, cut):
            assert peer.is_closed()


def test_a_peer_that_breaks_a_rule_reads_why():
    with serving() as server:
        peer = Peer(server, is_connected=False)
        peer.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        terminate = peer.next()
        assert terminate.type == PduType.C2H_TERMINATE and terminate.data[:3] == b"GET"
        assert peer.is_closed()


def test_a_fetch_that_waits_holds_up_nobody():
    """Neither its own connection nor another; and it ends with its connection."""
    waiting = []
    with serving(when_fetchable=lambda ticket, call: waiting.append(call)) as server:
        admin = Peer(server)
        io, other = Peer(server, 1, admin.cntlid), Peer(server, 2, admin.cntlid)
        assert io.run(command.vendor(IoOpcode.ATTENTION_SUBMIT, 1), bytes([5]) + bytes(63))["status"] == 0
        fetch = io.send(command.vendor(IoOpcode.ATTENTION_FETCH, 1), room=BLOCK)
        for peer in (io, other, io):
            assert peer.run(command.read(0, 1), room=BLOCK)["status"] == 0
        threading.Timer(0.1, waiting[0]).start()
        assert io.completion(fetch)["cdw0"] == 5


def test_a_blocked_write_holds_up_its_own_connection_alone():
    drive = MemoryDrive(block_bytes=BLOCK, num_lbas=1024)
    drive.gate.clear()
    with serving(drive=drive) as server:
        admin = Peer(server)
        io, other = Peer(server, 1, admin.cntlid), Peer(server, 2, admin.cntlid)
        written = io.send(command.write(0, 1), bytes(BLOCK))
        assert drive.entered.wait(5)
        assert other.run(command.read(0, 1), room=BLOCK)["status"] == 0
        drive.gate.set()
        assert io.completion(written)["status"] == 0


def test_many_hosts_at_once():
    with serving() as server:
        hosts = []
        for number in range(32):
            admin = Peer(server, hostnqn=f"nqn.2026-11.io.kvfs:h{number}")
            data = records.connect_data(HOST_ID, f"nqn.2026-11.io.kvfs:h{number}", SUBSYSTEM, admin.cntlid)
            io = Peer(server, is_connected=False)
            io.socket.sendall(pdu.ic_request(header_digest=False, data_digest=False).tobytes())
            io.next()
            assert io.run(records.connect(1, 32), data.tobytes())["status"] == 0
            hosts.append((admin, io))
        for number, (_, io) in enumerate(hosts):
            assert io.run(command.write(number, 1), bytes([number]) * BLOCK)["status"] == 0
        for number, (_, io) in enumerate(hosts):
            io.run(command.read(number, 1), room=BLOCK)
            assert io.data == bytes([number]) * BLOCK
        for admin, io in hosts:
            admin.socket.close()  # the queues go with it
            assert io.is_closed()


def test_more_connections_than_allowed():
    with serving(Limits(max_connections=3)) as server:
        peers = [Peer(server, hostnqn=f"nqn.2026-11.io.kvfs:h{n}") for n in range(3)]
        assert Peer(server, is_connected=False).is_closed()
        peers[0].socket.close()
        wait_until(lambda: server.num_connections == 2)
        Peer(server)


def test_closing_ends_all():
    with serving() as server:
        admin = Peer(server)
        io = Peer(server, 1, admin.cntlid)
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < PATIENT.stall_seconds  # it waited for nobody
        assert admin.is_closed() and io.is_closed()


def test_where_it_does_not_listen():
    subsystems = Subsystems(ServedDrive(MemoryDrive().device), HostAccess.anyone(), nqn=SUBSYSTEM)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UnauthenticatedListener):
            Server(subsystems, host, 0)
    subsystems.access = HostAccess({HOST: AllowedHost(HOST)})
    with pytest.raises(UnauthenticatedListener, match="key"):
        Server(subsystems, "0.0.0.0", 0)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, pytest.raises(CannotListen, match="in use"):
        Server(subsystems, "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(CannotListen):
        Server(subsystems, "no-such-host.invalid", 4420)


# The command line


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    import kvfs

    path = tmp_path_factory.mktemp("served") / "d.kvfs"
    kvfs.format(path, "16MiB")
    return path


def test_bad_input_is_one_line(drive, tmp_path):
    access = tmp_path / "hosts.toml"
    access.write_text('[[host]]\nnqn = "nqn.2026-11.io.kvfs:a"\nkey_file = "missing.key"\n')
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
            ((drive, "--listen", f"127.0.0.1:{port}"), "in use"),
            ((drive, "--listen", "127.0.0.1:x"), "not an address"),
            ((drive, "--listen", "0.0.0.0:0"), "--host-access"),
            ((drive, "--listen", "127.0.0.1:0", "--nqn", "drive"), "not an NVMe qualified name"),
            ((drive, "--listen", "127.0.0.1:0", "--host-access", access), "missing.key"),
            ((tmp_path / "none.kvfs", "--listen", "127.0.0.1:0"), "no such file"),
        ):
            done = kvfsctl("serve", *arguments)
            assert done.returncode == 1, (arguments, done)
            lines = [line for line in done.stderr.splitlines() if line.startswith("kvfsctl:")]
            assert len(lines) == 1 and said in lines[0], (arguments, done.stderr)
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options", [("spdk", "--max-connections", "9"), ("spdk", "--spin-us", "0"), ("own", "--poll")]
)
def test_options_of_the_other_stack_are_refused(drive, options):
    stack, *given = options
    done = kvfsctl("serve", drive, "--stack", stack, *given)
    assert done.returncode == 2 and f"--stack {stack} has no {given[0]}" in " ".join(done.stderr.split())


def test_sigterm_closes_in_order(drive):
    server = subprocess.Popen(
        [sys.executable, "-m", "kvfsctl", "serve", str(drive), "--listen", "127.0.0.1:0", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text = ""
    for line in server.stdout:
        text += line
        if line.startswith("}"):
            break
    facts = json.loads(text)
    assert facts["nqn"].startswith("nqn.2014-08.org.nvmexpress:uuid:")
    with closing(socket.create_connection((facts["host"], facts["port"]))) as connection:
        connection.sendall(pdu.ic_request(header_digest=False, data_digest=False).tobytes())
        assert connection.recv(128)
        server.send_signal(signal.SIGSTOP)  # after which signals may reach any of its threads
        time.sleep(0.2)
        server.send_signal(signal.SIGCONT)
        server.terminate()
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0 and "Traceback" not in errors
    assert kvfsctl("check", drive).returncode == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz(seed):
    """The long suite, short: see tools/suites/fuzz_nvme_tcp.py."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "suites" / "fuzz_nvme_tcp.py", "--count", "8000"),
            *("--seed", str(seed), "--sockets", "2"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
