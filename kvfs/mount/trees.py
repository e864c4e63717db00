"""Which of the two trees an inode or a handle is of, and what concerns both."""

import errno
import os
from threading import RLock
from typing import Protocol

from kvfs.tree import KV_INODE_BIT, ROOT_INODE, FileError, Tree

COPY_PIECE_BYTES = 4 << 20
KV_NAMES = (b"kv", b".kvfs")  # of the root, and the KV tree's


class Clients(Protocol):
    """Those who change the KV cache beside the mount: kvfs.remote.server.RemoteServer."""

    def is_settled(self) -> bool: ...

    def settle(self) -> None: ...


class Trees:
    """Handles carry the tree they are of in their lowest bit; the kernel knows them in this form only.

    lock: what the trees' operations wait for; clients: whose changes every operation finds done, see `settle`.
    """

    def __init__(self, files: Tree, kv: Tree, lock: RLock, clients: Clients):
        self.files, self.kv, self._lock, self._clients = files, kv, lock, clients
        self._by_tag = (files, kv)
        self._written: dict[int, int] = {}  # inode by tagged handle, of those that may write

    def is_idle(self) -> bool:
        """Whether an operation would find nothing to wait for: the clients settled, and the lock free.

        It is not kept: some take another one before it.
        """
        if not self._clients.is_settled() or not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        return True

    def settle(self) -> None:
        """Wait for what clients did before: an append that is posted returns before it is in the tree."""
        self._clients.settle()

    def of_inode(self, inode: int) -> Tree:
        return self.kv if inode & KV_INODE_BIT else self.files

    def of_entry(self, folder: int, name: bytes) -> Tree:
        """The tree that knows a name in a folder."""
        if folder & KV_INODE_BIT or (folder == ROOT_INODE and name in KV_NAMES):
            return self.kv
        return self.files

    def of_change(self, folder: int, name: bytes) -> Tree:
        """The tree that may make, remove or rename a name. Raises FileError EBUSY for what is always there."""
        if folder == ROOT_INODE and name in KV_NAMES:
            raise FileError(errno.EBUSY)
        return self.of_inode(folder)

    def tag(self, tree: Tree, handle: int) -> int:
        return handle << 1 | (tree is self.kv)

    def of_handle(self, tagged: int) -> tuple[Tree, int]:
        return self._by_tag[tagged & 1], tagged >> 1

    def of_settled_handle(self, tagged: int) -> tuple[Tree, int]:
        """The same for what depends on the clients: in the KV cache, all but reading a snapshot."""
        tree, handle = self.of_handle(tagged)
        if tree is self.kv:
            self.settle()
        return tree, handle

    def opened(self, tagged: int, inode: int, flags: int) -> None:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._written[tagged] = inode

    def released(self, tagged: int) -> None:
        self._written.pop(tagged, None)

    def is_written(self, inode: int) -> bool:
        """Whether the kernel may hold data of a file that it has not sent; it sends all when one is closed."""
        return inode in list(self._written.values())

    def copy_range(self, source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
        """Copy bytes between open files, with no way through the caller; how many were copied.

        A tree that can do better than reading and writing within itself has a `copy_range` of its own.
        """
        (source_tree, source), (target_tree, target) = self.of_handle(source), self.of_handle(target)
        if source_tree is target_tree and hasattr(source_tree, "copy_range"):
            return source_tree.copy_range(source, source_offset, target, target_offset, length)
        copied = 0
        while copied < length:
            piece = source_tree.read(source, source_offset + copied, min(COPY_PIECE_BYTES, length - copied))
            if not len(piece):
                break
            copied += target_tree.write(target, target_offset + copied, piece)
        return copied
