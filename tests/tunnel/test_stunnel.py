"""The recipe of TLS.md: what passes through the tunnel, and what does not."""

import socket
import threading
from contextlib import closing

import numpy as np
import pytest

from spdk_glue.namespace import BlockNamespace
from spdk_glue.transports.tcp import TcpTransport
from tests.tunnel.stunnel import Tunnel, secret_file, why_no_stunnel
from tests.unit.spdk_glue.fabrics.authenticated_target import DRIVE_NQN, AuthenticatedTarget, host_name

pytestmark = pytest.mark.skipif(bool(why_no_stunnel()), reason=why_no_stunnel() or "there")
SECONDS = 20
TEXT = b"what nobody else is to read " * 1000


@pytest.fixture
def echo():
    """A service on loopback that sends back what it gets; its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with closing(connection):
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def exchange(port, sent=TEXT):
    """What comes back; less if the connection ends."""
    with closing(socket.create_connection(("127.0.0.1", port), SECONDS)) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while len(received) < len(sent) and (piece := connection.recv(1 << 16)):
                received += piece
        except ConnectionError:
            pass  # the tunnel's way to say no
        return received


def test_data_pass_and_are_not_seen(tmp_path, echo):
    """A tunnel that carries what is sent as it is hides nothing."""
    secret = secret_file(tmp_path / "psk")
    with closing(Tunnel(tmp_path, echo, secret, secret)) as tunnel:
        assert exchange(tunnel.port) == TEXT
        assert len(tunnel.relay.seen) > 2 * len(TEXT) and TEXT[:20] not in bytes(tunnel.relay.seen)
    log = (tmp_path / "host.log").read_text()
    assert "TLSv1.3" in log and secret.read_text().split(":")[1].strip() not in log


def test_wrong_secret(tmp_path, echo):
    """Whoever has no secret reaches nothing behind the tunnel."""
    secrets = secret_file(tmp_path / "psk"), secret_file(tmp_path / "other")
    with closing(Tunnel(tmp_path, echo, *secrets)) as tunnel:
        assert exchange(tunnel.port) == b""


def test_no_tls(tmp_path, echo):
    """A host that forgot its end of the tunnel is not served in plain text."""
    secret = secret_file(tmp_path / "psk")
    with closing(Tunnel(tmp_path, echo, secret, secret)) as tunnel:
        assert TEXT[:20] not in exchange(tunnel.target_port)


def test_drive_behind_the_tunnel(tmp_path):
    """The whole recipe: our host proves itself to our target, and the drive's data pass, unseen."""
    target = AuthenticatedTarget(tmp_path)
    files = {"key_file": target.new_key("host.key"), "controller_key_file": target.new_key("drive.key")}
    target.allow(host_name(1), **{name: path.name for name, path in files.items()})
    secret = secret_file(tmp_path / "psk")
    with target.serving(), closing(Tunnel(tmp_path, target.port, secret, secret)) as tunnel:
        address = target.address(hostnqn=host_name(1), **files).replace(f":{target.port}/", f":{tunnel.port}/")
        with closing(BlockNamespace(TcpTransport.connect(address))) as namespace:
            data = np.frombuffer((TEXT * 4)[: 16 * 4096], np.uint8)
            namespace.write(1, data)
            assert (namespace.read(1, 16) == data).all()
        seen = bytes(tunnel.relay.seen)
    assert len(seen) > 2 * len(data) and TEXT[:20] not in seen and DRIVE_NQN.encode() not in seen
