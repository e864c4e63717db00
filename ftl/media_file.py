"""Flash in a sparse file: two copies of the header, erase-block table, OOB region, pages.

Pages and OOB go through direct I/O (io_uring where it is allowed). An erase punches a hole, so an erased
superblock takes no space and reads as zeros, which is how a page that was never programmed looks.
"""

import errno
import fcntl
import os
import time
from collections import OrderedDict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from ftl.direct_io.api import EXTENT, OOB_PIECE, DirectFile, crc32c_records
from ftl.errors import (
    DriveBusy,
    FormatVersionTooNew,
    MediaIoError,
    NandRuleViolation,
    NotADrive,
    ReadOnlyMedia,
    TruncatedDrive,
)
from ftl.geometry import Geometry
from ftl.layout import (
    BLOCK_BYTES,
    DRIVE_HEADER,
    DRIVE_MAGIC,
    ERASE_BLOCK,
    ERASE_BLOCK_BAD,
    FORMAT_VERSION,
    PAGE_OOB,
)
from ftl.media import MediaCounters, NandRules
from ftl.provisioning import num_lbas
from spdk_glue import dma

DATA_ALIGNMENT = 1 << 20
ORPHANED_LOCK_SECONDS = 5.0
OOB_IMAGES = 32  # superblocks whose OOB is kept in memory while they are programmed


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def make_header(geometry: Geometry) -> np.ndarray:
    """DRIVE_HEADER [1] of a new drive."""
    header = np.zeros(1, DRIVE_HEADER)
    header["format_version"] = FORMAT_VERSION
    header["magic"] = DRIVE_MAGIC
    header["uuid"] = os.urandom(16)
    header["created_ns"] = time.time_ns()
    for name, value in vars(geometry).items():
        header[name] = value
    header["num_lbas"] = num_lbas(geometry)
    table_start = 2 * BLOCK_BYTES
    oob_start = _round_up(table_start + geometry.num_erase_blocks * ERASE_BLOCK.itemsize, BLOCK_BYTES)
    oob_stride = _round_up(geometry.pages_per_superblock * PAGE_OOB.itemsize, BLOCK_BYTES)
    header["erase_block_table_start"] = table_start
    header["oob_start"] = oob_start
    header["oob_stride"] = oob_stride
    header["data_start"] = _round_up(oob_start + oob_stride * geometry.num_superblocks, DATA_ALIGNMENT)
    header["crc32c"] = crc32c_records(header)
    return header


def check_header(path, raw: bytes) -> np.ndarray:
    """DRIVE_HEADER [1] of the first good copy. Raises NotADrive or FormatVersionTooNew."""
    why = "no kvfs header"
    for start in (0, BLOCK_BYTES):
        copy = raw[start : start + BLOCK_BYTES]
        if len(copy) < BLOCK_BYTES:
            continue
        header = np.frombuffer(copy, DRIVE_HEADER).copy()
        if header["magic"][0] != DRIVE_MAGIC:
            continue
        if header["crc32c"][0] != crc32c_records(header)[0]:
            why = "both copies of the header are damaged"
            continue
        if header["format_version"][0] > FORMAT_VERSION:
            raise FormatVersionTooNew(int(header["format_version"][0]), FORMAT_VERSION)
        return header
    raise NotADrive(path, why)


def _geometry(path, header: np.ndarray) -> Geometry:
    try:
        geometry = Geometry(**{name: int(header[name][0]) for name in Geometry.__dataclass_fields__})
        expected = make_header(geometry)
    except ValueError as error:
        raise NotADrive(path, f"impossible geometry: {error}") from error
    for name in ("num_lbas", "erase_block_table_start", "oob_start", "oob_stride", "data_start"):
        if header[name][0] != expected[name][0]:
            raise NotADrive(path, f"the header's {name} does not fit its geometry")
    return geometry


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


class FileMedia:
    """See FlashMedia. Owns the file while open: its lock keeps other processes out."""

    def __init__(self, path, descriptor: int, header: np.ndarray, read_only: bool):
        self.path = os.fspath(path)
        self.geometry = _geometry(path, header)
        self.counters = MediaCounters()
        self.read_only = read_only
        self.uuid = header["uuid"][0].tobytes()
        self._descriptor = descriptor
        self._oob_start, self._oob_stride, self._data_start = (
            int(header[name][0]) for name in ("oob_start", "oob_stride", "data_start")
        )
        self._table_start = int(header["erase_block_table_start"][0])
        self._io = DirectFile(descriptor, self.path, self.geometry.page_size, self._data_start)
        self._rules = NandRules(self.geometry)
        self._oob_images: OrderedDict[int, np.ndarray] = OrderedDict()
        size = self.geometry.num_erase_blocks * ERASE_BLOCK.itemsize
        self._table = np.frombuffer(bytearray(self._read_bytes(self._table_start, size)), ERASE_BLOCK)
        bad = (self._table["flags"] & ERASE_BLOCK_BAD) != 0
        self._bad = bad.reshape(-1, self.geometry.num_planes).any(axis=1)

    @staticmethod
    def create(path, geometry: Geometry) -> "FileMedia":
        """Make a new sparse file of erased flash. Raises FileExistsError, ValueError, OSError."""
        header = make_header(geometry)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, int(header["data_start"][0]) + geometry.capacity_bytes)
            os.pwrite(descriptor, header.tobytes() * 2, 0)
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
            buffer = dma.allocate(2 * BLOCK_BYTES)
            found = os.preadv(descriptor, [buffer], 0)
            header = check_header(path, buffer[:found].tobytes())
            geometry = _geometry(path, header)
            expected = int(header["data_start"][0]) + geometry.capacity_bytes
            size = os.fstat(descriptor).st_size
            if size < expected:
                raise TruncatedDrive(path, expected, size)
            return FileMedia(path, descriptor, header, read_only)
        except BaseException:
            os.close(descriptor)
            raise

    # plain transfers of whole blocks

    def _read_bytes(self, offset: int, size: int) -> bytes:
        start = offset - offset % BLOCK_BYTES
        buffer = dma.allocate(_round_up(offset + size - start, BLOCK_BYTES))
        self._io.read_extents(_extent(buffer, start))
        return buffer[offset - start : offset - start + size].tobytes()

    def _write_table(self, superblock: int) -> None:
        """Write the blocks of the erase-block table that a superblock's records lie in."""
        planes, item = self.geometry.num_planes, ERASE_BLOCK.itemsize
        start = superblock * planes * item // BLOCK_BYTES * BLOCK_BYTES
        stop = _round_up((superblock + 1) * planes * item, BLOCK_BYTES)
        buffer = dma.allocate(stop - start)
        raw = self._table.view(np.uint8)[start:stop]
        buffer[: len(raw)] = raw
        self._io.write_extents(_extent(buffer, self._table_start + start))

    # the four verbs

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        crc32c = np.empty(len(pages), np.uint32)
        self._io.read_pages(pages, addresses, crc32c)
        self.counters.pages_read += len(pages)
        return crc32c

    def read_oob(self, superblock: int) -> np.ndarray:
        size = self.geometry.pages_per_superblock
        raw = self._read_bytes(self._oob_start + superblock * self._oob_stride, size * PAGE_OOB.itemsize)
        records = np.frombuffer(raw, PAGE_OOB).copy()
        self.counters.oob_pages_read += size
        self._rules.found(superblock, records["magic"] != 0)
        return records

    def programmed_superblocks(self) -> np.ndarray:
        found: set[int] = set()
        end = self._oob_start + self._oob_stride * self.geometry.num_superblocks
        position = self._oob_start
        while position < end:
            try:
                start = os.lseek(self._descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but holes from here on
                    break
                raise MediaIoError(error.errno, self.path, position) from error
            stop = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            if start >= end:
                break
            first = (start - self._oob_start) // self._oob_stride
            last = (min(stop, end) - 1 - self._oob_start) // self._oob_stride
            found.update(range(first, last + 1))
            position = stop
        return np.array(sorted(found), np.int64)

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> None:
        if self.read_only:
            raise ReadOnlyMedia("program")
        self._rules.check_range(pages)
        superblocks = pages // self.geometry.pages_per_superblock
        if self._bad[superblocks].any():
            raise NandRuleViolation("bad block", int(pages[self._bad[superblocks].argmax()]))
        self._rules.program(pages)
        pieces, extents = self._oob_writes(pages, superblocks)
        self._io.program_pages(pages, addresses, oob, pieces, extents)
        self.counters.pages_programmed += len(pages)

    def _oob_writes(self, pages: np.ndarray, superblocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each run's OOB goes in memory, and the blocks of that memory to write."""
        pieces, extents = [], []
        breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(superblocks) != 0)) + 1
        bounds = [0, *breaks.tolist(), len(pages)]
        for first, stop in pairwise(bounds):
            superblock = int(superblocks[first])
            image = self._oob_image(superblock)
            address = dma.address_of(image)
            index = int(pages[first]) % self.geometry.pages_per_superblock
            begin = index * PAGE_OOB.itemsize
            end = begin + (stop - first) * PAGE_OOB.itemsize
            pieces.append((first, stop - first, address + begin))
            begin -= begin % BLOCK_BYTES
            end = _round_up(end, BLOCK_BYTES)
            offset = self._oob_start + superblock * self._oob_stride + begin
            extents.append((address + begin, offset, end - begin))
        return np.array(pieces, OOB_PIECE), np.array(extents, EXTENT)

    def _oob_image(self, superblock: int) -> np.ndarray:
        """A superblock's OOB as it is in the file, in memory: its blocks are written whole."""
        if superblock not in self._oob_images:
            image = dma.allocate(self._oob_stride)
            self._io.read_extents(_extent(image, self._oob_start + superblock * self._oob_stride))
            self._oob_images[superblock] = image
            while len(self._oob_images) > OOB_IMAGES:
                self._oob_images.popitem(last=False)
        self._oob_images.move_to_end(superblock)
        return self._oob_images[superblock]

    def erase(self, superblock: int) -> None:
        if self.read_only:
            raise ReadOnlyMedia("erase")
        planes = self.geometry.num_planes
        blocks = slice(superblock * planes, (superblock + 1) * planes)
        if self._bad[superblock]:
            raise NandRuleViolation("bad block", superblock * self.geometry.pages_per_superblock)
        self._table["erase_count"][blocks] += 1
        self._write_table(superblock)
        self._oob_images.pop(superblock, None)
        size = self.geometry.superblock_bytes
        # OOB first: without it a page does not exist, whatever its payload holds
        self._clear(self._oob_start + superblock * self._oob_stride, self._oob_stride)
        self._clear(self._data_start + superblock * size, size, needs_zeros=False)
        self._rules.erase(superblock)
        self.counters.blocks_erased += planes

    def _clear(self, offset: int, size: int, needs_zeros: bool = True) -> None:
        if not self._io.punch_hole(offset, size) and needs_zeros:
            self._io.write_extents(_extent(dma.allocate(size), offset))

    def sync(self) -> None:
        if self.read_only:
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise MediaIoError(error.errno, self.path, 0) from error
        self.counters.syncs += 1

    # facts

    def erase_counts(self) -> np.ndarray:
        return self._table["erase_count"].reshape(-1, self.geometry.num_planes).max(axis=1).astype(np.int64)

    def bad_superblocks(self) -> np.ndarray:
        return self._bad.copy()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_direct(path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without direct I/O, such as an old tmpfs
            raise
        return os.open(path, flags | os.O_CLOEXEC)


def _extent(buffer: np.ndarray, offset: int) -> np.ndarray:
    return np.array([(dma.address_of(buffer), offset, buffer.nbytes)], EXTENT)
