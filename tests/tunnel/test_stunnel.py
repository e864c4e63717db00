"""The recipe of TLS.md: what passes through the tunnel, and what does not."""

import socket
import threading
from contextlib import closing

import pytest

from tests.tunnel.stunnel import Tunnel, secret_file, why_no_stunnel

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
