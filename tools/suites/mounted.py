"""A fresh drive, mounted for as long as a suite runs."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfs.mount.mountpoints import mount_at

KVFSCTL = [sys.executable, "-m", "kvfsctl"]
PATIENCE_SECONDS = 60.0


@contextmanager
def mounted_drive(size: str, at: Path | None = None) -> Iterator[Path]:
    """The mountpoint of a new drive in a scratch folder; or `at`, where something is mounted already."""
    if at is not None:
        yield at
        return
    with tempfile.TemporaryDirectory(prefix="kvfs-suite-") as scratch:
        drive, mountpoint = Path(scratch) / "drive.kvfs", Path(scratch) / "mount"
        mountpoint.mkdir()
        os.chmod(scratch, 0o755)  # other users run parts of a suite
        subprocess.run([*KVFSCTL, "format", drive, "--size", size], check=True, stdout=subprocess.DEVNULL)
        server = subprocess.Popen([*KVFSCTL, "mount", "--foreground", "--allow-other", drive, mountpoint])
        try:
            wait_for(server, mountpoint)
            yield mountpoint
        finally:
            if mount_at(mountpoint):
                subprocess.run(["umount", "--lazy", mountpoint])
            server.wait()


def wait_for(server: subprocess.Popen, mountpoint: Path) -> None:
    """Until a drive is mounted there; the end of the program if it cannot be."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while mount_at(mountpoint) is None:
        if server.poll() is not None or time.monotonic() > give_up:
            sys.exit("the drive could not be mounted")
        time.sleep(0.01)
