"""The HTTP endpoint: who sees what, and that it is no way in."""

import os
import re
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvfs.telemetry
from kvfs.errors import CannotServe, InvalidArgument
from kvfs.mount.mount_options import parse_options
from kvfs.telemetry import http_server
from kvfs.telemetry.http_server import serving_metrics, user_of

from .conftest import ask, ask_json

TOKEN = "a token that nobody knows"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def server(store, sequence):
    sequence.append_tokens(range(700))
    sequence.publish("red")
    store.find_prefix(sequence.model, range(700), "red")
    with kvfs.telemetry.serve(store, 0) as server:
        yield server


def test_contents(server):
    """Metrics that Prometheus reads, a page, and what the page asks for."""
    status, body, headers = ask(server.url, "metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "kvfs_request_duration_seconds" in {f.name for f in text_string_to_metric_families(body.decode())}
    assert ask_json(server.url, "telemetry.json")["totals"]["sequences"] == 1
    details = ask_json(server.url, "details.json")
    assert [row["name"] for row in details["sequences"]] == ["a"]
    (drive_map,) = details["map"]
    lengths = {len(values) for name, values in drive_map.items() if name != "drive"}
    assert lengths == {len(drive_map["state"])} and "sequences" in drive_map["stream"]
    assert ask(server.url, "../../etc/passwd")[0] == ask(server.url, "nothing")[0] == 404


def test_no_external_resources(server):
    """The page works where nothing else can be reached, and tells nobody that it is looked at."""
    _, page, headers = ask(server.url)
    text = page.decode().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// numbers", ""))
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_other_users_see_numbers_only(server, monkeypatch):
    """Every user of the host can connect to loopback: names and tenants are not theirs to see."""
    assert b'tenant="red"' in ask(server.url, "metrics")[1]
    monkeypatch.setattr(http_server, "user_of", lambda connection: os.geteuid() + 1)
    status, body, _ = ask(server.url, "metrics")
    assert status == 200 and b"tenant=" not in body and b"kvfs_free_bytes" in body
    details = ask_json(server.url, "details.json")
    assert details["sequences"] is None and details["events"] is None
    assert ask_json(server.url, "telemetry.json")["prefix"]["tenants"] == []


def test_the_other_end_of_a_connection(server):
    """The kernel's word, not the client's; of a connection that is nobody's, nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        assert user_of(accepted) == os.geteuid() == user_of(client)


def test_a_foreign_name(server):
    """A site whose name resolves to loopback could have its visitors' browsers read everything."""
    assert ask(server.url, "metrics", Host="evil.example:9100")[0] == 403
    assert ask(server.url, "metrics", Host="localhost:1")[0] == 200


def test_token(store, sequence, monkeypatch):
    """Who shows it sees all; off loopback nobody else sees anything but the empty page."""
    with pytest.raises(InvalidArgument, match="token"):
        kvfs.telemetry.serve(store, 0, host="0.0.0.0")
    with pytest.raises(InvalidArgument, match="at least"):
        kvfs.telemetry.serve(store, 0, token="short")
    with kvfs.telemetry.serve(store, 0, host="0.0.0.0", token=TOKEN) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for path in ("metrics", "telemetry.json", "details.json"):
            assert ask(url, path)[0] == ask(url, path, Authorization="Bearer wrong")[0] == 401
            assert ask(url, path, **BEARER)[0] == 200
        assert ask_json(url, "details.json", **BEARER)["sequences"]
        assert ask(url)[0] == 200
    monkeypatch.setattr(http_server, "user_of", lambda connection: None)
    with kvfs.telemetry.serve(store, 0, token=TOKEN) as server:
        assert ask_json(server.url, "details.json")["sequences"] is None
        assert ask_json(server.url, "details.json", **BEARER)["sequences"]


def test_what_is_wrong_is_one_line(store, tmp_path):
    """A port that is taken, an address that is none, a token that others can read."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CannotServe, match="in use"):
        kvfs.telemetry.serve(store, taken.getsockname()[1])
    with pytest.raises(CannotServe):
        kvfs.telemetry.serve(store, 0, host="192.0.2.1", token=TOKEN)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    for at, file in (
        ("x", None),
        ("1:2:3:x", None),
        ("99999", None),
        ("host:1", None),
        (None, token),
        ("0", token),
    ):
        with pytest.raises(InvalidArgument) as error, serving_metrics(store, at, file):
            pass
        assert "\n" not in str(error.value)
    token.chmod(0o600)
    with serving_metrics(store, "[::1]:0" if socket.has_ipv6 else "0", token) as server:
        assert ask(server.url, "metrics", **BEARER)[0] == 200


def test_options_of_a_mount():
    """As mount -o and /etc/fstab have them."""
    options = parse_options("ro,metrics=[::1]:9464,metrics_token=/etc/token")
    assert options == {"read_only": True, "metrics": "[::1]:9464", "metrics_token": "/etc/token"}


def test_a_store_that_is_closed(path):
    """An answer, and no traceback."""
    store = kvfs.open(path, cache_bytes="8MiB", num_workers=1)
    with kvfs.telemetry.serve(store, 0) as server:
        store.close()
        status, body, _ = ask(server.url, "metrics")
        assert status == 503 and body.count(b"\n") == 1
    server.close()


def test_noise(server):
    """Whatever comes over the socket, the server goes on."""
    host, port = re.fullmatch(r"http://(.*):(\d+)/", server.url).groups()
    for noise in (
        b"",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(noise)
    assert ask(server.url, "metrics")[0] == 200
