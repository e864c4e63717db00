"""A drive as an administrator mounts it: started, stopped, killed, in the wrong place, and what it holds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.mount.mountpoints import mount_at


def test_in_the_background(kvfsctl, drive, tmp_path):
    """mount returns when files can be opened, umount when the drive is closed; what was written is there."""
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    content = os.urandom(2 << 20)
    try:
        kvfsctl("mount", drive, mountpoint, check=True)
        (mountpoint / "file").write_bytes(content)
        (usage,) = json.loads(kvfsctl("df", mountpoint, "--json", check=True).stdout)["drives"]
        assert usage["drive"] == str(drive)
        assert usage["used_bytes"] >= len(content)
        (tmp_path / "other").mkdir()
        assert "is mounted at" in kvfsctl("mount", drive, tmp_path / "other").stderr
        kvfsctl("umount", mountpoint, check=True)
        assert mount_at(mountpoint) is None
        kvfsctl("check", drive, check=True)
        kvfsctl("mount", drive, mountpoint, "-o", "ro", check=True)
        assert (mountpoint / "file").read_bytes() == content
        with pytest.raises(OSError, match="Read-only"):
            (mountpoint / "other").touch()
    finally:
        kvfsctl("umount", mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_everything_written(kvfsctl, drive, drive_mount, number):
    """Pages that the kernel holds back are on the drive when a server that was told to stop has ended."""
    (drive_mount.mountpoint / "file").write_bytes(b"x" * (1 << 20))
    assert drive_mount.stop(number) == 0
    assert mount_at(drive_mount.mountpoint) is None
    kvfsctl("check", drive, check=True)


def test_signal_while_files_are_open(servers, drive, drive_mount, tmp_path):
    """A server told to stop does not wait for whoever keeps a file open, but saves what they wrote."""
    file = os.open(drive_mount.mountpoint / "file", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(file, b"x" * (1 << 20))
        assert drive_mount.stop() == 0
    finally:
        with suppress(OSError):  # what is left of it has no server
            os.close(file)
    again = servers(
        [sys.executable, "-m", "kvfsctl", "mount", "-f", drive, tmp_path / "again"], tmp_path / "again"
    )
    assert (again.mountpoint / "file").read_bytes() == b"x" * (1 << 20)


def test_lazy_unmount(drive_mount, kvfsctl, drive):
    """umount --lazy: out of sight at once; the server ends with the last open file, and closes the drive."""
    with open(drive_mount.mountpoint / "file", "wb", buffering=0) as file:
        subprocess.run(["umount", "--lazy", drive_mount.mountpoint], check=True)
        time.sleep(0.2)
        assert drive_mount.process.poll() is None
        file.write(b"late")
    assert drive_mount.ended() == 0
    kvfsctl("check", drive, check=True)


def test_killed_server(drive_mount, kvfsctl, drive):
    """What is left of a mount whose server was killed is named; umount takes it away; the drive is whole."""
    file = os.open(drive_mount.mountpoint / "file", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"x" * 100_000)
    os.fsync(file)
    drive_mount.process.kill()
    drive_mount.process.wait()
    with suppress(OSError):
        os.close(file)
    refused = kvfsctl("mount", drive, drive_mount.mountpoint)
    assert refused.returncode == 1
    assert "kvfsctl umount" in refused.stderr
    left = json.loads(kvfsctl("leftovers", "--json", check=True).stdout)["machine"]
    assert ("mount", str(drive_mount.mountpoint)) in [(each["kind"], each["path"]) for each in left]
    kvfsctl("umount", drive_mount.mountpoint, check=True)
    kvfsctl("check", drive, check=True)
    kvfsctl("mount", drive, drive_mount.mountpoint, check=True)
    assert (drive_mount.mountpoint / "file").read_bytes() == b"x" * 100_000
    kvfsctl("umount", drive_mount.mountpoint, check=True)


def test_where_it_cannot_be_mounted(kvfsctl, drive, tmp_path):
    """One line that says why, and nothing mounted."""
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "empty").mkdir()
    for arguments, why in (
        ((drive, tmp_path / "missing"), "no such folder"),
        ((drive, tmp_path / "file"), "not a folder"),
        ((drive, tmp_path / "full"), "not empty"),
        ((drive, "/proc"), "mounted there already"),
        ((tmp_path / "missing.kvfs", tmp_path / "empty"), "no such file"),
        ((drive, tmp_path / "empty", "-o", "sideways"), "unknown mount option 'sideways'"),
        ((drive, tmp_path / "empty", "--cache-bytes", "much"), "'much' is not a size"),
    ):
        refused = kvfsctl("mount", *arguments)
        assert refused.returncode in (1, 2)
        assert why in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert "nothing is mounted" in kvfsctl("umount", tmp_path / "empty").stderr
    assert "not kvfs" in kvfsctl("umount", "/proc").stderr


def test_kv_cache_and_files_beside_each_other(drive_mount):
    """Engines use the store through the mount while tools read it as files: both see the same tokens."""
    root = drive_mount.mountpoint
    keys = np.arange(300 * 2 * 64, dtype=np.float16).reshape(300, 2, 64)
    with kvfs.open(root) as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
        store.create_sequence(model, "chat").append(0, keys, -keys)
        store.flush()
    sequence = root / "kv" / "tiny" / "chat"
    assert (np.load(sequence / "layer_00" / "kv_head_01" / "keys.npy", mmap_mode="r") == keys[:, 1]).all()
    shutil.copyfile(sequence / "sequence.safetensors", root / "copy")
    assert (root / "copy").read_bytes() == (sequence / "sequence.safetensors").read_bytes()


def test_busy_drive(kvfsctl, drive, tmp_path):
    """A drive that a process has open: its pid is told."""
    (tmp_path / "mount").mkdir()
    with kvfs.open(drive, cache_bytes="8MiB"):
        assert f"process {os.getpid()}" in kvfsctl("mount", drive, tmp_path / "mount").stderr


def test_service_manager(servers, drive, tmp_path, monkeypatch):
    """systemd's Type=notify waits for READY=1, which is sent once the mount answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(tmp_path / "notify"))
        notifications.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        mountpoint = tmp_path / "mount"
        server = servers([sys.executable, "-m", "kvfsctl", "mount", "-f", drive, mountpoint], mountpoint)
        assert notifications.recv(100) == b"READY=1"
        server.stop()
        assert notifications.recv(100) == b"STOPPING=1"


def test_helpers_of_system_programs(drive, tmp_path):
    """mount(8), mkfs(8) and fsck(8): their arguments and exit codes."""

    def helper(name: str, *arguments) -> subprocess.CompletedProcess:
        code = f"from kvfsctl.mount_helpers import {name}; {name}()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    made = tmp_path / "made.kvfs"
    assert helper("mkfs", made, "--size", "96MiB").returncode == 0
    assert helper("mkfs", made).returncode == 1
    assert helper("fsck", "-n", made).returncode == 0
    assert helper("fsck", "-p", made).returncode == 0
    assert helper("fsck", tmp_path / "missing").returncode == 8
    assert helper("mount", made, mountpoint, "-o", "sideways").returncode == 1
    assert helper("mount", made, tmp_path / "missing").returncode == 32
    try:
        assert helper("mount", made, mountpoint, "-n", "-o", "rw,noauto,user,_netdev,x-a=b").returncode == 0
        (mountpoint / "file").touch()
        assert helper("fsck", made).returncode == 8  # it is in use
    finally:
        subprocess.run([sys.executable, "-m", "kvfsctl", "umount", mountpoint], check=True)


def test_killed_under_load():
    """The short version of tools/suites/kill.py."""
    script = Path(__file__).parents[2] / "tools" / "suites" / "kill.py"
    result = subprocess.run([sys.executable, script, "--rounds", "2", "--json"], capture_output=True, text=True)
    rounds = json.loads(result.stdout)["rounds"]
    failures = [failure for found in rounds for failure in found["failures"]]
    assert [failure for failure in failures if not failure.startswith("mounted again in")] == []
    assert sum(found["synced_files"] for found in rounds) > 0
