"""Names: the rules of POSIX that the kernel leaves to the file system."""

import errno
import os
import stat

import pytest

from kvfs.files import names
from kvfs.tree import ROOT_INODE, Caller, FileError
from tests.unit.kvfs.files.posix import Posix

GROUP_FOLDER = stat.S_ISGID | 0o775


def fails(number, operation, *arguments, **keywords):
    with pytest.raises(FileError) as raised:
        operation(*arguments, **keywords)
    assert raised.value.errno == number, f"{raised.value} where errno {number} was expected"


def test_a_name_leads_to_its_inode(posix):
    """The first thing a file system is for."""
    made = posix.mknod(b"a", stat.S_IFREG | 0o640)
    found = posix.stat(b"a")
    assert found == made
    assert (found.mode, found.num_links, found.size) == (stat.S_IFREG | 0o640, 1, 0)
    fails(errno.ENOENT, posix.stat, b"b")
    fails(errno.ENOTDIR, posix.stat, b"a/b")


def test_dot_and_dot_dot(posix):
    """Exports and `cd ..` ask for them."""
    outer = posix.mkdir(b"d")
    inner = posix.mkdir(b"d/e")
    for folder, name, wanted in (
        (inner.inode, b".", inner.inode),
        (inner.inode, b"..", outer.inode),
        (ROOT_INODE, b"..", ROOT_INODE),
    ):
        assert posix.tree.lookup(folder, name).inode == wanted
        posix.tree.forget(wanted, 1)


@pytest.mark.parametrize("size", [255, 256])
def test_name_length(posix, size):
    """The first thing that is forgotten; every operation has to know."""
    posix.mknod(b"short", stat.S_IFREG)
    name = b"n" * size
    for operation, *arguments in (
        (posix.mknod, name, stat.S_IFREG),
        (posix.stat, name),
        (posix.rename, name, b"other"),
        (posix.rename, b"short", name),
        (posix.unlink, name),
        (posix.mkdir, name),
        (posix.rmdir, name),
        (posix.symlink, b"target", name),
        (posix.unlink, name),
        (posix.link, b"short" if size > 255 else b"other", name),
    ):
        if size == 255:
            operation(*arguments)
        else:
            fails(errno.ENAMETOOLONG, operation, *arguments)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"x/y", b"x\0y"])
def test_impossible_names(posix, name):
    """A name that no path can have again could never be removed."""
    tree, caller = posix.tree, posix.caller
    fails(errno.EINVAL, tree.make_folder, ROOT_INODE, name, 0o755, caller)
    fails(errno.EINVAL, tree.make_node, ROOT_INODE, name, stat.S_IFREG, 0, caller)
    fails(errno.EINVAL, tree.unlink, ROOT_INODE, name)
    fails(errno.EINVAL, tree.remove_folder, ROOT_INODE, name)
    posix.mkdir(b"d")
    fails(errno.EINVAL, tree.rename, ROOT_INODE, b"d", ROOT_INODE, name, 0)


def test_a_taken_name(posix):
    """Two files of one name."""
    posix.mkdir(b"d")
    for operation in (
        lambda: posix.mkdir(b"d"),
        lambda: posix.mknod(b"d", stat.S_IFREG),
        lambda: posix.symlink(b"x", b"d"),
        lambda: posix.link(b"f", b"d"),
        lambda: posix.write(b"d", 0, b"x", os.O_EXCL),
    ):
        if not posix.exists(b"f"):
            posix.mknod(b"f", stat.S_IFREG)
        fails(errno.EEXIST, operation)


def test_every_type_of_node(posix):
    """A device that comes back as a file, or without its number."""
    for number, kind in enumerate([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]):
        made = posix.mknod(b"node-%d" % number, kind | 0o600, rdev=0x1234)
        assert made.mode == kind | 0o600
        assert made.rdev == (0x1234 if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        fails(errno.EINVAL, posix.set, b"node-%d" % number, size=0)
    fails(errno.EINVAL, posix.mknod, b"folder", stat.S_IFDIR | 0o755)
    fails(errno.EISDIR, posix.set, b"", size=0)


def test_owner_and_group(posix):
    """Files of another's group in a folder that is shared by a group."""
    user = Posix(posix.tree, Caller(uid=7, gid=8, pid=1, umask=0o027))
    made = user.mkdir(b"mine", 0o777)
    assert (made.uid, made.gid, made.mode) == (7, 8, stat.S_IFDIR | 0o750)
    posix.mkdir(b"shared")
    posix.set(b"shared", gid=99)
    posix.set(b"shared", mode=GROUP_FOLDER)
    file, folder = user.mknod(b"shared/f", stat.S_IFREG | 0o666), user.mkdir(b"shared/d", 0o777)
    assert (file.gid, file.mode) == (99, stat.S_IFREG | 0o640)
    assert (folder.gid, folder.mode) == (99, stat.S_IFDIR | stat.S_ISGID | 0o750)


def test_symlinks(posix):
    """Limits of their targets; the size that stat shows is the target's."""
    posix.symlink(b"t" * 4095, b"l")
    assert posix.readlink(b"l") == b"t" * 4095
    assert (posix.stat(b"l").size, posix.stat(b"l").mode) == (4095, stat.S_IFLNK | 0o777)
    fails(errno.ENAMETOOLONG, posix.symlink, b"t" * 4096, b"m")
    fails(errno.ENOENT, posix.symlink, b"", b"m")
    fails(errno.EINVAL, posix.readlink, b"")


def test_links(posix):
    """Data that are gone with the first of two names, or stay after the last."""
    posix.write(b"a", 0, b"data")
    posix.mkdir(b"d")
    assert posix.link(b"a", b"d/b").num_links == 2
    posix.unlink(b"a")
    assert posix.read(b"d/b") == b"data" and posix.stat(b"d/b").num_links == 1
    fails(errno.EPERM, posix.link, b"d", b"e")
    free = posix.tree.usage().free_blocks
    posix.unlink(b"d/b")
    assert posix.tree.usage().free_blocks == free + 1


def test_link_limit(posix, monkeypatch):
    """A count that overflows."""
    monkeypatch.setattr(names, "MAX_LINKS", 3)
    posix.mknod(b"a", stat.S_IFREG)
    posix.link(b"a", b"b")
    posix.link(b"a", b"c")
    fails(errno.EMLINK, posix.link, b"a", b"d")
    posix.mkdir(b"x")  # "." and ".." of the root, and this one
    fails(errno.EMLINK, posix.mkdir, b"y")
    posix.mkdir(b"x/z")
    fails(errno.EMLINK, posix.rename, b"x/z", b"z")


def test_folder_links(posix):
    """find(1) counts a folder's subfolders by its links."""
    posix.mkdir(b"d")
    posix.mkdir(b"d/e")
    posix.mkdir(b"f")
    assert [posix.stat(path).num_links for path in (b"", b"d", b"d/e")] == [4, 3, 2]
    posix.rename(b"d/e", b"f/e")
    assert [posix.stat(path).num_links for path in (b"d", b"f")] == [2, 3]
    posix.rename(b"f/e", b"d", 0)  # replaces an empty folder
    assert [posix.stat(path).num_links for path in (b"", b"d", b"f")] == [4, 2, 2]
    posix.rmdir(b"d")
    assert posix.stat(b"").num_links == 3


def test_removing(posix):
    """A folder that goes with all its files; a file removed as a folder."""
    posix.mkdir(b"d")
    posix.write(b"d/f", 0, b"x")
    fails(errno.ENOTEMPTY, posix.rmdir, b"d")
    fails(errno.EISDIR, posix.unlink, b"d")
    fails(errno.ENOTDIR, posix.rmdir, b"d/f")
    fails(errno.ENOENT, posix.unlink, b"d/g")
    posix.unlink(b"d/f")
    posix.rmdir(b"d")
    fails(errno.ENOENT, posix.stat, b"d")


def test_a_removed_folder_takes_no_names(posix):
    """A file that nobody could ever reach."""
    inode = posix.mkdir(b"d").inode
    posix.write(b"f", 0, b"x")
    assert posix.tree.lookup(ROOT_INODE, b"d").inode == inode
    posix.rmdir(b"d")
    caller = posix.caller
    fails(errno.ENOENT, posix.tree.make_folder, inode, b"x", 0o755, caller)
    fails(errno.ENOENT, posix.tree.rename, ROOT_INODE, b"f", inode, b"f", 0)
    fails(errno.ENOENT, posix.tree.lookup, inode, b"x")
    posix.tree.forget(inode, 1)
    fails(errno.ESTALE, posix.tree.attributes, inode)


def test_rename_over(posix):
    """Wrong types, and folders with something in them, stay."""
    posix.mkdir(b"d")
    posix.mkdir(b"e")
    posix.write(b"e/f", 0, b"x")
    posix.write(b"f", 0, b"old")
    posix.write(b"g", 0, b"new")
    fails(errno.EISDIR, posix.rename, b"f", b"d")
    fails(errno.ENOTDIR, posix.rename, b"d", b"f")
    fails(errno.ENOTEMPTY, posix.rename, b"d", b"e")
    fails(errno.ENOENT, posix.rename, b"h", b"f")
    posix.rename(b"g", b"f")
    assert posix.read(b"f") == b"new" and not posix.exists(b"g")
    posix.rename(b"e", b"d")
    assert posix.read(b"d/f") == b"x"


def test_rename_into_itself(posix):
    """A circle of folders that nobody reaches any more."""
    posix.mkdir(b"d")
    posix.mkdir(b"d/e")
    posix.mkdir(b"x")
    fails(errno.EINVAL, posix.rename, b"d", b"d/e/f")
    fails(errno.EINVAL, posix.rename, b"d", b"d/f")
    fails(errno.EINVAL, posix.rename, b"d", b"d/e", names.RENAME_EXCHANGE)
    fails(errno.EINVAL, posix.rename, b"d/e", b"d", names.RENAME_EXCHANGE)
    fails(errno.ENOTEMPTY, posix.rename, b"d/e", b"d")
    posix.rename(b"d", b"d")
    posix.rename(b"d", b"x/d")
    assert posix.exists(b"x/d/e")


def test_rename_flags(posix):
    """mv -n that overwrites; two folders exchanged whose parents no longer lead back."""
    posix.write(b"a", 0, b"a")
    posix.mkdir(b"d")
    posix.mkdir(b"d/sub")
    fails(errno.EEXIST, posix.rename, b"a", b"d", names.RENAME_NOREPLACE)
    posix.rename(b"a", b"b", names.RENAME_NOREPLACE)
    fails(errno.ENOENT, posix.rename, b"b", b"c", names.RENAME_EXCHANGE)
    fails(errno.EINVAL, posix.rename, b"b", b"d", names.RENAME_EXCHANGE | names.RENAME_NOREPLACE)
    fails(errno.EINVAL, posix.rename, b"b", b"d", 4)
    posix.rename(b"b", b"d/sub", names.RENAME_EXCHANGE)
    assert posix.read(b"d/sub") == b"a" and posix.listdir(b"b") == []
    assert [posix.stat(path).num_links for path in (b"", b"d", b"b")] == [4, 2, 2]
    assert posix.tree.lookup(posix.stat(b"b").inode, b"..").inode == ROOT_INODE


def test_two_names_of_one_file_stay(posix):
    """POSIX: rename between them does nothing."""
    posix.write(b"a", 0, b"x")
    posix.link(b"a", b"b")
    posix.rename(b"a", b"b")
    assert posix.listdir() == [b"a", b"b"]


def test_times_of_changes(posix):
    """make(1) and backups miss a change that leaves no time."""

    def older(*paths):
        for path in paths:
            posix.set(path, atime_ns=1, mtime_ns=1, ctime_ns=1)

    posix.mkdir(b"d")
    posix.mkdir(b"e")
    posix.write(b"d/f", 0, b"x")
    changes = [
        (lambda: posix.link(b"d/f", b"e/g"), [b"e"], [b"d/f", b"e"]),
        (lambda: posix.unlink(b"e/g"), [b"e"], [b"d/f", b"e"]),
        (lambda: posix.rename(b"d/f", b"e/f"), [b"d", b"e"], [b"d", b"e", b"e/f"]),
        (lambda: posix.rename(b"e/f", b"d/f"), [b"d", b"e"], [b"d", b"e", b"d/f"]),
        (lambda: posix.set(b"d/f", mode=0o600), [], [b"d/f"]),
        (lambda: posix.set(b"d/f", uid=3), [], [b"d/f"]),
        (lambda: posix.write(b"d/f", 0, b"y"), [b"d/f"], [b"d/f"]),
        (lambda: posix.set(b"d/f", size=0), [b"d/f"], [b"d/f"]),
        (lambda: posix.mkdir(b"e/s"), [b"e"], [b"e"]),
        (lambda: posix.rmdir(b"e/s"), [b"e"], [b"e"]),
    ]
    for change, mtimes, ctimes in changes:
        older(*(path for path in (b"d", b"e", b"d/f", b"e/f") if posix.exists(path)))
        change()
        for path in (b"d", b"e", b"d/f", b"e/f"):
            if posix.exists(path):
                found = posix.stat(path)
                assert (found.mtime_ns > 1) == (path in mtimes), path
                assert (found.ctime_ns > 1) == (path in ctimes), path


def test_listing(posix):
    """Names that a listing repeats or leaves out when it goes on behind any of them."""
    wanted = [b"file-%d" % number for number in range(1000)]
    for name in wanted:
        posix.mknod(name, stat.S_IFREG)
    handle = posix.tree.open_folder(ROOT_INODE, posix.caller)
    listed, start = [], 0
    while True:
        entries = posix.tree.read_folder(handle, start)
        some = [entry for entry, _ in zip(entries, range(7), strict=False)]
        if not some:
            break
        listed += [name for name, _, _ in some]
        start = some[-1][2]
    assert listed == wanted
    posix.tree.release_folder(handle)
    fails(errno.ENOTDIR, posix.tree.open_folder, posix.stat(b"file-1").inode, posix.caller)


def test_listing_while_names_change(posix):
    """`for f in *; do mv $f $f.old` that never ends, or rm -r that leaves files behind."""
    for number in range(600):
        posix.mknod(b"%d" % number, stat.S_IFREG)
    handle = posix.tree.open_folder(ROOT_INODE, posix.caller)
    listed = []
    for name, _, _ in posix.tree.read_folder(handle, 0):
        listed.append(name)
        if len(listed) % 2:
            posix.rename(name, name + b".old")
        else:
            posix.unlink(name)
            posix.mknod(b"new-%d" % len(listed), stat.S_IFREG)
    assert sorted(listed) == sorted(b"%d" % number for number in range(600))
    posix.tree.release_folder(handle)
    assert len(posix.listdir()) == 600


def test_changes_over_many_batches(posix, store):
    """An inode that leaves memory with its batch while an operation still has it: counts go astray."""
    posix.mknod(b"a", stat.S_IFREG)
    for number in range(3 * store._catalogue.batch._max_changes):
        posix.link(b"a", b"%d" % number)
        if number % 2:
            posix.unlink(b"%d" % number)
    assert posix.stat(b"a").num_links == len(posix.listdir())
