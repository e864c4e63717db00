"""What a node of the KV tree is: a folder or a file, and what can be done with it.

The defaults refuse, each with the errno that a read-only tree gives; a kind of node overrides what it allows.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from kvfs.kv_tree.listing import Listing
from kvfs.sequence import Sequence
from kvfs.sequence_attributes import GID, MODE, UID
from kvfs.store import Store
from kvfs.telemetry.visible_store import nothing_of_tenants
from kvfs.tree import AttributeChanges, Attributes, Caller, FileError

STABLE_SECONDS = 60.0  # how long the kernel may believe what cannot change
DEFAULT_MODE = 0o755


@dataclass(frozen=True, slots=True)
class Permissions:
    """Of a folder; its files follow."""

    mode: int
    uid: int
    gid: int

    def noted(self) -> dict[str, bytes]:
        """As attributes of a sequence: all three, so that whoever reads them needs no defaults."""
        return {MODE: b"%d" % self.mode, UID: b"%d" % self.uid, GID: b"%d" % self.gid}

    @classmethod
    def noted_of(cls, sequence: Sequence, default: "Permissions") -> "Permissions":
        """What a sequence's attributes say."""
        noted = sequence.attributes()
        return cls(
            int(noted.get(MODE, default.mode)),
            int(noted.get(UID, default.uid)),
            int(noted.get(GID, default.gid)),
        )

    @property
    def of_files(self) -> int:
        return self.mode & 0o444

    @property
    def of_questions(self) -> int:
        """Who may read may ask: writing a question changes nothing."""
        return self.of_files | self.of_files >> 1


@dataclass(frozen=True)
class Mounted:
    """What all nodes share. invite: what `.kvfs/connect` holds for who opens it, None for no such file.

    is_shared: users besides the one who mounted see it, and nothing in it may tell of tenants and of caches
    """

    store: Store
    permissions: Permissions  # of all that has none noted
    mounted_ns: int
    invite: Callable[[Caller], bytes] | None = None
    is_shared: bool = False

    def counters(self) -> dict:
        """The store's, as whoever sees the mount may know them."""
        return self._for_all(self.store.counters())

    def telemetry(self) -> dict:
        """The same of Store.telemetry."""
        return self._for_all(self.store.telemetry())

    def _for_all(self, found: dict) -> dict:
        return {**found, **nothing_of_tenants()} if self.is_shared else found


class Node:
    """key: what makes it this node and no other, of plain values."""

    key: tuple
    parent: "Folder | None"

    def attributes(self) -> Attributes:
        """All but the inode number."""
        raise NotImplementedError

    def set_attributes(self, changes: AttributeChanges) -> None:
        """Times are those of the tokens, and stay: the kernel sends them for files that were only read, too."""
        if not changes.are_times_only:
            raise FileError(errno.EPERM, f"{self.path} cannot be changed: a sequence's folder can")

    @property
    def path(self) -> str:
        """From the mount's root, for messages."""
        raise NotImplementedError

    # extended attributes

    def xattrs(self) -> dict[str, bytes]:
        return {}

    def set_xattr(self, name: str, value: bytes) -> None:
        raise FileError(
            errno.EOPNOTSUPP, f"{self.path} has no extended attributes: set them on a sequence's folder"
        )

    def remove_xattr(self, name: str) -> None:
        raise FileError(errno.ENODATA)


class Folder(Node):
    def child(self, name: str) -> Node:
        """Raises FileError ENOENT."""
        raise NotImplementedError

    def names(self) -> list[str]:
        raise NotImplementedError

    def listing(self) -> Listing:
        """Its names while somebody lists them: as they are now."""
        names = self.names()
        return Listing(lambda: iter([names]))

    def make_folder(self, name: str, mode: int, caller: Caller) -> Node:
        raise FileError(errno.EPERM, f"{self.path} takes no folders: sequences are made as kv/MODEL/SEQUENCE")

    def create(self, name: str, caller: Caller) -> "File":
        raise FileError(
            errno.EPERM, f"{self.path} takes no files: sequences are imported as kv/MODEL/NAME.safetensors"
        )

    def unlink(self, name: str) -> None:
        raise FileError(errno.EPERM, f"{self.path}/{name} cannot be removed")

    def remove_folder(self, name: str) -> None:
        raise FileError(errno.EPERM, f"{self.path}/{name} cannot be removed")

    def rename(self, name: str, target: "Folder", new_name: str, flags: int) -> None:
        raise FileError(errno.EPERM, f"{self.path}/{name} cannot be renamed: only sequences can")

    def sync(self) -> None:
        """Make what is below durable."""


class File(Node):
    """is_direct: the kernel is to keep no pages of it."""

    is_direct = False

    def open(self, flags: int, caller: Caller) -> "OpenContent":
        raise NotImplementedError

    def check_read_only(self, flags: int) -> None:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise FileError(errno.EACCES, f"{self.path} is read-only")


class OpenContent:
    """What an open file reads and writes."""

    size: int

    def read(self, offset: int, size: int) -> memoryview | bytes:
        raise NotImplementedError

    def write(self, offset: int, data: memoryview | bytes) -> int:
        raise FileError(errno.EBADF)

    def allocate(self, length: int) -> None:
        raise FileError(errno.EBADF)

    def flush(self) -> None:
        """A descriptor was closed."""

    def sync(self) -> None:
        """Make it durable."""

    def release(self) -> None:
        """No descriptor is left."""


def folder_attributes(
    permissions: Permissions, num_folders: int, changed_ns: int, timeout_s: float = STABLE_SECONDS
) -> Attributes:
    """num_folders: directly below; timeout_s: how long name and attributes may be believed."""
    return Attributes(
        inode=0,
        mode=stat.S_IFDIR | permissions.mode,
        num_links=2 + num_folders,
        uid=permissions.uid,
        gid=permissions.gid,
        size=0,
        num_blocks=0,
        atime_ns=changed_ns,
        mtime_ns=changed_ns,
        ctime_ns=changed_ns,
        timeout_s=timeout_s,
        entry_timeout_s=timeout_s,
    )


def file_attributes(mode: int, permissions: Permissions, size: int, changed_ns: int) -> Attributes:
    """Of a file that is another inode once it has changed: its name has to be looked up each time."""
    return Attributes(
        inode=0,
        mode=stat.S_IFREG | mode,
        num_links=1,
        uid=permissions.uid,
        gid=permissions.gid,
        size=size,
        num_blocks=-(-size // 512),
        atime_ns=changed_ns,
        mtime_ns=changed_ns,
        ctime_ns=changed_ns,
        timeout_s=STABLE_SECONDS,
        entry_timeout_s=0.0,
    )
