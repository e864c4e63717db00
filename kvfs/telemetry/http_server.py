"""Metrics and the status page over HTTP, on loopback; elsewhere only to who shows a token.

Every user of a host can connect to its loopback. So it is asked who does: the user of the process that has
the store, and root, see all; others see numbers, but no tenants, no names of sequences, and no events. Who
shows the token sees all, too.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kvfs.errors import CannotServe, InvalidArgument, KvfsError
from kvfs.metadata_vfs import PLACEMENT_METADATA
from kvfs.placement import PLACEMENT_FILES, PLACEMENT_OBJECTS
from kvfs.sequence import PLACEMENT_TAIL
from kvfs.telemetry.visible_store import nothing_of_tenants
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_REQUESTS = 8  # at once
REQUEST_SECONDS = 10.0  # of silence, after which a connection is closed
SHOWN_SEQUENCES = 100
MIN_TOKEN_LENGTH, MAX_TOKEN_BYTES = 16, 4096
_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.ASCII)
_PAGE = Path(__file__).with_name("status_page.html")


class MetricsServer:
    """Serves /metrics, and at / the status page, until `close`. Use as a context manager, or call `close`.

    token: at least 16 characters, for `Authorization: Bearer`. Raises InvalidArgument for an address off
    loopback without one, CannotServe.
    """

    def __init__(self, store, port: int, *, host: str = LOOPBACK, token: str | None = None):
        if not 0 <= port <= 65535:
            raise InvalidArgument(f"a port is 0 to 65535, not {port}")
        try:
            address = ipaddress.ip_address(host)
        except ValueError as error:
            raise InvalidArgument(f"metrics are served at an IP address, not {host!r}") from error
        if token is not None and len(token) < MIN_TOKEN_LENGTH:
            raise InvalidArgument(f"a token has at least {MIN_TOKEN_LENGTH} characters")
        if not address.is_loopback and token is None:
            raise InvalidArgument(f"metrics at {host} are for other hosts to see: that takes a token")
        view = _View(store, token, address.is_loopback)
        try:
            self._server = _Server(host, port, address.version, view)
        except OSError as error:
            raise CannotServe(f"{host}:{port}", error.strerror or str(error)) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="kvfs-metrics", daemon=True)
        self._thread.start()
        log.info("metrics and status page at %s", self.url)

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def close(self) -> None:
        """Requests under way end first. Closing twice is allowed."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def serving_metrics(
    store, at: str | None, token_file: str | os.PathLike | None = None
) -> Iterator[MetricsServer | None]:
    """A MetricsServer at PORT or ADDRESS:PORT, or none. token_file: readable by its owner alone.

    Raises as MetricsServer.
    """
    if at is None:
        if token_file is not None:
            raise InvalidArgument("a token for metrics, which nobody has asked for")
        yield None
        return
    host, has_host, port = at.rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise InvalidArgument(f"metrics: {at!r} is no PORT or ADDRESS:PORT")
    token = None if token_file is None else _read_token(token_file)
    with MetricsServer(
        store, int(port), host=host.strip("[]") if has_host else LOOPBACK, token=token
    ) as server:
        yield server


def _read_token(path: str | os.PathLike) -> str:
    try:
        with open(path) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InvalidArgument(f"{os.fspath(path)}: a token is for its owner alone to read (chmod 600)")
            return file.read(MAX_TOKEN_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{os.fspath(path)}: {error}") from error


class _View:
    """What is served, to whom. Each content is a function of whether the caller may see all."""

    def __init__(self, store, token: str | None, is_loopback: bool):
        self._store, self._token, self.is_loopback = store, token, is_loopback
        self.page, self.policy = _page()

    def knows_token(self, authorization: str | None) -> bool:
        if self._token is None or not authorization:
            return False
        return hmac.compare_digest(authorization.encode(), f"Bearer {self._token}".encode())

    def telemetry(self, sees_all: bool) -> dict:
        found = self._store.telemetry()
        return found if sees_all else {**found, **nothing_of_tenants()}

    def details(self, sees_all: bool) -> dict:
        return {
            "map": [named_streams(found) for found in self._store.drive_map()],
            "sequences": self._store.newest_sequences(SHOWN_SEQUENCES) if sees_all else None,
            "events": self._store.events() if sees_all else None,
        }

    def contents(self) -> dict[str, tuple[str, Callable[[bool], bytes]]]:
        """By path: the type, and what gives it."""
        from kvfs.telemetry.metrics import metrics_text  # prometheus_client takes a while to import

        as_json = "application/json"
        return {
            "/": ("text/html; charset=utf-8", lambda sees_all: self.page),
            "/metrics": (
                "text/plain; version=0.0.4; charset=utf-8",
                lambda sees_all: metrics_text(self.telemetry(sees_all)),
            ),
            "/telemetry.json": (as_json, lambda sees_all: json.dumps(self.telemetry(sees_all)).encode()),
            "/details.json": (as_json, lambda sees_all: json.dumps(self.details(sees_all)).encode()),
        }


# what is above is of sequences: see kvfs/placement.py
_STREAM_NAMES = {
    PLACEMENT_METADATA: "catalogue",
    PLACEMENT_TAIL: "tails",
    PLACEMENT_FILES: "files",
    PLACEMENT_OBJECTS: "objects",
}


def named_streams(found: dict) -> dict:
    """A drive's map with names of what its superblocks hold in place of streams."""
    names = [
        stream if stream in (None, "collected") else _STREAM_NAMES.get(stream, "sequences")
        for stream in found["stream"]
    ]
    return {**found, "stream": names}


def _page() -> tuple[bytes, str]:
    """(the status page, its Content-Security-Policy: its own script and style, asking its own host)"""
    page = _PAGE.read_bytes()

    def digest(tag: bytes) -> str:
        inline = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'"

    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    return page, f"{policy}; script-src {digest(b'script')}; style-src {digest(b'style')}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, version: int, view: _View):
        self.address_family = socket.AF_INET6 if version == 6 else socket.AF_INET
        self.contents = view.contents()
        self.view = view
        self.room = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__((host, port), _Handler)

    def handle_error(self, request, client_address) -> None:
        log.debug("a client at %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version, sys_version = "kvfs", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        status, kind, body = self._content()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", self.server.view.policy)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _content(self) -> tuple[HTTPStatus, str, bytes]:
        view, plain = self.server.view, "text/plain; charset=utf-8"
        # a web site's name that resolves to loopback would let its pages read this one's answers
        if view.is_loopback and not _HOST.fullmatch(self.headers.get("Host", "localhost")):
            return HTTPStatus.FORBIDDEN, plain, b"not by this name\n"
        path = self.path.partition("?")[0]
        has_token = view.knows_token(self.headers.get("Authorization"))
        if path not in self.server.contents:
            return HTTPStatus.NOT_FOUND, plain, b"there are /metrics and /\n"
        if not (view.is_loopback or has_token or path == "/"):  # the page itself holds nothing
            return HTTPStatus.UNAUTHORIZED, plain, b"a token is asked for\n"
        if not self.server.room.acquire(blocking=False):
            return HTTPStatus.SERVICE_UNAVAILABLE, plain, b"too many requests at once\n"
        try:
            kind, give = self.server.contents[path]
            sees_all = has_token or (view.is_loopback and self._is_owner())
            return HTTPStatus.OK, kind, give(sees_all)
        except (KvfsError, NvmeError) as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, plain, f"{error}\n".encode()
        finally:
            self.server.room.release()

    def _is_owner(self) -> bool:
        return user_of(self.connection) in (0, os.geteuid())

    def log_message(self, format: str, *arguments) -> None:
        log.debug("%s: %s", self.address_string(), format % arguments)


def user_of(connection: socket.socket) -> int | None:
    """The user whose process is at the other end of a TCP connection of this host; None: not to be told."""
    is_v6 = connection.family == socket.AF_INET6
    wanted = _as_in_proc(connection.getpeername()), _as_in_proc(connection.getsockname())
    try:
        lines = Path("/proc/self/net/tcp6" if is_v6 else "/proc/self/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if (fields[1], fields[2]) == wanted:
            return int(fields[7])
    return None


def _as_in_proc(address: tuple) -> str:
    """proc(5): words of an address in the host's byte order, hexadecimal, and the port."""
    packed = ipaddress.ip_address(address[0].partition("%")[0]).packed
    words = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
