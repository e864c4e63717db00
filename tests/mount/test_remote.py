"""kvfs.open of a mounted folder: another process's store, under the permissions of the mount."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import errors

from .conftest import KVFSCTL

SHAPE = {"num_layers": 2, "num_query_heads": 8, "num_kv_heads": 2, "head_dim": 64}


def random_kv(num_tokens, seed=0):
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((num_tokens, 2, 64), np.float32) for _ in range(2))


def test_a_mounted_drive_is_used_as_its_file(drive, drive_mount, kvfsctl):
    """What one process appends is in the tree at once, computed with, and on the drive after unmounting."""
    mount = drive_mount.mountpoint
    keys, values = random_kv(600)
    queries = np.random.default_rng(1).standard_normal((1, 1, 8, 64)).astype(np.float32)
    with kvfs.open(mount) as store:
        sequence = store.create_sequence(store.add_model("m", **SHAPE), "chat")
        for layer in range(2):
            sequence.append(layer, keys, values)
        assert sequence.num_tokens == 600
        found = np.load(mount / "kv" / "m" / "chat" / "layer_01" / "kv_head_01" / "values.npy", mmap_mode="r")
        np.testing.assert_array_equal(found, values[:, 1].astype(np.float16))
        del found  # or the mount is busy
        out, lse = store.attend(1, queries, sequence)
        (mount / "kv" / "m" / "chat").rename(mount / "kv" / "m" / "renamed")
        assert sequence.name == "renamed"
        sequence.fork("child")
        assert "child" in os.listdir(mount / "kv" / "m")
    kvfsctl("umount", mount, check=True)
    with pytest.raises(errors.NotADrive, match="mounted"):
        kvfs.open(mount)
    with kvfs.open(drive) as store:
        for name in ("renamed", "child"):
            same_out, same_lse = store.attend(1, queries, store.sequence(name))
            np.testing.assert_array_equal(same_out, out)
            np.testing.assert_array_equal(same_lse, lse)
        assert store.check() == []


def test_each_open_is_one_invitation(drive_mount):
    """A token that could be used twice would outlive the permission that gave it."""
    connect = drive_mount.mountpoint / ".kvfs" / "connect"
    first, second = (json.loads(connect.read_bytes()) for _ in range(2))
    assert first["socket"] == second["socket"]
    assert first["token"] != second["token"]


def test_the_server_of_the_mount_is_killed(drive_mount):
    """A clear error instead of a wait, from the store that was open and from the next to be opened."""
    store = kvfs.open(drive_mount.mountpoint)
    sequence = store.create_sequence(store.add_model("m", **SHAPE), "chat")
    drive_mount.process.send_signal(signal.SIGKILL)
    drive_mount.process.wait()
    with pytest.raises(errors.ServerGone):
        sequence.append(0, *random_kv(3))
    with pytest.raises(errors.ServerGone):
        kvfs.open(drive_mount.mountpoint)
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_mount_for_one_user(drive_mount):
    """Without allow_other the kernel turns other users away, and so no invitation reaches them."""
    script = """
        import os, sys, kvfs
        kvfs.open  # loads it, while this user may read all modules
        os.setuid(65534)
        try:
            kvfs.open(sys.argv[1])
        except kvfs.errors.NotPermitted:
            print("refused")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), drive_mount.mountpoint]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "refused\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_mount_for_all_users(servers, drive, request):
    """allow_other: what another user makes through the store is that user's in the tree, and its mode holds."""
    script = """
        import os, sys, numpy, kvfs
        kvfs.open  # loads it, while this user may read all modules
        os.setuid(int(sys.argv[2]))
        with kvfs.open(sys.argv[1]) as store:
            model = store.add_model("m", num_layers=2, num_query_heads=8, num_kv_heads=2, head_dim=64)
            rows = numpy.ones((3, 2, 64), numpy.float32)
            try:
                sequence = store.create_sequence(model, "theirs")
            except kvfs.errors.SequenceExists:
                sequence = store.sequence("theirs")
            try:
                sequence.append(0, rows, rows)
                print("appended")
            except kvfs.errors.NotPermitted:
                print("refused", sequence.read(0)[0].shape)
    """
    folder = Path(tempfile.mkdtemp(prefix="kvfs-test-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    mount = folder / "mount"
    server = servers([*KVFSCTL, "mount", "--foreground", "--allow-other", drive, mount], mount)
    for uid, wanted in ((65534, "appended"), (65533, "refused (3, 2, 64)"), (0, "appended")):
        command = [sys.executable, "-c", textwrap.dedent(script), mount, str(uid)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.stdout == f"{wanted}\n", found.stderr
    assert (mount / "kv" / "m" / "theirs").stat().st_uid == 65534
    script = """
        import os, sys, kvfs
        from kvfs.kv_tree.transfer import import_sequence
        kvfs.open  # loads it, while this user may read all modules
        os.setuid(65534)
        with kvfs.open(sys.argv[1]) as store, open(sys.argv[2], "rb") as file:
            import_sequence(store, store.model("m"), "imported", file)
    """
    exported = mount / "kv" / "m" / "theirs" / "sequence.safetensors"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), mount, exported], check=True)
    assert (mount / "kv" / "m" / "imported").stat().st_uid == 65534
    server.stop()


def test_a_read_only_mount(servers, drive, tmp_path):
    """Clients of a mount that must not change change nothing."""
    with kvfs.open(drive) as store:
        sequence = store.create_sequence(store.add_model("m", **SHAPE), "chat")
        for layer in range(2):
            sequence.append(layer, *random_kv(20))
    mount = tmp_path / "mount"
    servers([*KVFSCTL, "mount", "--foreground", "--read-only", drive, mount], mount)
    with kvfs.open(mount) as store:
        sequence = store.sequence("chat")
        assert len(sequence.read(1)[0]) == 20
        model = store.add_model("m", **SHAPE)
        for call in (
            lambda: sequence.append(0, *random_kv(1)),
            lambda: sequence.truncate(0),
            lambda: sequence.fork("child"),
            lambda: store.create_sequence(model, "new"),
            lambda: store.add_model("other", **SHAPE),
            lambda: store.delete_sequence("chat"),
        ):
            with pytest.raises(errors.ReadOnly):
                call()
