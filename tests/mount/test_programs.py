"""Programs as they are, in the mount: what they write there is whole, also after a restart."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

GIT_AS = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
GIT_AS |= {f"GIT_{who}_{what}": "somebody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
SETUP = """
from setuptools import setup
setup(name="somebodys", version="1.0", packages=["somebodys"], package_data={"somebodys": ["data"]})
"""


def run(*command, cwd=None) -> str:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **GIT_AS}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def needs(program: str):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def make_tree(folder: Path, num_folders: int = 6, num_files: int = 12) -> Path:
    """Files of many sizes, modes and times, a hard and a symbolic link."""
    for number in range(num_folders * num_files):
        file = folder / f"folder-{number % num_folders}" / f"file-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(hashlib.sha256(b"%d" % number).digest() * (number * number))
        file.chmod(0o400 | number % 0o400)
        os.utime(file, ns=(10**18 + number, 10**18 + number))
    (folder / "symbolic").symlink_to("folder-1")
    (folder / "hard").hardlink_to(folder / "folder-0" / "file-0")
    return folder


def facts(folder: Path) -> dict:
    """By path: mode, time, size, content or target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        times = None if path.is_dir() or path.is_symlink() else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, times, content)
    return found


@needs("tar")
def test_tar(drive_mount, kvfsctl, drive, tmp_path):
    """Into the mount and out of it, with modes, times to the nanosecond, and links."""
    source = make_tree(tmp_path / "source")
    into = drive_mount.mountpoint / "unpacked"
    into.mkdir()
    run("tar", "--format=posix", "-C", source, "-cf", drive_mount.mountpoint / "archive.tar", ".")
    run("tar", "-C", into, "-xpf", drive_mount.mountpoint / "archive.tar")
    assert facts(into) == facts(source)
    assert (into / "hard").stat().st_ino == (into / "folder-0" / "file-0").stat().st_ino
    assert drive_mount.stop() == 0
    try:
        kvfsctl("mount", drive, drive_mount.mountpoint, check=True)
        assert facts(into) == facts(source)
    finally:
        kvfsctl("umount", drive_mount.mountpoint)


@needs("git")
def test_git(drive_mount, tmp_path):
    """Clone, change, commit, repack; its own check finds nothing, and another clone has it all."""
    origin, clone = make_tree(tmp_path / "origin"), drive_mount.mountpoint / "clone"
    run("git", "init", "-q", cwd=origin)
    run("git", "add", ".", cwd=origin)
    run("git", "commit", "-qm", "one", cwd=origin)
    run("git", "clone", "-q", "--no-local", origin, clone)
    for number in range(4):
        (clone / "folder-2" / f"new-{number}").write_text("text\n" * number * 1000)
        run("git", "add", ".", cwd=clone)
        run("git", "commit", "-qm", f"number {number}", cwd=clone)
    run("git", "gc", "-q", "--prune=now", cwd=clone)
    run("git", "fsck", "--full", "--strict", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("git", "clone", "-q", "--no-local", clone, tmp_path / "again")
    assert run("git", "rev-parse", "HEAD^{tree}", cwd=tmp_path / "again") == run(
        "git", "rev-parse", "HEAD^{tree}", cwd=clone
    )


@pytest.mark.parametrize("journal", ["delete", "truncate", "wal"])
def test_sqlite(drive_mount, journal):
    """Two connections, locks between them, and a rollback; with `wal` also a shared map of memory."""
    path = drive_mount.mountpoint / f"{journal}.db"
    with sqlite3.connect(path) as one, sqlite3.connect(path, timeout=0) as other:
        assert one.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        one.execute("CREATE TABLE word (number INTEGER PRIMARY KEY, text)")
        for start in range(0, 3000, 500):
            one.executemany(
                "INSERT INTO word VALUES (?, ?)", [(n, "w" * (n % 500)) for n in range(start, start + 500)]
            )
            one.commit()
        one.execute("DELETE FROM word WHERE number % 2")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        one.rollback()
        assert other.execute("SELECT count(*), sum(length(text)) FROM word").fetchone() == (3000, 6 * 124750)
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_pip_installs(drive_mount, tmp_path):
    """A package, built and installed in the mount, that Python imports from there."""
    pytest.importorskip("setuptools")
    source = drive_mount.mountpoint / "source"
    (source / "somebodys").mkdir(parents=True)
    (source / "setup.py").write_text(SETUP)
    (source / "somebodys" / "__init__.py").write_text("from pathlib import Path\n")
    (source / "somebodys" / "data").write_bytes(bytes(range(256)) * 5000)
    target = drive_mount.mountpoint / "packages"
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-cache-dir", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, source)
    look = "import somebodys; print(len((somebodys.Path(somebodys.__file__).parent / 'data').read_bytes()))"
    found = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {look}")
    assert found == "1280000\n"


@needs("fio")
@pytest.mark.parametrize("direct", [0, 1])
def test_fio_verifies(drive_mount, tmp_path, direct):
    """Random writes with a sync now and then, each block with its checksum, read back and compared."""
    options = ["--rw=randwrite", "--size=24m", "--bsrange=4k-64k", "--fsync=16", "--verify=crc32c"]
    options += [f"--direct={direct}", "--do_verify=1", "--verify_fatal=1", "--norandommap", "--ioengine=psync"]
    run("fio", "--name=blocks", f"--directory={drive_mount.mountpoint}", *options, cwd=tmp_path)  # its state
