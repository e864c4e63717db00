"""`kvfsctl serve` as a process of a test's own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NQN = "nqn.2026-11.io.kvfs:served"
START_SECONDS = 60


class ServedProcess:
    """The drive at `path` on a free port of loopback, until `close`. options: more of `kvfsctl serve`"""

    def __init__(self, path, *options: str, port: int = 0):
        self.path, self.options = path, options
        self.start(port)

    def start(self, port: int = 0) -> None:
        self.log = open(f"{self.path}.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "kvfsctl", "serve", str(self.path)),
                *("--listen", f"127.0.0.1:{port}", "--nqn", NQN, "--cache-bytes", "32MiB", "--json"),
                *self.options,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        text = ""
        for line in self.process.stdout:
            text += line
            if line.startswith("}"):
                break
        if not text:
            self.process.wait()
            raise RuntimeError(Path(f"{self.path}.log").read_text()[-2000:])
        self.port = json.loads(text)["port"]

    def transport_id(self, hostnqn: str = "") -> str:
        name = f" hostnqn:{hostnqn}" if hostnqn else ""
        return f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{self.port} subnqn:{NQN}{name}"

    @property
    def location(self) -> str:
        return f"spdk:{self.transport_id()}"

    def memory_kib(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._release()

    def close(self) -> int:
        """Ends it in order; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        started = time.monotonic()
        code = self.process.wait(30)
        assert time.monotonic() - started < 20
        self._release()
        return code

    def _release(self) -> None:
        self.process.stdout.close()
        self.log.close()
