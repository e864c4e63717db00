"""Ordinary POSIX files as a tree (kvfs.tree.Tree): handles, attributes, extended attributes and durability.

Names are the business of names.py, what is in files of file_data.py.
"""

import errno
import itertools
import os
import stat
import time
from collections.abc import Iterator
from functools import partial

from kvfs.allocator import Extent
from kvfs.errors import StoreClosed
from kvfs.files.file_catalogue import XATTR_BYTES
from kvfs.files.file_data import FileData
from kvfs.files.inode import PERMISSIONS, Inode, clamped_time
from kvfs.files.inode_table import InodeTable
from kvfs.files.names import MAX_NAME_BYTES, Names
from kvfs.files.write_behind import WriteBehind
from kvfs.placement import PLACEMENT_FILES
from kvfs.read_ahead import ReadAhead
from kvfs.tree import AttributeChanges, Attributes, Caller, FileError, FileSystemUsage, OpenFile

XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
MAX_XATTR_VALUE_BYTES = 1 << 16
MAX_XATTR_LIST_BYTES = 1 << 16  # of one file's names together: what listxattr(2) can give
XATTR_CREATE, XATTR_REPLACE = 1, 2
BYTES_PER_INODE = 256  # of the catalogue, for statfs


class _Handle:
    """An open file. read: as FileData.read

    keeps_set_id: whether the file keeps its set-id bits when written by whoever opened it
    """

    __slots__ = ("inode", "is_readable", "is_writable", "keeps_set_id", "read")

    def __init__(self, inode: Inode, flags: int, caller: Caller, data: FileData):
        access = flags & os.O_ACCMODE
        self.inode = inode
        self.read = partial(data.read, inode)
        if flags & os.O_DIRECT:  # for all others the kernel reads ahead
            self.read = ReadAhead(self.read, lambda: inode.size, lambda: inode.writing.version).read
        self.is_readable = access != os.O_WRONLY
        self.is_writable = access != os.O_RDONLY
        self.keeps_set_id = caller.uid == 0


class _FolderHandle:
    """An open folder. last_position: of the entries there were when its listing began. Later ones wait for the
    next, or a listing during which each entry is moved away and back would never end."""

    __slots__ = ("inode", "last_position")

    def __init__(self, inode: Inode, last_position: int):
        self.inode = inode
        self.last_position = last_position


class _OpenStore:
    """The store's lock, for as long as it is open."""

    def __init__(self, store):
        self._store = store

    def __enter__(self) -> None:
        self._store._lock.acquire()
        if self._store._closed:
            self._store._lock.release()
            raise StoreClosed

    def __exit__(self, *exception) -> None:
        self._store._lock.release()


class FileSystem:
    """The files of an open store, which has one of these. Closing the store makes everything durable."""

    def __init__(self, store):
        """Gives back what was deleted, but still open, when the last process ended.

        Raises NvmeError, InvalidArgument.
        """
        self._store = store
        self._lock = _OpenStore(store)
        self._rows = store._catalogue.files
        self._block_bytes = store._namespace.block_bytes
        self._behind = WriteBehind(store._namespace, PLACEMENT_FILES)
        with self._lock:
            store._use_files(self)
            self._inodes = InodeTable(store, self._behind)
            self._names = Names(store, self._inodes)
        self._data_lock = self._inodes.data_lock
        self._data = FileData(store, self._inodes, self._behind)
        self._handles: dict[int, _Handle | _FolderHandle] = {}
        self._handle_numbers = itertools.count(1)

    # names

    def lookup(self, parent: int, name: bytes) -> Attributes:
        with self._lock:
            return self._referred(self._names.lookup(parent, name))

    def _referred(self, inode: Inode) -> Attributes:
        inode.num_lookups += 1
        return inode.attributes(self._block_bytes)

    def count_lookup(self, inode: int) -> None:
        with self._lock:
            found = self._inodes.get(inode)
            if found is not None:  # else it was deleted since it was listed
                found.num_lookups += 1

    def forget(self, inode: int, count: int) -> None:
        with self._lock:
            found = self._inodes.in_memory(inode)
            if found is not None:
                found.num_lookups = max(0, found.num_lookups - count)
                self._inodes.drop_unused(found)

    def make_node(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        with self._lock:
            return self._referred(self._names.make_node(parent, name, mode, rdev, caller))

    def make_folder(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        with self._lock:
            return self._referred(self._names.make(parent, name, stat.S_IFDIR | mode & PERMISSIONS, caller))

    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        with self._lock:
            return self._referred(self._names.make_symlink(parent, name, target, caller))

    def link(self, inode: int, parent: int, name: bytes) -> Attributes:
        with self._lock:
            return self._referred(self._names.link(inode, parent, name))

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[OpenFile, Attributes]:
        with self._lock:
            try:
                inode = self._names.make(parent, name, stat.S_IFREG | mode & PERMISSIONS, caller)
            except FileError as error:
                if error.errno != errno.EEXIST or flags & os.O_EXCL:
                    raise
                inode = self._names.lookup(parent, name)
            inode.num_lookups += 1
            opened = self._open(inode, flags, caller)
        self._truncate_if_asked(opened.handle, flags, caller)
        return opened, inode.attributes(self._block_bytes)

    def unlink(self, parent: int, name: bytes) -> None:
        with self._lock:
            self._names.unlink(parent, name)

    def remove_folder(self, parent: int, name: bytes) -> None:
        with self._lock:
            self._names.remove_folder(parent, name)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        with self._lock:
            self._names.rename(parent, name, new_parent, new_name, flags)

    def read_link(self, inode: int) -> bytes:
        with self._lock:
            found = self._names.inode(inode)
            if found.target is None:
                raise FileError(errno.EINVAL)
            self._was_read(found)
            return found.target

    # attributes

    def attributes(self, inode: int) -> Attributes:
        found = self._inodes.in_memory(inode)
        if found is None:
            with self._lock:
                found = self._names.inode(inode)
        return found.attributes(self._block_bytes)

    def set_attributes(self, inode: int, changes: AttributeChanges, caller: Caller) -> Attributes:
        with self._lock:
            found = self._names.inode(inode)
            if changes.size is not None:
                self._check_is_file(found)
                self._inodes.load_extents(found)
        self._change(found, changes, caller)
        return found.attributes(self._block_bytes)

    def _change(self, inode: Inode, changes: AttributeChanges, caller: Caller) -> None:
        if changes.size is not None:
            self._data.truncate(inode, changes.size)
        now = time.time_ns()
        with self._data_lock:
            self._apply(inode, changes, caller, now)
            self._inodes.note_changed(inode)

    @staticmethod
    def _apply(inode: Inode, changes: AttributeChanges, caller: Caller, now: int) -> None:
        if changes.size is not None:
            inode.mtime_ns = now
            if caller.uid != 0:
                inode.drop_privileges()
        if changes.uid is not None or changes.gid is not None:
            inode.uid = inode.uid if changes.uid is None else changes.uid
            inode.gid = inode.gid if changes.gid is None else changes.gid
            inode.drop_privileges()
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes.mode & PERMISSIONS
        if changes.atime_ns is not None:
            inode.atime_ns = clamped_time(changes.atime_ns)
        if changes.mtime_ns is not None:
            inode.mtime_ns = clamped_time(changes.mtime_ns)
        inode.ctime_ns = now if changes.ctime_ns is None else clamped_time(changes.ctime_ns)

    def _was_read(self, inode: Inode) -> None:
        now = time.time_ns()
        if inode.wants_atime(now):
            inode.atime_ns = now
            self._inodes.changed(inode)

    @staticmethod
    def _check_is_file(inode: Inode) -> None:
        if inode.is_folder:
            raise FileError(errno.EISDIR)
        if not inode.is_file:
            raise FileError(errno.EINVAL)

    # open files

    def open(self, inode: int, flags: int, caller: Caller) -> OpenFile:
        with self._lock:
            opened = self._open(self._names.inode(inode), flags, caller)
        self._truncate_if_asked(opened.handle, flags, caller)
        return opened

    def _open(self, inode: Inode, flags: int, caller: Caller) -> OpenFile:
        self._check_is_file(inode)
        self._inodes.load_extents(inode)
        inode.num_handles += 1
        return OpenFile(self._add_handle(_Handle(inode, flags, caller, self._data)))

    def _truncate_if_asked(self, handle: int, flags: int, caller: Caller) -> None:
        """Without the store's lock: a writer that has the inode's may wait for it."""
        file = self._handles[handle]
        if flags & os.O_TRUNC and file.is_writable and file.inode.size:
            self._change(file.inode, AttributeChanges(size=0), caller)

    def _add_handle(self, handle: "_Handle | _FolderHandle") -> int:
        number = next(self._handle_numbers)
        self._handles[number] = handle
        return number

    def _file(self, handle: int) -> _Handle:
        found = self._handles.get(handle)
        if type(found) is not _Handle:
            raise FileError(errno.EBADF)
        if self._store._closed:
            raise StoreClosed
        return found

    def _opened_folder(self, handle: int) -> _FolderHandle:
        found = self._handles.get(handle)
        if type(found) is not _FolderHandle:
            raise FileError(errno.EBADF)
        return found

    def read(self, handle: int, offset: int, size: int) -> memoryview | bytes:
        file = self._file(handle)  # the kernel reads through writers' handles too, to fill its pages
        data = file.read(offset, size)
        self._was_read(file.inode)
        return data

    def read_now(self, handle: int, offset: int, size: int) -> memoryview | None:
        inode = self._file(handle).inode
        if inode.wants_atime(time.time_ns()):  # a change, which may wait for others
            return None
        return self._data.read_now(inode, offset, size)

    def write(self, handle: int, offset: int, data: memoryview | bytes) -> int:
        file = self._file(handle)
        if not file.is_writable:
            raise FileError(errno.EBADF)
        self._behind.raise_error(file.inode)
        return self._data.write(file.inode, offset, data, file.keeps_set_id)

    def flush_waits(self, handle: int) -> bool:
        found = self._handles.get(handle)
        return type(found) is _Handle and found.inode.num_writes_behind > 0

    def flush(self, handle: int) -> None:
        """Raises what a write that was accepted came to, as the drive has it."""
        inode = self._file(handle).inode
        self._behind.wait(inode)
        self._behind.raise_error(inode)

    def release(self, handle: int) -> None:
        with self._lock:
            self._release(handle, self._file(handle))

    def _release(self, handle: int, opened: "_Handle | _FolderHandle") -> None:
        del self._handles[handle]
        opened.inode.num_handles -= 1
        self._inodes.drop_unused(opened.inode)

    def allocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        file = self._file(handle)
        if not file.is_writable:
            raise FileError(errno.EBADF)
        self._data.allocate(file.inode, mode, offset, length)

    def seek(self, handle: int, offset: int, whence: int) -> int:
        return self._data.seek(self._file(handle).inode, offset, whence)

    # open folders

    def open_folder(self, inode: int, caller: Caller) -> int:
        with self._lock:
            folder = self._names.folder(inode)
            folder.num_handles += 1
            return self._add_handle(_FolderHandle(folder, self._names.last_position()))

    def read_folder(self, handle: int, start_id: int) -> Iterator[tuple[bytes, Attributes, int]]:
        opened = self._opened_folder(handle)
        if start_id == 0:
            opened.last_position = self._names.last_position()
            self._was_read(opened.inode)
        while True:
            with self._lock:
                some = self._names.list_some(opened.inode.id, start_id, opened.last_position)
            if not some:
                return
            yield from some
            start_id = some[-1][2]

    def release_folder(self, handle: int) -> None:
        with self._lock:
            self._release(handle, self._opened_folder(handle))

    # durability and space

    def sync(self, handle: int, data_only: bool) -> None:
        self.flush(handle)
        self._sync()

    def sync_folder(self, handle: int, data_only: bool) -> None:
        self._opened_folder(handle)
        self._sync()

    def _sync(self) -> None:
        self._behind.wait()  # here it holds up nobody
        with self._lock:
            self._store._catalogue.batch.check()
            if self._store._catalogue.has_changes:
                self._store._sync()
                return
        self._store._namespace.flush()  # blocks that were written in place

    def close(self) -> None:
        """Before the drive is closed: nothing may be on its way there."""
        self._behind.close()

    def usage(self) -> FileSystemUsage:
        """For statfs(2)."""
        with self._lock:
            store = self._store
            free_lbas = store._allocator.free_lbas + self._inodes.freed_lbas
            num_lbas = store._namespace.num_lbas - store._volume.first_data_lba
            free_inodes = store._catalogue.batch.free_bytes // BYTES_PER_INODE
            num_inodes = self._inodes.num_inodes
            return FileSystemUsage(
                self._block_bytes, num_lbas, free_lbas, num_inodes + free_inodes, free_inodes, MAX_NAME_BYTES
            )

    def extents_in_memory(self) -> list[Extent]:
        """Blocks handed out to files or given back by them, and named by no row."""
        return self._inodes.extents_in_memory()

    # extended attributes

    def _xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        if inode.xattrs is None:
            inode.xattrs = self._rows.xattrs(inode.id)
        return inode.xattrs

    def get_xattr(self, inode: int, name: bytes) -> bytes:
        """Raises FileError ENODATA, EOPNOTSUPP for a namespace that there is not, as that of ACLs."""
        _check_namespace(name)
        with self._lock:
            value = self._xattrs(self._names.inode(inode)).get(name)
        if value is None:
            raise FileError(errno.ENODATA)
        return value

    def set_xattr(self, inode: int, name: bytes, value: bytes, flags: int) -> None:
        _check_namespace(name)
        if flags & ~(XATTR_CREATE | XATTR_REPLACE):
            raise FileError(errno.EINVAL)
        if len(name) > MAX_NAME_BYTES:
            raise FileError(errno.ERANGE)
        if len(value) > MAX_XATTR_VALUE_BYTES:
            raise FileError(errno.E2BIG)
        with self._lock:
            found = self._names.inode(inode)
            xattrs = self._xattrs(found)
            if flags & XATTR_CREATE and name in xattrs:
                raise FileError(errno.EEXIST)
            if flags & XATTR_REPLACE and name not in xattrs:
                raise FileError(errno.ENODATA)
            if sum(len(other) + 1 for other in {*xattrs, name}) > MAX_XATTR_LIST_BYTES:
                raise FileError(errno.ENOSPC)
            self._store._catalogue.batch.join(XATTR_BYTES + len(name) + len(value))
            self._rows.set_xattr(inode, name, bytes(value))
            xattrs[name] = bytes(value)
            found.ctime_ns = time.time_ns()
            self._inodes.changed(found)

    def list_xattrs(self, inode: int) -> list[bytes]:
        with self._lock:
            return list(self._xattrs(self._names.inode(inode)))

    def remove_xattr(self, inode: int, name: bytes) -> None:
        _check_namespace(name)
        with self._lock:
            found = self._names.inode(inode)
            xattrs = self._xattrs(found)
            if name not in xattrs:
                raise FileError(errno.ENODATA)
            self._store._catalogue.batch.join()
            self._rows.remove_xattr(inode, name)
            del xattrs[name]
            found.ctime_ns = time.time_ns()
            self._inodes.changed(found)


def _check_namespace(name: bytes) -> None:
    if not name.startswith(XATTR_NAMESPACES):
        raise FileError(errno.EOPNOTSUPP)
    if name in XATTR_NAMESPACES:
        raise FileError(errno.EINVAL)
