"""What the server adds to a tree: every operation reaches it through the kernel, and comes back right."""

import errno
import os
import stat
import subprocess

import pytest

SIZE = 3 << 20


@pytest.fixture
def root(memory_mount):
    return memory_mount.mountpoint


def test_files_and_folders(root):
    """Names, links, attributes and content through the kernel; a wrong field would show in one of them."""
    (root / "folder").mkdir(mode=0o750)
    file = root / "folder" / "file"
    content = os.urandom(SIZE + 17)
    file.write_bytes(content)
    os.link(file, root / "hard")
    os.symlink("folder/file", root / "soft")
    os.mkfifo(root / "fifo", 0o600)
    os.utime(file, ns=(1_000_000_007, 2_000_000_011))
    os.chmod(file, 0o4711)
    found = os.stat(root / "hard")
    assert (found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)) == (len(content), 2, 0o4711)
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_007, 2_000_000_011)
    assert (root / "soft").read_bytes() == content
    assert stat.S_ISFIFO(os.stat(root / "fifo").st_mode)
    assert stat.S_IMODE((root / "folder").stat().st_mode) == 0o750
    os.rename(file, root / "moved")
    os.unlink(root / "hard")
    assert sorted(os.listdir(root)) == [".kvfs", "fifo", "folder", "kv", "moved", "soft"]
    os.truncate(root / "moved", 5)
    assert (root / "moved").read_bytes() == content[:5]
    os.rmdir(root / "folder")


def test_what_pyfuse3_lacks(root):
    """fallocate, SEEK_DATA and SEEK_HOLE, copy_file_range: without fuse_glue they fail or are slow."""
    with open(root / "file", "w+b", buffering=0) as file, open(root / "copy", "w+b", buffering=0) as copy:
        os.pwrite(file.fileno(), b"x" * 5000, 5 * 4096)
        # the kernel has not sent the data yet when it asks where they are
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 5 * 4096
        assert os.lseek(file.fileno(), 5 * 4096, os.SEEK_HOLE) == 5 * 4096 + 5000
        with pytest.raises(OSError) as raised:
            os.lseek(file.fileno(), SIZE, os.SEEK_DATA)
        assert raised.value.errno == errno.ENXIO
        assert os.copy_file_range(file.fileno(), copy.fileno(), SIZE, 0, 100) == 5 * 4096 + 5000
        assert os.pread(copy.fileno(), SIZE, 100 + 5 * 4096) == b"x" * 5000
        os.posix_fallocate(copy.fileno(), 0, SIZE)
        assert os.fstat(copy.fileno()).st_size == SIZE
        punch = ["fallocate", "--punch-hole", "--offset", "20480", "--length", "8192", root / "file"]
        subprocess.run(punch, check=True)
        assert os.pread(file.fileno(), 5000, 5 * 4096) == bytes(5000)


def test_extended_attributes(root):
    """Values of any bytes; the errors that tools tell apart."""
    (root / "file").touch()
    os.setxattr(root / "file", "user.a", b"\0\xff")
    assert os.getxattr(root / "file", "user.a") == b"\0\xff"
    assert os.listxattr(root / "file") == ["user.a"]
    with pytest.raises(OSError, match="exists"):
        os.setxattr(root / "file", "user.a", b"", os.XATTR_CREATE)
    os.removexattr(root / "file", "user.a")
    with pytest.raises(OSError) as raised:
        os.getxattr(root / "file", "user.a")
    assert raised.value.errno == errno.ENODATA


def test_names_of_the_kv_tree_stay(root):
    """kv and .kvfs are always there: nobody makes, moves or removes them, or links across the trees."""
    for name in ("kv", ".kvfs"):
        with pytest.raises(OSError) as raised:
            os.rmdir(root / name)
        assert raised.value.errno == errno.EBUSY
        with pytest.raises(OSError) as raised:
            os.rename(root / name, root / "other")
        assert raised.value.errno == errno.EBUSY
    (root / "file").touch()
    for across in (os.rename, os.link):
        with pytest.raises(OSError) as raised:
            across(root / "file", root / "kv" / "file")
        assert raised.value.errno == errno.EXDEV
    (root / "kv" / "inside").mkdir()
    assert os.listdir(root / "kv") == ["inside"]
    assert os.stat(root / "kv" / "..").st_ino == os.stat(root).st_ino


def test_a_long_listing_is_whole(root, memory_mount):
    """A folder listed in several requests, its references counted: the tree notices one forgotten too often."""
    for number in range(3000):
        (root / f"file with a long name, so that few go into one answer of the server {number:04}").touch()
    listing = {entry.name: entry.stat().st_ino for entry in os.scandir(root)}
    assert len(listing) == 3002
    for name in listing.keys() - {"kv", ".kvfs"}:
        os.unlink(root / name)
    assert sorted(os.listdir(root)) == [".kvfs", "kv"]
    assert memory_mount.stop() == 0
    assert "unexpected" not in memory_mount.log


def test_unexpected_error_is_eio(root, memory_mount):
    """A bug in a tree: the caller gets EIO, the log a line, and the server lives on."""
    with pytest.raises(OSError) as raised:
        os.stat(root / "raise")
    assert raised.value.errno == errno.EIO
    with open(root / "file", "wb") as file, pytest.raises(OSError) as raised:
        os.posix_fallocate(file.fileno(), 0, 0x666)
    assert raised.value.errno == errno.EIO
    (root / "cursed").touch()
    os.chmod(root / "cursed", 0o123)
    os.unlink(root / "cursed")  # the kernel forgets it
    assert os.listdir(root)
    assert memory_mount.stop() == 0
    assert memory_mount.log.count("unexpected RuntimeError: a bug") == 3
