"""Mounts in scratch folders, always taken away again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs.mount.mountpoints import FUSE_DEVICE, mount_at

KVFSCTL = [sys.executable, "-m", "kvfsctl"]


@pytest.fixture(autouse=True)
def _needs_fuse():
    if not FUSE_DEVICE.exists():
        pytest.skip(f"{FUSE_DEVICE} is not there")


class Server:
    """A server in a child process, and where it serves."""

    def __init__(self, command: list, mountpoint: Path):
        self.mountpoint = mountpoint
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )

    def wait_until_ready(self) -> None:
        """Its log says so."""
        self.log = ""
        for line in self.process.stderr:
            self.log += line
            if "serving" in line:
                return
        pytest.fail(f"the server did not start: {self.log}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Its exit code, once it has ended; its log is complete then."""
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
        return self.process.returncode

    def clean_up(self) -> None:
        if mount_at(self.mountpoint):
            subprocess.run(["umount", "--lazy", self.mountpoint])
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def servers():
    """serve(command, mountpoint): a server that is ready, and gone after the test."""
    started = []

    def serve(command: list, mountpoint: Path) -> Server:
        mountpoint.mkdir(exist_ok=True)
        started.append(Server(command, mountpoint))
        started[-1].wait_until_ready()
        return started[-1]

    yield serve
    for server in started:
        server.clean_up()


@pytest.fixture
def memory_mount(servers, tmp_path) -> Server:
    """Two trees in memory."""
    mountpoint = tmp_path / "mount"
    return servers([sys.executable, "-m", "tests.mount.memory_server", mountpoint], mountpoint)


@pytest.fixture
def drive(tmp_path) -> Path:
    path = tmp_path / "drive.kvfs"
    subprocess.run([*KVFSCTL, "format", path, "--size", "96MiB"], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def drive_mount(servers, drive, tmp_path) -> Server:
    """A drive, served in the foreground."""
    mountpoint = tmp_path / "mount"
    return servers([*KVFSCTL, "mount", "--foreground", drive, mountpoint], mountpoint)


@pytest.fixture
def kvfsctl():
    def run(*arguments, check: bool = False) -> subprocess.CompletedProcess:
        command = [*KVFSCTL, *map(os.fspath, arguments)]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}  # nobody is asked
        return subprocess.run(command, check=check, timeout=120, **options)

    return run
