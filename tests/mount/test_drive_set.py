"""A set of drives, mounted: one tree, whatever happens to the drives."""

import json
import os
import signal
import subprocess
import threading

import numpy as np
import pytest

import kvfs
from kvfs import errors

from .conftest import KVFSCTL
from .test_remote import SHAPE, random_kv


@pytest.fixture
def pool(tmp_path):
    pool = tmp_path / "pool.kvfs-set"
    drives = [f"--drive={tmp_path / name}.kvfs" for name in "ab"]
    command = [*KVFSCTL, "format", pool, *drives, "--size", "96MiB"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return pool


@pytest.fixture
def pool_mount(servers, pool, tmp_path):
    mountpoint = tmp_path / "mount"
    return servers([*KVFSCTL, "mount", "--foreground", pool, mountpoint], mountpoint)


def test_drives_change_under_a_mount(pool, pool_mount, kvfsctl, tmp_path):
    """A client decodes, files are written, and meanwhile a drive comes and another goes."""
    mount = pool_mount.mountpoint
    keys, values = random_kv(3000)
    (mount / "file").write_text("an ordinary one")
    with kvfs.open(mount) as store:
        sequence = store.create_sequence(store.add_model("m", **SHAPE), "chat")
        for layer in range(2):
            sequence.append(layer, keys, values)
        kvfsctl("format", tmp_path / "c.kvfs", "--size", "96MiB", check=True)
        kvfsctl("drive", "add", pool, tmp_path / "c.kvfs", check=True)
        drained = []
        thread = threading.Thread(
            target=lambda: drained.append(kvfsctl("drive", "drain", pool, tmp_path / "b.kvfs", "--json"))
        )
        thread.start()
        queries = np.random.default_rng(1).standard_normal((1, 1, 8, 64)).astype(np.float32)
        first, _ = store.attend(1, queries, sequence)
        while thread.is_alive():
            out, _ = store.attend(1, queries, sequence)
            np.testing.assert_allclose(out, first, atol=1e-6)
        thread.join()
        assert drained[0].returncode == 0, drained[0].stderr
        assert json.loads(drained[0].stdout)["moved_bytes"] == 2 * 2 * 3000 * 64 * 2
    found = np.load(mount / "kv" / "m" / "chat" / "layer_01" / "kv_head_01" / "values.npy")
    np.testing.assert_array_equal(found, values[:, 1].astype(np.float16))
    assert 'drive="' in (mount / ".kvfs" / "metrics").read_text()
    assert kvfsctl("drive", "drain", pool, tmp_path / "a.kvfs").returncode == 1  # it has the files
    kvfsctl("umount", mount, check=True)
    assert pool_mount.ended() == 0
    (tmp_path / "b.kvfs").unlink()
    with kvfs.open(pool) as store:
        np.testing.assert_array_equal(store.sequence("chat").read(0)[0], keys.astype(np.float16))
        assert store.check() == []


def test_killed_and_degraded(pool, pool_mount, servers, kvfsctl, tmp_path):
    """What was flushed is there after a kill; without a drive, what it held is an error, the rest is there."""
    mount = pool_mount.mountpoint
    keys, values = random_kv(600)
    (mount / "file").write_text("an ordinary one")
    with kvfs.open(mount) as store:
        sequence = store.create_sequence(store.add_model("m", **SHAPE), "chat")
        for layer in range(2):
            sequence.append(layer, keys, values)
        sequence.flush()
    os.sync()
    pool_mount.stop(signal.SIGKILL)
    subprocess.run(["umount", "--lazy", mount], check=True)
    with kvfs.open(pool) as store:
        np.testing.assert_array_equal(store.sequence("chat").read(1)[1], values.astype(np.float16))
    os.rename(tmp_path / "b.kvfs", tmp_path / "away")
    result = kvfsctl("mount", pool, mount)
    assert result.returncode == 1 and "b.kvfs" in result.stderr
    again = tmp_path / "again"
    servers([*KVFSCTL, "mount", "--foreground", "--degraded", pool, again], again)
    assert "chat" in os.listdir(again / "kv" / "m")
    with kvfs.open(again) as store:
        with pytest.raises(errors.DriveLost, match=r"b\.kvfs"):
            store.sequence("chat").read(0)
        os.rename(tmp_path / "away", tmp_path / "b.kvfs")
        kvfsctl("drive", "return", pool, tmp_path / "b.kvfs", check=True)
        np.testing.assert_array_equal(store.sequence("chat").read(0)[0], keys.astype(np.float16))
    kvfsctl("umount", again, check=True)
