"""Flash in a sparse file, through direct I/O (io_uring where it is allowed).

Closing punches holes where superblocks were erased, so they take no space. An erase does not: a file system
that is mounted with `discard` tells its disk of every hole, and what is written meanwhile waits for that.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ftl.direct_io.api import DirectFile
from ftl.drive_layout import HEADERS_BYTES, DriveLayout, new_table
from ftl.errors import DriveBusy, NotADrive, TruncatedDrive, backing_error
from ftl.geometry import Geometry
from ftl.media_stored import StoredMedia, extent_of
from spdk_glue import dma

ORPHANED_LOCK_SECONDS = 5.0


class FileBacking(DirectFile):
    """See media_stored.Backing. Owns the descriptor."""

    discards_at_once = False

    def __init__(self, path, descriptor: int, layout: DriveLayout):
        super().__init__(descriptor, os.fspath(path), layout.geometry.page_size, layout.data_start)
        self.name = self.path

    def program_pages(self, pages, addresses, oob, oob_pieces, extents, stream: int) -> None:
        # a file system takes no placement hints
        super().program_pages(pages, addresses, oob, oob_pieces, extents)

    def clear(self, offset: int, length: int) -> None:
        if not self.punch_hole(offset, length):
            zeros = dma.allocate(length)
            self.write_extents(extent_of(zeros, offset))

    def discard(self, offset: int, length: int) -> None:
        self.punch_hole(offset, length)

    def written_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
                end = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but holes from here on
                    return
                raise backing_error(error.errno, self.path, start) from error
            if start < stop:
                yield start, min(end, stop)
            start = end

    def sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise backing_error(error.errno, self.path, 0) from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileMedia(StoredMedia):
    """See FlashMedia. Owns the file while open: its lock keeps other processes out."""

    def __init__(self, path, descriptor: int, layout: DriveLayout, read_only: bool):
        self.path = os.fspath(path)
        self.plain_file = FileBacking(path, descriptor, layout)
        super().__init__(self.plain_file, layout, read_only)

    @staticmethod
    def create(path, geometry: Geometry) -> "FileMedia":
        """Make a new sparse file of erased flash. Raises FileExistsError, ValueError, OSError."""
        layout = DriveLayout.new(geometry)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, layout.size_bytes)
            head = layout.header * 2 + new_table(geometry).tobytes()
            os.pwrite(descriptor, head.ljust(layout.oob_start, b"\0"), 0)
            os.fsync(descriptor)
            directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            try:
                os.fsync(directory)  # the name must survive as well
            finally:
                os.close(directory)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
        return FileMedia.open(path)

    @staticmethod
    def open(path, read_only: bool = False) -> "FileMedia":
        """Open and lock a drive's file. Raises NotADrive and its relatives, DriveBusy, OSError."""
        descriptor = _open_direct(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            if not os.path.isfile(path):
                raise NotADrive(path, "not a regular file")
            _lock(descriptor, path)
            buffer = dma.allocate(HEADERS_BYTES)
            found = os.preadv(descriptor, [buffer], 0)
            layout = DriveLayout.read(path, buffer[:found].tobytes())
            size = os.fstat(descriptor).st_size
            if size < layout.size_bytes:
                raise TruncatedDrive(path, layout.size_bytes, size)
            return FileMedia(path, descriptor, layout, read_only)
        except BaseException:
            os.close(descriptor)
            raise


def _lock(descriptor: int, path) -> None:
    """Lock the file for this process, or raise DriveBusy with the holder's pid.

    A killed process keeps its lock for a moment: its io_uring requests, which hold the file, are ended by
    the kernel after the process is gone. So a lock that no living process holds is waited for.
    """
    give_up = time.monotonic() + ORPHANED_LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = _lock_holder(descriptor)
            alive = holder is not None and Path(f"/proc/{holder}").exists()
            if alive or time.monotonic() > give_up:
                raise DriveBusy(path, holder) from error
        time.sleep(0.01)


def _lock_holder(descriptor: int) -> int | None:
    """The pid that holds the file's lock, from /proc/locks; None where that cannot be told."""
    inode = os.fstat(descriptor).st_ino
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and fields[5].rpartition(":")[2] == str(inode):
                return int(fields[4])
    return None


def _open_direct(path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without direct I/O, such as an old tmpfs
            raise
        return os.open(path, flags | os.O_CLOEXEC)
