"""Extended attributes: their names, their limits, and that they stay with their file."""

import errno
import stat

import pytest

from kvfs.files.file_system import XATTR_CREATE, XATTR_REPLACE
from kvfs.tree import ROOT_INODE
from tests.unit.kvfs.files.test_names import fails


@pytest.fixture
def inode(posix):
    inode = posix.mknod(b"a", stat.S_IFREG).inode
    posix.tree.count_lookup(inode)
    yield inode
    posix.tree.forget(inode, 1)


def test_set_get_list_remove(posix, inode):
    """Values of another file or name."""
    tree = posix.tree
    tree.set_xattr(inode, b"user.a", b"one", 0)
    tree.set_xattr(inode, b"trusted.b", b"", 0)
    tree.set_xattr(ROOT_INODE, b"user.a", b"root's", 0)
    tree.set_xattr(inode, b"user.a", b"two\0\xff", 0)
    assert tree.get_xattr(inode, b"user.a") == b"two\0\xff" and tree.get_xattr(inode, b"trusted.b") == b""
    assert sorted(tree.list_xattrs(inode)) == [b"trusted.b", b"user.a"]
    tree.remove_xattr(inode, b"user.a")
    fails(errno.ENODATA, tree.get_xattr, inode, b"user.a")
    fails(errno.ENODATA, tree.remove_xattr, inode, b"user.a")
    assert tree.get_xattr(ROOT_INODE, b"user.a") == b"root's"


def test_flags(posix, inode):
    """setxattr(2) with XATTR_CREATE is used as a lock."""
    tree = posix.tree
    fails(errno.ENODATA, tree.set_xattr, inode, b"user.a", b"x", XATTR_REPLACE)
    tree.set_xattr(inode, b"user.a", b"x", XATTR_CREATE)
    fails(errno.EEXIST, tree.set_xattr, inode, b"user.a", b"y", XATTR_CREATE)
    tree.set_xattr(inode, b"user.a", b"z", XATTR_REPLACE)
    fails(errno.EINVAL, tree.set_xattr, inode, b"user.a", b"z", 4)
    assert tree.get_xattr(inode, b"user.a") == b"z"


def test_limits(posix, inode):
    """Values that setxattr(2) takes and getxattr(2) cannot give; a list of names that does not fit a call."""
    tree = posix.tree
    tree.set_xattr(inode, b"user." + b"n" * 250, b"v" * 65536, 0)
    assert tree.get_xattr(inode, b"user." + b"n" * 250) == b"v" * 65536
    fails(errno.ERANGE, tree.set_xattr, inode, b"user." + b"n" * 251, b"", 0)
    fails(errno.E2BIG, tree.set_xattr, inode, b"user.a", b"v" * 65537, 0)
    for number in range(255):
        tree.set_xattr(inode, b"user.%0250d" % number, b"", 0)
    fails(errno.ENOSPC, tree.set_xattr, inode, b"user.%0250d" % 255, b"", 0)
    tree.set_xattr(inode, b"user.%0250d" % 7, b"again", 0)


@pytest.mark.parametrize("name", [b"system.posix_acl_access", b"other.name", b"plain"])
def test_namespaces(posix, inode, name):
    """ACLs that are stored and never enforced."""
    fails(errno.EOPNOTSUPP, posix.tree.set_xattr, inode, name, b"x", 0)
    fails(errno.EOPNOTSUPP, posix.tree.get_xattr, inode, name)
    fails(errno.EOPNOTSUPP, posix.tree.remove_xattr, inode, name)
    fails(errno.EINVAL, posix.tree.set_xattr, inode, b"user.", b"x", 0)


def test_they_go_with_their_file(opened):
    """Rows that nobody ever removes; attributes that a new file inherits."""
    store, posix = opened()
    for number in range(3):
        made = posix.mknod(b"%d" % number, stat.S_IFREG)
        posix.tree.set_xattr(made.inode, b"user.a", b"%d" % number, 0)
    posix.unlink(b"1")
    posix.rename(b"2", b"0")
    store.close()
    store, posix = opened()
    left = posix.stat(b"0").inode
    assert posix.tree.get_xattr(left, b"user.a") == b"2"
    assert store._catalogue._db.execute("SELECT DISTINCT inode FROM xattr") == [(left,)]
