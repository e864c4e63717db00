"""A kvfs.tree.Tree in memory: what the FUSE server is tested against on its own."""

import errno
import itertools
import os
import stat
import threading
import time
from dataclasses import dataclass, field, replace

from kvfs.tree import ROOT_INODE, AttributeChanges, Attributes, Caller, FileError, FileSystemUsage, OpenFile

MAX_NAME_BYTES = 255
MAX_FILE_BYTES = 1 << 40
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


@dataclass
class Node:
    attributes: Attributes
    parent: int = ROOT_INODE  # of folders
    entries: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # name: (inode, id)
    content: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    num_references: int = 0  # of the kernel, and handles


def _locked(method):
    def call(self, *arguments):
        with self._lock:
            return method(self, *arguments)

    return call


class MemoryTree:
    def __init__(self):
        self._lock = threading.RLock()
        self._inodes = itertools.count(ROOT_INODE + 1)
        self._ids = itertools.count(1)
        self._handles = itertools.count(1)
        self._open: dict[int, int] = {}  # inode by handle
        now = time.time_ns()
        root = Attributes(ROOT_INODE, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, now, now, now)
        self._nodes = {ROOT_INODE: Node(root, num_references=1)}

    def _node(self, inode: int) -> Node:
        if inode not in self._nodes:
            raise FileError(errno.ESTALE)
        return self._nodes[inode]

    def _attributes(self, node: Node) -> Attributes:
        attributes = replace(node.attributes)
        if stat.S_ISREG(attributes.mode):
            attributes.size = len(node.content)
            attributes.num_blocks = -(-attributes.size // 4096) * 8
        elif stat.S_ISLNK(attributes.mode):
            attributes.size = len(node.target)
        return attributes

    def _entry(self, parent: int, name: bytes) -> Node:
        folder = self._node(parent)
        if not stat.S_ISDIR(folder.attributes.mode):
            raise FileError(errno.ENOTDIR)
        if len(name) > MAX_NAME_BYTES:
            raise FileError(errno.ENAMETOOLONG)
        if name not in folder.entries:
            raise FileError(errno.ENOENT)
        return self._node(folder.entries[name][0])

    def _drop_if_unused(self, node: Node) -> None:
        if node.attributes.num_links == 0 and node.num_references == 0:
            del self._nodes[node.attributes.inode]

    def _unreference(self, inode: int, count: int) -> None:
        node = self._node(inode)
        node.num_references -= count
        assert node.num_references >= 0, f"inode {inode}: more forgotten than looked up"
        self._drop_if_unused(node)

    # references

    @_locked
    def lookup(self, parent: int, name: bytes) -> Attributes:
        if name == b".":
            node = self._node(parent)
        elif name == b"..":
            node = self._node(self._node(parent).parent)
        else:
            node = self._entry(parent, name)
        node.num_references += 1
        return self._attributes(node)

    @_locked
    def forget(self, inode: int, count: int) -> None:
        self._unreference(inode, count)

    @_locked
    def count_lookup(self, inode: int) -> None:
        self._node(inode).num_references += 1

    # attributes

    @_locked
    def attributes(self, inode: int) -> Attributes:
        return self._attributes(self._node(inode))

    @_locked
    def set_attributes(self, inode: int, changes: AttributeChanges, caller: Caller) -> Attributes:
        node = self._node(inode)
        attributes = node.attributes
        if changes.mode is not None:
            attributes.mode = stat.S_IFMT(attributes.mode) | changes.mode
        if changes.size is not None:
            self._resize(node, changes.size)
            attributes.mtime_ns = time.time_ns()
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            if getattr(changes, name) is not None:
                setattr(attributes, name, getattr(changes, name))
        attributes.ctime_ns = time.time_ns() if changes.ctime_ns is None else changes.ctime_ns
        return self._attributes(node)

    def _resize(self, node: Node, size: int) -> None:
        if size > MAX_FILE_BYTES:
            raise FileError(errno.EFBIG)
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))

    @_locked
    def read_link(self, inode: int) -> bytes:
        return self._node(inode).target

    # names

    def _add(self, parent: int, name: bytes, node: Node) -> None:
        folder = self._node(parent)
        if folder.attributes.num_links == 0:
            raise FileError(errno.ENOENT)
        if len(name) > MAX_NAME_BYTES:
            raise FileError(errno.ENAMETOOLONG)
        if name in folder.entries:
            raise FileError(errno.EEXIST)
        folder.entries[name] = node.attributes.inode, next(self._ids)
        if stat.S_ISDIR(node.attributes.mode):
            folder.attributes.num_links += 1
            node.parent = parent
        self._touch(folder)

    def _touch(self, node: Node) -> None:
        node.attributes.mtime_ns = node.attributes.ctime_ns = time.time_ns()

    def _make(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller, num_links: int = 1) -> Node:
        folder = self._node(parent).attributes
        gid = caller.gid
        if folder.mode & stat.S_ISGID:
            gid = folder.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        now = time.time_ns()
        inode = next(self._inodes)
        node = Node(Attributes(inode, mode, num_links, caller.uid, gid, 0, 0, now, now, now, rdev))
        self._add(parent, name, node)
        self._nodes[inode] = node
        node.num_references = 1
        return node

    @_locked
    def make_node(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        return self._attributes(self._make(parent, name, mode, rdev, caller))

    @_locked
    def make_folder(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        return self._attributes(self._make(parent, name, stat.S_IFDIR | mode, 0, caller, 2))

    @_locked
    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        node = self._make(parent, name, stat.S_IFLNK | 0o777, 0, caller)
        node.target = target
        return self._attributes(node)

    @_locked
    def link(self, inode: int, parent: int, name: bytes) -> Attributes:
        node = self._node(inode)
        self._add(parent, name, node)
        node.attributes.num_links += 1
        node.attributes.ctime_ns = time.time_ns()
        node.num_references += 1
        return self._attributes(node)

    @_locked
    def create(self, parent, name, mode, flags, caller) -> tuple[OpenFile, Attributes]:
        try:
            node = self._make(parent, name, stat.S_IFREG | mode, 0, caller)
        except FileError as error:
            if error.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            node = self._entry(parent, name)
            node.num_references += 1
        return self._open_file(node, flags), self._attributes(node)

    @_locked
    def unlink(self, parent: int, name: bytes) -> None:
        node = self._entry(parent, name)
        if stat.S_ISDIR(node.attributes.mode):
            raise FileError(errno.EISDIR)
        self._remove(parent, name, node)

    @_locked
    def remove_folder(self, parent: int, name: bytes) -> None:
        node = self._entry(parent, name)
        if not stat.S_ISDIR(node.attributes.mode):
            raise FileError(errno.ENOTDIR)
        if node.entries:
            raise FileError(errno.ENOTEMPTY)
        self._remove(parent, name, node)

    def _remove(self, parent: int, name: bytes, node: Node) -> None:
        folder = self._node(parent)
        del folder.entries[name]
        self._touch(folder)
        if stat.S_ISDIR(node.attributes.mode):
            folder.attributes.num_links -= 1
            node.attributes.num_links = 0
        else:
            node.attributes.num_links -= 1
        node.attributes.ctime_ns = time.time_ns()
        self._drop_if_unused(node)

    @_locked
    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        node = self._entry(parent, name)
        if len(new_name) > MAX_NAME_BYTES:
            raise FileError(errno.ENAMETOOLONG)
        folder, new_folder = self._node(parent), self._node(new_parent)
        target = None
        if new_name in new_folder.entries:
            target = self._entry(new_parent, new_name)
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise FileError(errno.ENOENT)
            folder.entries[name], new_folder.entries[new_name] = (
                (target.attributes.inode, folder.entries[name][1]),
                (node.attributes.inode, new_folder.entries[new_name][1]),
            )
            self._moved(node, parent, new_parent)
            self._moved(target, new_parent, parent)
        else:
            if target is node:
                return
            if target is not None:
                if flags & RENAME_NOREPLACE:
                    raise FileError(errno.EEXIST)
                if stat.S_ISDIR(target.attributes.mode):
                    if not stat.S_ISDIR(node.attributes.mode):
                        raise FileError(errno.EISDIR)
                    if target.entries:
                        raise FileError(errno.ENOTEMPTY)
                elif stat.S_ISDIR(node.attributes.mode):
                    raise FileError(errno.ENOTDIR)
                self._remove(new_parent, new_name, target)
            del folder.entries[name]
            new_folder.entries[new_name] = node.attributes.inode, next(self._ids)
            self._moved(node, parent, new_parent)
        self._touch(folder)
        self._touch(new_folder)

    def _moved(self, node: Node, parent: int, new_parent: int) -> None:
        node.attributes.ctime_ns = time.time_ns()
        if stat.S_ISDIR(node.attributes.mode):
            self._node(parent).attributes.num_links -= 1
            self._node(new_parent).attributes.num_links += 1
            node.parent = new_parent

    # files

    def _open_file(self, node: Node, flags: int) -> OpenFile:
        if flags & os.O_TRUNC:
            self._resize(node, 0)
            self._touch(node)
        node.num_references += 1
        handle = next(self._handles)
        self._open[handle] = node.attributes.inode
        return OpenFile(handle)

    @_locked
    def open(self, inode: int, flags: int, caller: Caller) -> OpenFile:
        return self._open_file(self._node(inode), flags)

    def _opened(self, handle: int) -> Node:
        return self._node(self._open[handle])

    @_locked
    def read(self, handle: int, offset: int, size: int) -> bytes:
        return bytes(memoryview(self._opened(handle).content)[offset : offset + size])

    @_locked
    def read_now(self, handle, offset, size):
        return self.read(handle, offset, size) if offset & 4096 else None

    def write(self, handle: int, offset: int, data: memoryview) -> int:
        node = self._opened(handle)
        if offset > len(node.content):
            self._resize(node, offset)
        node.content[offset : offset + len(data)] = data
        self._touch(node)
        return len(data)

    def flush_waits(self, handle: int) -> bool:
        return False

    def flush(self, handle: int) -> None:
        pass

    @_locked
    def release(self, handle: int) -> None:
        self._unreference(self._open.pop(handle), 1)

    def sync(self, handle: int, data_only: bool) -> None:
        pass

    @_locked
    def allocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        node = self._opened(handle)
        if mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
            raise FileError(errno.EOPNOTSUPP)
        size = len(node.content)
        if not mode & FALLOC_KEEP_SIZE and offset + length > size:
            self._resize(node, offset + length)
        if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
            stop = min(offset + length, len(node.content))
            if offset < stop:
                node.content[offset:stop] = bytes(stop - offset)
        self._touch(node)

    @_locked
    def seek(self, handle: int, offset: int, whence: int) -> int:
        """Whole pages of zeros are holes."""
        content = self._opened(handle).content
        if offset >= len(content):
            raise FileError(errno.ENXIO)
        wants_data = whence == os.SEEK_DATA
        while offset < len(content):
            stop = offset - offset % 4096 + 4096
            if any(content[offset:stop]) == wants_data:
                return offset
            offset = stop
        if wants_data:
            raise FileError(errno.ENXIO)
        return len(content)

    # folders

    @_locked
    def open_folder(self, inode: int, caller: Caller) -> int:
        return self._open_file(self._node(inode), 0).handle

    def read_folder(self, handle: int, start_id: int):
        with self._lock:
            entries = sorted(
                (number, name, inode) for name, (inode, number) in self._opened(handle).entries.items()
            )
            found = [
                (name, self._attributes(self._node(inode)), number)
                for number, name, inode in entries
                if number > start_id
            ]
        yield from found

    @_locked
    def release_folder(self, handle: int) -> None:
        self._unreference(self._open.pop(handle), 1)

    def sync_folder(self, handle: int, data_only: bool) -> None:
        pass

    # extended attributes

    @_locked
    def get_xattr(self, inode: int, name: bytes) -> bytes:
        try:
            return self._node(inode).xattrs[name]
        except KeyError:
            raise FileError(errno.ENODATA) from None

    @_locked
    def set_xattr(self, inode: int, name: bytes, value: bytes, flags: int) -> None:
        self._node(inode).xattrs[name] = value

    @_locked
    def list_xattrs(self, inode: int) -> list[bytes]:
        return list(self._node(inode).xattrs)

    @_locked
    def remove_xattr(self, inode: int, name: bytes) -> None:
        try:
            del self._node(inode).xattrs[name]
        except KeyError:
            raise FileError(errno.ENODATA) from None

    def usage(self) -> FileSystemUsage:
        return FileSystemUsage(4096, 1 << 20, 1 << 19, 1 << 20, 1 << 19)
