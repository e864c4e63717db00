"""Inode numbers of nodes, and the nodes that the kernel refers to.

A number is computed from a node's key, so it needs no storage and is the same each time a node is found. The
table leads back from numbers to nodes: it holds those that the kernel has looked up, and some others.
"""

import errno
import threading
from hashlib import blake2b

from kvfs.kv_tree.nodes import Node
from kvfs.tree import KV_INODE_BIT, FileError

MAX_IDLE = 4096  # nodes that the kernel may be about to look up, but has not


class InodeTable:
    """Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._num_lookups: dict[int, int] = {}
        self._idle: dict[int, None] = {}  # numbers without lookups, those asked for longest ago first

    def number_of(self, node: Node) -> int:
        """The node's inode number, which leads back to it for a while, or until `forget` after `count`."""
        with self._lock:
            inode = _hash(node.key)
            while (known := self._nodes.get(inode, node)).key != node.key:
                inode = inode + 1 | KV_INODE_BIT
            self._nodes[inode] = known
            if inode not in self._num_lookups:
                self._idle.pop(inode, None)
                self._idle[inode] = None
                if len(self._idle) > MAX_IDLE:
                    self._drop(next(iter(self._idle)))
            return inode

    def node(self, inode: int) -> Node:
        """Raises FileError ESTALE for a number that leads nowhere."""
        with self._lock:
            if inode not in self._nodes:
                raise FileError(errno.ESTALE)
            return self._nodes[inode]

    def count(self, inode: int) -> None:
        """The kernel has one more reference."""
        with self._lock:
            self._idle.pop(inode, None)
            self._num_lookups[inode] = self._num_lookups.get(inode, 0) + 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel has `count` references less."""
        with self._lock:
            left = self._num_lookups.get(inode, 0) - count
            if left > 0:
                self._num_lookups[inode] = left
                return
            self._num_lookups.pop(inode, None)
            self._drop(inode)

    def _drop(self, inode: int) -> None:
        self._idle.pop(inode, None)
        self._nodes.pop(inode, None)

    def __len__(self) -> int:
        return len(self._nodes)


def _hash(key: tuple) -> int:
    digest = blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (KV_INODE_BIT - 1) | KV_INODE_BIT
