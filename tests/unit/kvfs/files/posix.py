"""A file system used as a kernel uses it: paths walked by lookups, each of which is forgotten again."""

import errno
import os
import stat
from contextlib import contextmanager

from kvfs.files.file_system import FileSystem
from kvfs.tree import ROOT_INODE, AttributeChanges, Attributes, Caller, FileError

ROOT_USER = Caller(uid=0, gid=0, pid=1)
USER = Caller(uid=1000, gid=1000, pid=2)


class Posix:
    """Calls by path; names are bytes, paths have no leading slash, b"" is the root."""

    def __init__(self, tree: FileSystem, caller: Caller = ROOT_USER):
        self.tree = tree
        self.caller = caller

    @contextmanager
    def inode(self, path: bytes):
        held = []
        inode = ROOT_INODE
        try:
            for name in path.split(b"/") if path else []:
                inode = self.tree.lookup(inode, name).inode
                held.append(inode)
            yield inode
        finally:
            for inode in held:
                self.tree.forget(inode, 1)

    @contextmanager
    def place(self, path: bytes):
        """(inode of the folder, name)."""
        folder, _, name = path.rpartition(b"/")
        with self.inode(folder) as inode:
            if not stat.S_ISDIR(self.tree.attributes(inode).mode):
                raise FileError(errno.ENOTDIR)  # as a walk would find out, whatever follows
            yield inode, name

    def _made(self, attributes: Attributes) -> Attributes:
        self.tree.forget(attributes.inode, 1)
        return attributes

    def stat(self, path: bytes) -> Attributes:
        with self.inode(path) as inode:
            return self.tree.attributes(inode)

    def exists(self, path: bytes) -> bool:
        try:
            self.stat(path)
        except FileError:
            return False
        return True

    def mkdir(self, path: bytes, mode: int = 0o755) -> Attributes:
        with self.place(path) as (folder, name):
            return self._made(self.tree.make_folder(folder, name, mode, self.caller))

    def mknod(self, path: bytes, mode: int, rdev: int = 0) -> Attributes:
        with self.place(path) as (folder, name):
            return self._made(self.tree.make_node(folder, name, mode, rdev, self.caller))

    def symlink(self, target: bytes, path: bytes) -> Attributes:
        with self.place(path) as (folder, name):
            return self._made(self.tree.make_symlink(folder, name, target, self.caller))

    def readlink(self, path: bytes) -> bytes:
        with self.inode(path) as inode:
            return self.tree.read_link(inode)

    def link(self, path: bytes, new: bytes) -> Attributes:
        with self.inode(path) as inode, self.place(new) as (folder, name):
            return self._made(self.tree.link(inode, folder, name))

    def unlink(self, path: bytes) -> None:
        with self.place(path) as (folder, name):
            self.tree.unlink(folder, name)

    def rmdir(self, path: bytes) -> None:
        with self.place(path) as (folder, name):
            self.tree.remove_folder(folder, name)

    def rename(self, path: bytes, new: bytes, flags: int = 0) -> None:
        with self.place(path) as old_place, self.place(new) as new_place:
            self.tree.rename(*old_place, *new_place, flags)

    @contextmanager
    def open(self, path: bytes, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644):
        """A handle."""
        if flags & os.O_CREAT:
            with self.place(path) as (folder, name):
                opened, attributes = self.tree.create(folder, name, mode, flags, self.caller)
                self.tree.forget(attributes.inode, 1)
        else:
            with self.inode(path) as inode:
                opened = self.tree.open(inode, flags, self.caller)
        try:
            yield opened.handle
        finally:
            self.tree.release(opened.handle)

    def write(self, path: bytes, offset: int, data: bytes, flags: int = 0) -> None:
        with self.open(path, os.O_RDWR | os.O_CREAT | flags) as handle:
            assert self.tree.write(handle, offset, data) == len(data)

    def read(self, path: bytes, offset: int = 0, size: int = 1 << 30) -> bytes:
        with self.open(path, os.O_RDONLY) as handle:
            return bytes(self.tree.read(handle, offset, size))

    def set(self, path: bytes, **changes) -> Attributes:
        with self.inode(path) as inode:
            return self.tree.set_attributes(inode, AttributeChanges(**changes), self.caller)

    def fallocate(self, path: bytes, mode: int, offset: int, length: int) -> None:
        with self.open(path, os.O_RDWR) as handle:
            self.tree.allocate(handle, mode, offset, length)

    def seek(self, path: bytes, offset: int, whence: int) -> int:
        with self.open(path, os.O_RDONLY) as handle:
            return self.tree.seek(handle, offset, whence)

    def listdir(self, path: bytes = b"") -> list[bytes]:
        with self.inode(path) as inode:
            handle = self.tree.open_folder(inode, self.caller)
            try:
                return [name for name, _, _ in self.tree.read_folder(handle, 0)]
            finally:
                self.tree.release_folder(handle)

    def sync(self, path: bytes) -> None:
        with self.open(path, os.O_RDWR) as handle:
            self.tree.sync(handle, False)
