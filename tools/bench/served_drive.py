"""A kvfs drive that a process of its own exports by SPDK's target."""

import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvfs_bench.nvmf_target import free_port

NQN = "nqn.2026-11.io.kvfs:served"
START_SECONDS = 60
END_SECONDS = 30


class ServedDrive:
    """A `kvfsctl serve --stack spdk` process, which does not outlive the one that starts it.

    listen: what to listen on, a free port of loopback by default; options: further arguments
    """

    def __init__(self, drive: Path, listen: str | None = None, options: Sequence[str] = ()):
        self.drive = drive
        self.port = free_port()
        self.listen = listen or f"127.0.0.1:{self.port}"
        self.options = options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kvfsctl", "serve", str(self.drive), "--stack", "spdk", "--nqn", NQN]
        sizes = ["--listen", self.listen, "--cache-bytes", "16MiB", "--num-workers", "2"]
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, *sizes, *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not select.select([self.process.stdout], [], [], START_SECONDS)[0]:
            self.kill()
            raise TimeoutError("the drive is not served")
        if not self.process.stdout.readline():
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
