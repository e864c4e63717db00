"""A kvfs drive that a process of its own exports by SPDK's target."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from kvfs_bench.nvmf_target import free_port

ROOT = Path(__file__).resolve().parents[2]
NQN = "nqn.2026-11.io.kvfs:served"
START_SECONDS = 60
END_SECONDS = 30


class ServedDrive:
    """options: of serve_spdk, by their text; it is killed when the test's process ends."""

    def __init__(self, drive: Path, *listen: str, **options: str):
        self.drive = drive
        self.port = free_port()
        self.listen = listen or (f"127.0.0.1:{self.port}",)
        self.options = {"nqn": repr(NQN), "cache_bytes": "16 << 20", "num_workers": "2", **options}
        self.start()

    def start(self) -> None:
        arguments = ", ".join(f"{name}={text}" for name, text in self.options.items())
        code = (
            "from pathlib import Path; from kvfsctl.serve_spdk import serve_spdk;"
            "from spdk_glue.spdk_target.configuration import AllowedHost;"
            f"serve_spdk(Path({str(self.drive)!r}), {list(self.listen)!r}, {arguments})"
        )
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if not select.select([self.process.stdout], [], [], START_SECONDS)[0]:
            self.kill()
            raise TimeoutError("the drive is not served")
        self.first_line = self.process.stdout.readline()
        if not self.first_line.startswith("serving"):
            _, errors = self.process.communicate(timeout=END_SECONDS)
            raise RuntimeError(errors[-3000:])

    @property
    def transport_id(self) -> str:
        return f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{self.port} subnqn:{NQN}"

    @property
    def location(self) -> str:
        return f"spdk:{self.transport_id}"

    def end(self) -> str:
        """By SIGTERM; what it said on stderr. Raises TimeoutExpired, or AssertionError where it fails."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=END_SECONDS)
        assert self.process.returncode == 0, errors[-3000:]
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.end()
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))
