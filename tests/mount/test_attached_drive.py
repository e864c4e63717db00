"""A drive that is served elsewhere, mounted here."""

import os
import time

import pytest

from kvfs.mount.mountpoints import mount_at
from kvfs.serving import serve


@pytest.fixture
def location(drive):
    with serve(drive, "127.0.0.1:0", cache_bytes="8MiB", num_workers=1) as (server, subsystems):
        yield f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}"


def mount_again(kvfsctl, location, mountpoint):
    """umount does not see when a drive elsewhere is let go of."""
    give_up = time.monotonic() + 10
    while (done := kvfsctl("mount", location, mountpoint)).returncode:
        assert "is open in another process" in done.stderr and time.monotonic() < give_up
        time.sleep(0.05)


def test_mount(kvfsctl, location, tmp_path):
    """What was written through the mount is on the drive there; nobody else opens it meanwhile."""
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    content = os.urandom(2 << 20)
    try:
        kvfsctl("mount", location, mountpoint, check=True)
        (mountpoint / "file").write_bytes(content)
        assert "is open in another process" in kvfsctl("ls", location).stderr
        kvfsctl("umount", mountpoint, check=True)
        assert mount_at(mountpoint) is None
        mount_again(kvfsctl, location, mountpoint)
        assert (mountpoint / "file").read_bytes() == content
    finally:
        kvfsctl("umount", mountpoint)
