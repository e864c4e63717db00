"""Names and the inodes that they lead to: making, linking, renaming, removing and listing entries of folders.

A change is checked in full before its first statement, since a statement that is refused ends the whole batch.
"""

import errno
import stat
import time

from kvfs.files.file_catalogue import ENTRY_BYTES, INODE_BYTES, Entry
from kvfs.files.inode import PERMISSIONS, Inode
from kvfs.files.inode_table import InodeTable
from kvfs.tree import ROOT_INODE, Attributes, Caller, FileError

MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095
MAX_LINKS = (1 << 31) - 1  # what every stat can show
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # of renameat2(2)
NODE_TYPES = {stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
MAX_POSITION = (1 << 62) - 1


class Names:
    """Under the store's lock."""

    def __init__(self, store, inodes: InodeTable):
        self._rows = store._catalogue.files
        self._batch = store._catalogue.batch
        self._block_bytes = store._namespace.block_bytes
        self._inodes = inodes
        self._next_position = self._rows.next_position()

    # finding

    def inode(self, inode_id: int) -> Inode:
        inode = self._inodes.get(inode_id)
        if inode is None:
            raise FileError(errno.ESTALE)
        return inode

    def folder(self, inode_id: int) -> Inode:
        folder = self.inode(inode_id)
        if not folder.is_folder:
            raise FileError(errno.ENOTDIR)
        return folder

    def lookup(self, parent: int, name: bytes) -> Inode:
        folder = self.folder(parent)
        if name == b".":
            return folder
        if name == b"..":
            return self.inode(folder.parent)
        _check_length(name)
        return self.inode(self._entry(folder, name)[0])

    def _entry(self, folder: Inode, name: bytes) -> Entry:
        entry = self._rows.entry(folder.id, name)
        if entry is None:
            raise FileError(errno.ENOENT)
        return entry

    # making

    def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        """A new inode under a new name: the caller's, and of its folder's group where the folder wants that."""
        folder = self._place(parent, name)
        group, permissions = caller.gid, mode & PERMISSIONS
        if target is None:
            permissions &= ~caller.umask
        if folder.mode & stat.S_ISGID:
            group = folder.gid
            permissions |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        if stat.S_ISDIR(mode):
            _check_links(folder)
        self._batch.join(INODE_BYTES + ENTRY_BYTES + 2 * len(name) + len(target or b""))
        now = time.time_ns()
        own_parent = folder.id if stat.S_ISDIR(mode) else 0
        self._add_entry(folder, name, self._inodes.next_id)
        inode = self._inodes.new(
            own_parent, stat.S_IFMT(mode) | permissions, caller.uid, group, rdev, now, target
        )
        folder.num_links += inode.is_folder
        self._touch(now, folder)
        return inode

    def make_node(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in NODE_TYPES:
            raise FileError(errno.EINVAL)
        is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        return self.make(parent, name, kind | mode & PERMISSIONS, caller, rdev=rdev if is_device else 0)

    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Inode:
        if not target:
            raise FileError(errno.ENOENT)
        if len(target) > MAX_TARGET_BYTES:
            raise FileError(errno.ENAMETOOLONG)
        return self.make(parent, name, stat.S_IFLNK | 0o777, caller, target=target)

    def link(self, inode_id: int, parent: int, name: bytes) -> Inode:
        inode = self.inode(inode_id)
        if inode.is_folder:
            raise FileError(errno.EPERM)
        if inode.num_links == 0:
            raise FileError(errno.ENOENT)
        folder = self._place(parent, name)
        _check_links(inode)
        self._batch.join(ENTRY_BYTES + 2 * len(name))
        self._add_entry(folder, name, inode.id)
        inode.num_links += 1
        now = time.time_ns()
        self._touch(now, folder)
        self._changed(now, inode)
        return inode

    def _place(self, parent: int, name: bytes) -> Inode:
        """The folder, in which a name can be made."""
        folder = self.folder(parent)
        _check_name(name)
        if folder.num_links == 0:
            raise FileError(errno.ENOENT)
        if self._rows.entry(folder.id, name) is not None:
            raise FileError(errno.EEXIST)
        return folder

    def _add_entry(self, folder: Inode, name: bytes, inode_id: int) -> None:
        self._rows.add_entry(folder.id, name, inode_id, self._next_position)
        self._next_position += 1

    # removing

    def unlink(self, parent: int, name: bytes) -> None:
        folder = self.folder(parent)
        _check_name(name)
        inode = self.inode(self._entry(folder, name)[0])
        if inode.is_folder:
            raise FileError(errno.EISDIR)
        self._batch.join()
        self._rows.remove_entry(folder.id, name)
        now = time.time_ns()
        self._touch(now, folder)
        self._unlinked(now, folder, inode)

    def remove_folder(self, parent: int, name: bytes) -> None:
        folder = self.folder(parent)
        _check_name(name)
        inode = self.inode(self._entry(folder, name)[0])
        if not inode.is_folder:
            raise FileError(errno.ENOTDIR)
        if self._rows.has_entries(inode.id):
            raise FileError(errno.ENOTEMPTY)
        self._batch.join()
        self._rows.remove_entry(folder.id, name)
        now = time.time_ns()
        self._touch(now, folder)
        self._unlinked(now, folder, inode)

    def _unlinked(self, now: int, folder: Inode, inode: Inode) -> None:
        """An entry of the folder no longer leads to the inode."""
        if inode.is_folder:
            inode.num_links = 0
            folder.num_links -= 1
        else:
            inode.num_links -= 1
        self._changed(now, inode)
        self._inodes.drop_unused(inode)

    # renaming

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise FileError(errno.EINVAL)
        folder, new_folder = self.folder(parent), self.folder(new_parent)
        _check_name(name)
        _check_name(new_name)
        source = self.inode(self._entry(folder, name)[0])
        entry = self._rows.entry(new_folder.id, new_name)
        target = None if entry is None else self.inode(entry[0])
        if new_folder.num_links == 0 or (target is None and flags & RENAME_EXCHANGE):
            raise FileError(errno.ENOENT)
        if target is not None and flags & RENAME_NOREPLACE:
            raise FileError(errno.EEXIST)
        if source is target:  # two names of one file both stay
            return
        if source.is_folder and self._is_within(new_folder, source):
            raise FileError(errno.EINVAL)
        if flags & RENAME_EXCHANGE:
            if target.is_folder and self._is_within(folder, target):
                raise FileError(errno.EINVAL)
            self._exchange(folder, name, source, new_folder, new_name, target)
        else:
            if target is not None and target.is_folder and self._is_within(folder, target):
                raise FileError(errno.ENOTEMPTY)  # before what it is, as Linux has it
            self._check_replacing(source, target)
            self._move(folder, name, source, new_folder, new_name, target)

    def _check_replacing(self, source: Inode, target: Inode | None) -> None:
        if target is None:
            return
        if source.is_folder and not target.is_folder:
            raise FileError(errno.ENOTDIR)
        if target.is_folder and not source.is_folder:
            raise FileError(errno.EISDIR)
        if target.is_folder and self._rows.has_entries(target.id):
            raise FileError(errno.ENOTEMPTY)

    def _move(
        self,
        folder: Inode,
        name: bytes,
        source: Inode,
        new_folder: Inode,
        new_name: bytes,
        target: Inode | None,
    ) -> None:
        if source.is_folder and folder is not new_folder and target is None:
            _check_links(new_folder)
        self._batch.join(ENTRY_BYTES + 2 * len(new_name))
        if target is not None:
            self._rows.change_entry(new_folder.id, new_name, source.id)
            self._rows.remove_entry(folder.id, name)
        elif folder is new_folder:
            self._rows.rename_entry(folder.id, name, new_name)
        else:
            self._add_entry(new_folder, new_name, source.id)
            self._rows.remove_entry(folder.id, name)
        now = time.time_ns()
        self._touch(now, folder)
        self._touch(now, new_folder)
        self._reparent(source, folder, new_folder)
        self._changed(now, source)
        if target is not None:
            self._unlinked(now, new_folder, target)

    def _exchange(
        self, folder: Inode, name: bytes, source: Inode, new_folder: Inode, new_name: bytes, target: Inode
    ) -> None:
        self._batch.join()
        self._rows.change_entry(new_folder.id, new_name, source.id)
        self._rows.change_entry(folder.id, name, target.id)
        now = time.time_ns()
        self._touch(now, folder)
        self._touch(now, new_folder)
        self._reparent(source, folder, new_folder)
        self._reparent(target, new_folder, folder)
        self._changed(now, source)
        self._changed(now, target)

    @staticmethod
    def _reparent(inode: Inode, folder: Inode, new_folder: Inode) -> None:
        if inode.is_folder:
            folder.num_links -= 1
            new_folder.num_links += 1
            inode.parent = new_folder.id

    def _is_within(self, folder: Inode, other: Inode) -> bool:
        """Whether a folder is another, or somewhere below it."""
        while folder is not other:
            if folder.id == ROOT_INODE or folder.num_links == 0:
                return False
            folder = self.inode(folder.parent)
        return True

    # listing

    def last_position(self) -> int:
        return self._next_position - 1

    def list_some(self, folder_id: int, after: int, last: int) -> list[tuple[bytes, Attributes, int]]:
        """Some entries with positions in (after, last], in order: name, attributes, position."""
        listed = []
        for name, position, inode_id, row in self._rows.list_entries(folder_id, after, last):
            inode = self._inodes.in_memory(inode_id) or (Inode(*row) if row[0] is not None else None)
            if inode is not None:
                listed.append((name, inode.attributes(self._block_bytes), position))
        return listed

    # times

    def _touch(self, now: int, folder: Inode) -> None:
        """The folder's entries have changed."""
        folder.mtime_ns = now
        self._changed(now, folder)

    def _changed(self, now: int, inode: Inode) -> None:
        inode.ctime_ns = now
        self._inodes.changed(inode)


def _check_length(name: bytes) -> None:
    if len(name) > MAX_NAME_BYTES:
        raise FileError(errno.ENAMETOOLONG)


def _check_name(name: bytes) -> None:
    """Whether a name can be made or removed."""
    _check_length(name)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise FileError(errno.EINVAL)


def _check_links(inode: Inode) -> None:
    if inode.num_links >= MAX_LINKS:
        raise FileError(errno.EMLINK)
