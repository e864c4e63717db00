"""One file, folder, link or device: what stat shows, and the rules of POSIX that need nothing else."""

import stat
import threading
from dataclasses import dataclass, field

from kvfs.files.extent_map import ExtentMap
from kvfs.tree import Attributes

STAT_BLOCK_BYTES = 512
DAY_NS = 86_400 * 10**9
MAX_TIME_NS = (1 << 63) - 1  # the year 2262
PERMISSIONS = 0o7777


class Writing:
    """Held by whoever changes a file's data; `version` tells readers without it whether somebody has."""

    __slots__ = ("_count", "_lock")

    def __init__(self):
        self._lock = threading.Lock()
        self._count = 0  # of changes begun and ended: odd while one is under way

    def __enter__(self) -> None:
        self._lock.acquire()
        self._count += 1

    def __exit__(self, *exception) -> None:
        self._count += 1
        self._lock.release()

    @property
    def version(self) -> int | None:
        """None while the data are being changed."""
        count = self._count
        return None if count % 2 else count


@dataclass(slots=True, eq=False)
class Inode:
    """num_links: names, and of a folder also its "." and its subfolders' ".."; 0: without a name, and gone when
    neither the kernel refers to it nor a handle is open.
    parent: of a folder (the root's is itself), 0 of all else
    num_blocks: allocated, of the drive's
    """

    id: int
    parent: int
    mode: int
    num_links: int
    uid: int
    gid: int
    rdev: int
    size: int
    num_blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: bytes | None = None
    # in memory only
    num_lookups: int = 0  # the kernel's references
    num_handles: int = 0
    extents: ExtentMap | None = None  # None: not read yet
    xattrs: dict[bytes, bytes] | None = None
    has_row: bool = True  # whether the catalogue may know it
    writing: Writing = field(default_factory=Writing)
    num_writes_behind: int = 0  # accepted, on their way to the drive
    write_error: Exception | None = None  # of one that did not get there, and nobody knows yet

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_in_use(self) -> bool:
        return self.num_lookups > 0 or self.num_handles > 0

    def attributes(self, block_bytes: int) -> Attributes:
        return Attributes(
            self.id,
            self.mode,
            self.num_links,
            self.uid,
            self.gid,
            self.size,
            self.num_blocks * (block_bytes // STAT_BLOCK_BYTES),
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.rdev,
        )

    def drop_privileges(self) -> None:
        """What a change of the owner or, by an ordinary user, of the data does: no set-id program remains."""
        if self.mode & (stat.S_ISUID | stat.S_ISGID) and not self.is_folder:
            self.mode &= ~stat.S_ISUID
            if self.mode & stat.S_IXGRP:  # without it the bit means something else, locking
                self.mode &= ~stat.S_ISGID

    def wants_atime(self, now_ns: int) -> bool:
        """As the mount option relatime has it: once after each change, and once a day."""
        atime = self.atime_ns
        return atime <= self.mtime_ns or atime <= self.ctime_ns or now_ns - atime > DAY_NS


def clamped_time(time_ns: int) -> int:
    """The nearest time that the catalogue can hold."""
    return max(-MAX_TIME_NS, min(time_ns, MAX_TIME_NS))
