"""A drive that is served elsewhere, mounted here."""

import json
import os
from contextlib import ExitStack

import numpy as np
import pytest

import kvfs
from kvfs.errors import DriveBusy
from kvfs.mount.mountpoints import mount_at
from kvfs.serving import serve


@pytest.fixture
def location(drive):
    with serve(drive, "127.0.0.1:0", cache_bytes="8MiB", num_workers=1) as (server, subsystems):
        yield f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}"


def test_mount(kvfsctl, location, tmp_path):
    """What was written through the mount is on the drive there; nobody else opens it meanwhile."""
    mountpoint, other = tmp_path / "mount", tmp_path / "other"
    mountpoint.mkdir()
    other.mkdir()
    content = os.urandom(2 << 20)
    try:
        kvfsctl("mount", location, mountpoint, check=True)
        (mountpoint / "file").write_bytes(content)
        kvfsctl("ls", location, check=True)  # by way of the mount
        with pytest.raises(DriveBusy, match="is open in another process"):
            kvfs.open(location)
        kvfsctl("umount", mountpoint, check=True)
        assert mount_at(mountpoint) is None
        kvfsctl("mount", location, mountpoint, check=True)  # umount has waited until it was let go of
        assert "is mounted at" in kvfsctl("mount", location, other).stderr
        assert (mountpoint / "file").read_bytes() == content
    finally:
        kvfsctl("umount", mountpoint)


def test_mount_of_a_set(kvfsctl, drive, tmp_path):
    """A set's file that names drives on the wire: made, mounted, looked at and mounted again by kvfsctl."""
    pool, mountpoint = tmp_path / "pool.kvfs-set", tmp_path / "mount"
    mountpoint.mkdir()
    second = tmp_path / "second.kvfs"
    kvfsctl("format", second, "--size", "96MiB", check=True)
    with ExitStack() as stack:
        locations = []
        for path in (drive, second):
            served = serve(path, "127.0.0.1:0", cache_bytes="8MiB", num_workers=1)
            server, subsystems = stack.enter_context(served)
            locations.append(f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}")
        stack.callback(kvfsctl, "umount", mountpoint)
        drives = [f"--drive={location}" for location in locations]
        kvfsctl("format", pool, *drives, "--force", check=True)
        kvfsctl("mount", pool, mountpoint, check=True)
        with kvfs.open(mountpoint) as store:
            model = store.add_model("m", num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
            rows = np.ones((300, 2, 64), np.float32)
            store.create_sequence(model, "s").append(0, rows, rows)
            store.flush()
        shown = json.loads(kvfsctl("drive", "list", pool, "--json", check=True).stdout)["drives"]
        assert [(each["drive"], each["num_kv_heads"]) for each in shown] == [(each, 1) for each in locations]
        kvfsctl("umount", mountpoint, check=True)
        kvfsctl("mount", pool, mountpoint, check=True)
        found = np.load(mountpoint / "kv/m/s/layer_00/kv_head_01/values.npy")
        np.testing.assert_array_equal(found, rows[:, 1].astype(np.float16))
