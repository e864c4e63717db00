"""Requests for names and attributes: what pyfuse3 asks, put to the tree that knows.

They are answered on the thread that reads from the kernel, which takes less than handing them to another; what
would wait, for the drive or for the trees' lock, goes to one. What is in a file is file_requests' business.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps

import trio

from kvfs.mount.failures import errno_for
from kvfs.mount.fuse_glue import pyfuse3
from kvfs.mount.trees import KV_NAMES, Trees
from kvfs.tree import (
    ROOT_INODE,
    AttributeChanges,
    Attributes,
    Caller,
    FileError,
    FileSystemUsage,
    OpenFile,
    Tree,
)

FIXED_ENTRY = 1 << 62  # ids of entries that every listing of a folder begins with


def answered(operation: Callable) -> Callable:
    """An operation as pyfuse3 wants it: a coroutine that raises FUSEError and nothing else.

    It runs here and now, unless the trees are busy with something that it would have to wait for.
    """

    @wraps(operation)
    async def coroutine(self, *arguments):
        try:
            if self._trees.is_idle():
                return operation(self, *arguments)
            return await trio.to_thread.run_sync(_settled, operation, self, *arguments)
        except Exception as error:
            raise pyfuse3.FUSEError(errno_for(error)) from None

    return coroutine


def _settled(operation: Callable, operations: "MountOperations", *arguments):
    operations._trees.settle()
    return operation(operations, *arguments)


def answered_in_thread(operation: Callable) -> Callable:
    """The same for one that may wait for the drive."""

    @wraps(operation)
    async def coroutine(self, *arguments):
        try:
            return await trio.to_thread.run_sync(_settled, operation, self, *arguments)
        except Exception as error:
            raise pyfuse3.FUSEError(errno_for(error)) from None

    return coroutine


def to_fuse(attributes: Attributes) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = attributes.inode
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.num_links
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = attributes.size
    entry.st_blocks = attributes.num_blocks
    entry.st_rdev = attributes.rdev
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.attr_timeout = attributes.timeout_s
    entry.entry_timeout = attributes.entry_timeout_s
    return entry


def changes_of(attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> AttributeChanges:
    return AttributeChanges(
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
    )


def caller_of(context: pyfuse3.RequestContext) -> Caller:
    return Caller(context.uid, context.gid, context.pid)  # the kernel has applied the umask


class MountOperations(pyfuse3.Operations):
    supports_dot_lookup = True
    enable_writeback_cache = True
    enable_acl = False

    def __init__(self, trees: Trees):
        super().__init__()
        self._trees = trees
        self._open_folders: dict[int, int] = {}  # inode by tagged handle

    # names

    @answered
    def lookup(self, parent: int, name: bytes, context):
        return to_fuse(self._lookup(parent, name))

    def _lookup(self, parent: int, name: bytes) -> Attributes:
        found = self._trees.of_entry(parent, name).lookup(parent, name)
        if found.inode == ROOT_INODE:  # ".." of a folder in it, whichever tree that is in
            return self._trees.files.attributes(ROOT_INODE)
        return found

    async def forget(self, counts: list[tuple[int, int]]):
        for inode, count in counts:
            if inode != ROOT_INODE:
                with suppress(pyfuse3.FUSEError):  # nobody is told
                    await self._forget(inode, count)

    @answered
    def _forget(self, inode: int, count: int):
        self._trees.of_inode(inode).forget(inode, count)

    @answered
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, context):
        tree = self._trees.of_change(parent, name)
        return to_fuse(tree.make_node(parent, name, mode, rdev, caller_of(context)))

    @answered
    def mkdir(self, parent: int, name: bytes, mode: int, context):
        tree = self._trees.of_change(parent, name)
        return to_fuse(tree.make_folder(parent, name, stat.S_IMODE(mode), caller_of(context)))

    @answered
    def symlink(self, parent: int, name: bytes, target: bytes, context):
        tree = self._trees.of_change(parent, name)
        return to_fuse(tree.make_symlink(parent, name, target, caller_of(context)))

    @answered
    def link(self, inode: int, new_parent: int, new_name: bytes, context):
        tree = self._trees.of_change(new_parent, new_name)
        if tree is not self._trees.of_inode(inode):
            raise FileError(errno.EXDEV)
        return to_fuse(tree.link(inode, new_parent, new_name))

    @answered
    def unlink(self, parent: int, name: bytes, context):
        self._trees.of_change(parent, name).unlink(parent, name)

    @answered
    def rmdir(self, parent: int, name: bytes, context):
        self._trees.of_change(parent, name).remove_folder(parent, name)

    @answered
    def _rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, context):
        tree = self._trees.of_change(parent, name)
        if tree is not self._trees.of_change(new_parent, new_name):
            raise FileError(errno.EXDEV)
        tree.rename(parent, name, new_parent, new_name, flags)

    _rename_kv = answered_in_thread(_rename.__wrapped__)  # a file may be taken into the KV cache by its name

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, context):
        rename = self._rename_kv if self._trees.of_inode(parent) is self._trees.kv else self._rename
        await rename(parent, name, new_parent, new_name, flags, context)

    # attributes

    @answered
    def getattr(self, inode: int, context):
        return to_fuse(self._trees.of_inode(inode).attributes(inode))

    @answered
    def _set_attributes(self, inode: int, changes: AttributeChanges, context):
        tree = self._trees.of_inode(inode)
        return to_fuse(tree.set_attributes(inode, changes, caller_of(context)))

    _set_size = answered_in_thread(_set_attributes.__wrapped__)

    async def setattr(self, inode: int, attr, fields, handle, context):
        set_attributes = self._set_size if fields.update_size else self._set_attributes
        return await set_attributes(inode, changes_of(attr, fields), context)

    @answered
    def readlink(self, inode: int, context):
        return self._trees.of_inode(inode).read_link(inode)

    @answered
    def setxattr(self, inode: int, name: bytes, value: bytes, context):
        self._trees.of_inode(inode).set_xattr(inode, name, value, 0)  # pyfuse3 has seen to the flags

    @answered
    def getxattr(self, inode: int, name: bytes, context):
        return self._trees.of_inode(inode).get_xattr(inode, name)

    @answered
    def listxattr(self, inode: int, context):
        return self._trees.of_inode(inode).list_xattrs(inode)

    @answered
    def removexattr(self, inode: int, name: bytes, context):
        self._trees.of_inode(inode).remove_xattr(inode, name)

    @answered
    def statfs(self, context):
        usage: FileSystemUsage = self._trees.files.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = usage.block_bytes
        answer.f_blocks = usage.num_blocks
        answer.f_bfree = answer.f_bavail = usage.free_blocks
        answer.f_files = usage.num_inodes
        answer.f_ffree = answer.f_favail = usage.free_inodes
        answer.f_namemax = usage.max_name_bytes
        return answer

    # handles

    @answered
    def _open(self, inode: int, flags: int, context):
        tree = self._trees.of_inode(inode)
        return self._file_info(tree, tree.open(inode, flags, caller_of(context)), inode, flags)

    _open_and_truncate = answered_in_thread(_open.__wrapped__)

    async def open(self, inode: int, flags: int, context):
        open_file = self._open_and_truncate if flags & os.O_TRUNC else self._open
        return await open_file(inode, flags, context)

    @answered
    def create(self, parent: int, name: bytes, mode: int, flags: int, context):
        tree = self._trees.of_change(parent, name)
        file, attributes = tree.create(parent, name, stat.S_IMODE(mode), flags, caller_of(context))
        return self._file_info(tree, file, attributes.inode, flags), to_fuse(attributes)

    def _file_info(self, tree: Tree, file: OpenFile, inode: int, flags: int) -> pyfuse3.FileInfo:
        handle = self._trees.tag(tree, file.handle)
        self._trees.opened(handle, inode, flags)
        return pyfuse3.FileInfo(fh=handle, direct_io=file.direct, keep_cache=file.keep_cache)

    @answered
    def _flush(self, handle: int):
        tree, handle = self._trees.of_handle(handle)
        tree.flush(handle)

    _flush_in_thread = answered_in_thread(_flush.__wrapped__)

    async def flush(self, handle: int):
        tree, trees_handle = self._trees.of_handle(handle)
        await (self._flush_in_thread if tree.flush_waits(trees_handle) else self._flush)(handle)

    @answered
    def release(self, handle: int):
        self._trees.released(handle)
        tree, handle = self._trees.of_handle(handle)
        tree.release(handle)

    @answered
    def opendir(self, inode: int, context):
        tree = self._trees.of_inode(inode)
        handle = self._trees.tag(tree, tree.open_folder(inode, caller_of(context)))
        self._open_folders[handle] = inode
        return handle

    @answered
    def releasedir(self, handle: int):
        del self._open_folders[handle]
        tree, handle = self._trees.of_handle(handle)
        tree.release_folder(handle)

    @answered
    def readdir(self, handle: int, start_id: int, token):
        for name, attributes, next_id in self._entries(handle, start_id):
            if not pyfuse3.readdir_reply(token, name, to_fuse(attributes), next_id):
                break
            if name not in (b".", b".."):  # those the kernel does not count
                self._trees.of_inode(attributes.inode).count_lookup(attributes.inode)

    def _entries(self, handle: int, start_id: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """(name, attributes, id of the next): the fixed entries, and then the tree's."""
        if start_id == 0 or start_id & FIXED_ENTRY:
            folder = self._open_folders[handle]
            names = (b".", b"..", *(KV_NAMES if folder == ROOT_INODE else ()))
            first = start_id & ~FIXED_ENTRY
            for position, name in enumerate(names[first:], first + 1):
                yield name, self._peek(folder, name), FIXED_ENTRY | position
            start_id = 0
        tree, handle = self._trees.of_handle(handle)
        yield from tree.read_folder(handle, start_id)

    def _peek(self, folder: int, name: bytes) -> Attributes:
        """An entry that the kernel takes no reference to."""
        if folder == ROOT_INODE and name in (b".", b".."):
            return self._trees.files.attributes(ROOT_INODE)
        attributes = self._lookup(folder, name)
        if attributes.inode != ROOT_INODE:
            self._trees.of_inode(attributes.inode).forget(attributes.inode, 1)
        return attributes
