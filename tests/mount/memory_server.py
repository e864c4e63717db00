"""A mount of two trees in memory: python -m tests.mount.memory_server MOUNTPOINT [allow_other]."""

import itertools
import logging
import sys
import threading

from kvfs.mount.server import MountOptions, serve
from kvfs.mount.service_manager import log_to_stderr
from kvfs.mount.trees import KV_NAMES, Trees
from kvfs.tree import KV_INODE_BIT, ROOT_INODE, Caller
from tests.mount.memory_tree import MemoryTree

ROOT_USER = Caller(0, 0, 0)


class BrokenTree(MemoryTree):
    """With bugs where a test asks for them."""

    def lookup(self, parent, name):
        if name == b"raise":
            raise RuntimeError("a bug")
        return super().lookup(parent, name)

    def forget(self, inode, count):
        if self.attributes(inode).mode & 0o777 == 0o123:
            raise RuntimeError("a bug")
        super().forget(inode, count)

    def allocate(self, handle, mode, offset, length):
        if length == 0x666:
            raise RuntimeError("a bug")
        super().allocate(handle, mode, offset, length)


class NoClients:
    def is_settled(self) -> bool:
        return True

    def settle(self) -> None:
        pass


def memory_trees() -> Trees:
    """Ordinary files, and a tree in the place of the KV cache's."""
    kv = MemoryTree()
    kv._inodes = itertools.count(KV_INODE_BIT + 1)
    for name in KV_NAMES:
        kv.make_folder(ROOT_INODE, name, 0o755, ROOT_USER)
    return Trees(BrokenTree(), kv, threading.RLock(), NoClients())


if __name__ == "__main__":
    log_to_stderr(logging.DEBUG if "debug" in sys.argv else logging.INFO)
    options = MountOptions("/memory", allow_other="allow_other" in sys.argv)
    serve(memory_trees(), sys.argv[1], options, lambda: print("ready", flush=True))
