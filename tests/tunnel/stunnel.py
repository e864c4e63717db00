"""The tunnel of TLS.md, run from that text with other ports and files."""

import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "spdk_glue/fabrics/authentication/TLS.md"
START_SECONDS = 20


def why_no_stunnel() -> str:
    return "" if shutil.which("stunnel") else "stunnel is not in PATH"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configuration(name: str) -> str:
    """One of the recipe's two files."""
    blocks = re.findall(r"```ini\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"; {name}\n")]
    return found


def secret_file(path: Path) -> Path:
    path.touch(mode=0o600)
    path.write_text(f"host-a:{secrets.token_hex(32)}\n")
    return path


class Relay:
    """The network between the two tunnels: sends everything on and remembers it."""

    def __init__(self, port: int):
        self.to_port = port
        self.seen = bytearray()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                host, _ = self.server.accept()
            except OSError:
                return
            target = socket.create_connection(("127.0.0.1", self.to_port))
            for source, sink in ((host, target), (target, host)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(1 << 16):
                self.seen += piece
                sink.sendall(piece)
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):  # the other direction did it
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


class Tunnel:
    """From `port` on, encrypted over `relay`, to a service on loopback."""

    def __init__(self, folder: Path, service_port: int, target_secret: Path, host_secret: Path):
        self.port, self.target_port = free_port(), free_port()
        with ExitStack() as stack:
            self.relay = stack.enter_context(closing(Relay(self.target_port)))
            self._run(
                stack,
                folder / "target.conf",
                {
                    "0.0.0.0:4421": f"127.0.0.1:{self.target_port}",
                    "127.0.0.1:4420": f"127.0.0.1:{service_port}",
                },
                target_secret,
            )
            self._run(
                stack,
                folder / "host.conf",
                {
                    "127.0.0.1:4420": f"127.0.0.1:{self.port}",
                    "drive.example.com:4421": f"127.0.0.1:{self.relay.port}",
                },
                host_secret,
            )
            self._stack = stack.pop_all()
        for port in (self.port, self.target_port):
            self._wait(port)

    def _run(self, stack: ExitStack, path: Path, addresses: dict[str, str], secret: Path) -> None:
        text = configuration(path.name).replace("/etc/kvfs/psk", str(secret))
        for written, meant in addresses.items():
            assert f" {written}\n" in text
            text = text.replace(f" {written}\n", f" {meant}\n")
        path.write_text(f"debug = info\nsyslog = no\noutput = {path.with_suffix('.log')}\n{text}")
        process = subprocess.Popen(["stunnel", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)

    def _wait(self, port: int) -> None:
        """Until somebody listens; a connection would be a line in the log and a service's first."""
        give_up = time.monotonic() + START_SECONDS
        listening = f":{port:04X} 00000000:0000 0A"
        while listening not in Path("/proc/net/tcp").read_text():
            assert time.monotonic() < give_up, "stunnel does not listen"
            time.sleep(0.02)

    def close(self) -> None:
        self._stack.close()
