"""What a mounted tree of files is: the interface between the FUSE server and what it serves.

Two trees exist: ordinary files (kvfs.files) and the KV cache (kvfs.kv_tree). Every method may be called from
any thread, several at a time, and blocks until it is done. Names and link targets are bytes, as on the wire.
Whatever goes wrong for a user is a FileError with the errno that POSIX gives it; errors of the drive are
KvfsError or NvmeError, and `kvfs.errors.errno_of` knows their errno.

The kernel checks permissions (default_permissions) before it asks; a tree checks what the kernel cannot.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvfs.errors import KvfsError

ROOT_INODE = 1
KV_INODE_BIT = 1 << 62  # inodes with it are the KV tree's
SYNC_DATA, SYNC_ALL = True, False


class FileError(KvfsError):
    """What a user cannot do. errno: what the caller gets; text: for the log, where it says more than errno."""

    def __init__(self, errno: int, text: str = ""):
        self.errno, self.text = errno, text
        super().__init__(text or os.strerror(errno))


@dataclass(slots=True)
class Attributes:
    """What stat shows. Times in ns since the epoch; blocks of 512 bytes; mode with the file type."""

    inode: int
    mode: int
    num_links: int
    uid: int
    gid: int
    size: int
    num_blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    timeout_s: float = 60.0  # how long the kernel may believe these attributes
    entry_timeout_s: float = 60.0  # and that the name leads to this inode


@dataclass(frozen=True, slots=True)
class AttributeChanges:
    """What setattr changes; None: not. A time of now is given as its value by whoever calls."""

    mode: int | None = None  # permission and set-id bits only
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None

    @property
    def are_times_only(self) -> bool:
        return self.mode is self.uid is self.gid is self.size is None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: credentials of the process. umask is 0 where the kernel has applied it."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


@dataclass(slots=True)
class OpenFile:
    """A handle. keep_cache: the kernel's pages of an earlier open still hold; direct: none are to be kept."""

    handle: int
    keep_cache: bool = True
    direct: bool = False


@dataclass(slots=True)
class FileSystemUsage:
    """What statfs shows, in blocks of block_bytes."""

    block_bytes: int
    num_blocks: int
    free_blocks: int
    num_inodes: int
    free_inodes: int
    max_name_bytes: int = 255


class Tree(Protocol):
    def lookup(self, parent: int, name: bytes) -> Attributes:
        """The entry; the kernel has one more reference to its inode until `forget`. "." and ".." are known."""

    def forget(self, inode: int, count: int) -> None:
        """The kernel drops references. An inode without names, references and handles is gone for good."""

    def attributes(self, inode: int) -> Attributes: ...

    def set_attributes(self, inode: int, changes: AttributeChanges, caller: Caller) -> Attributes: ...

    def read_link(self, inode: int) -> bytes: ...

    # these return the new entry, counted as by lookup

    def make_node(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes: ...

    def make_folder(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes: ...

    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes: ...

    def link(self, inode: int, parent: int, name: bytes) -> Attributes: ...

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[OpenFile, Attributes]:
        """Make (without O_EXCL also open) a regular file."""

    def unlink(self, parent: int, name: bytes) -> None: ...

    def remove_folder(self, parent: int, name: bytes) -> None: ...

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """flags: RENAME_NOREPLACE, RENAME_EXCHANGE (renameat2)."""

    # files

    def open(self, inode: int, flags: int, caller: Caller) -> OpenFile: ...

    def read(self, handle: int, offset: int, size: int) -> memoryview | bytes:
        """Up to size bytes; fewer only at the end of the file."""

    def read_now(self, handle: int, offset: int, size: int) -> memoryview | bytes | None:
        """As read, if that takes one small transfer and waits for nobody; else None."""

    def write(self, handle: int, offset: int, data: memoryview | bytes) -> int:
        """All of data is written, or an error is raised. O_APPEND is the kernel's business."""

    def flush_waits(self, handle: int) -> bool:
        """Whether `flush` is to be called where it may wait. Raises nothing."""

    def flush(self, handle: int) -> None:
        """A descriptor was closed; not durability."""

    def release(self, handle: int) -> None: ...

    def sync(self, handle: int, data_only: bool) -> None:
        """Durable when this returns: the file's data, size and name."""

    def allocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2): 0, FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE; EOPNOTSUPP for others."""

    def seek(self, handle: int, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""

    # folders

    def open_folder(self, inode: int, caller: Caller) -> int: ...

    def read_folder(self, handle: int, start_id: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """(name, attributes, id of the next) from start_id (0: the first) on, without "." and "..".

        Each entry that the server hands to the kernel counts as a lookup; the server calls `count_lookup`.
        """

    def count_lookup(self, inode: int) -> None: ...

    def release_folder(self, handle: int) -> None: ...

    def sync_folder(self, handle: int, data_only: bool) -> None: ...

    # extended attributes

    def get_xattr(self, inode: int, name: bytes) -> bytes:
        """ENODATA where there is none."""

    def set_xattr(self, inode: int, name: bytes, value: bytes, flags: int) -> None:
        """flags: XATTR_CREATE, XATTR_REPLACE."""

    def list_xattrs(self, inode: int) -> list[bytes]: ...

    def remove_xattr(self, inode: int, name: bytes) -> None: ...


class FileTree(Tree, Protocol):
    """The tree of ordinary files, which also knows how full the drive is that both share."""

    def usage(self) -> FileSystemUsage:
        """For statfs(2)."""
