"""What a kernel does with a tree: paths to inodes, files to handles."""

import io
import os

import numpy as np

from kvfs.tree import ROOT_INODE, Caller, FileError

ME = Caller(os.getuid(), os.getgid(), os.getpid())


class Client:
    def __init__(self, tree):
        self.tree = tree

    def walk(self, path: str):
        """The attributes of what is at a path, looked up part by part and counted."""
        inode, attributes = ROOT_INODE, None
        for name in path.split("/"):
            attributes = self.tree.lookup(inode, os.fsencode(name))
            inode = attributes.inode
        return attributes

    def inode(self, path: str) -> int:
        return self.walk(path).inode

    def place(self, path: str) -> tuple[int, bytes]:
        """(inode of the folder, name)."""
        folder, _, name = path.rpartition("/")
        return self.inode(folder), os.fsencode(name)

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return self.tree.open(self.inode(path), flags, ME).handle

    def read_handle(self, handle: int, size: int, piece_bytes: int = 50_000) -> bytes:
        pieces = [bytes(self.tree.read(handle, at, piece_bytes)) for at in range(0, size, piece_bytes)]
        return b"".join(pieces)

    def read(self, path: str, piece_bytes: int = 50_000) -> bytes:
        """A whole file, as long as stat says."""
        attributes = self.walk(path)
        handle = self.tree.open(attributes.inode, os.O_RDONLY, ME).handle
        data = self.read_handle(handle, attributes.size, piece_bytes)
        assert len(data) == attributes.size
        assert len(self.tree.read(handle, attributes.size, 1)) == 0
        self.tree.release(handle)
        return data

    def load(self, path: str, **options) -> np.ndarray:
        return np.load(io.BytesIO(self.read(path, **options)))

    def names(self, path: str) -> list[str]:
        handle = self.tree.open_folder(self.inode(path), ME)
        names = [os.fsdecode(name) for name, _, _ in self.tree.read_folder(handle, 0)]
        self.tree.release_folder(handle)
        return names

    def create(self, path: str) -> int:
        file, _ = self.tree.create(*self.place(path), 0o644, os.O_WRONLY | os.O_CREAT | os.O_EXCL, ME)
        return file.handle

    def write(self, path: str, data: bytes, piece_bytes: int = 1 << 20) -> None:
        """As cp does: create, write, close."""
        handle = self.create(path)
        try:
            for at in range(0, len(data), piece_bytes):
                piece = data[at : at + piece_bytes]
                assert self.tree.write(handle, at, piece) == len(piece)
            self.tree.flush(handle)
        finally:
            self.tree.release(handle)


def errno_of(operation, *arguments) -> int:
    """The errno that an operation fails with."""
    try:
        operation(*arguments)
    except FileError as error:
        return error.errno
    raise AssertionError("it did not fail")
