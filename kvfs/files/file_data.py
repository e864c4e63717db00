"""What is in files: reading, writing, holes, on whole blocks of the drive.

A block is written in place. New blocks become part of a file when their data are on the drive, together with
the size, so no state of the catalogue shows what was not written. What the last block has behind the end may be
anything, blocks wholly behind it are zero; so whoever moves the end up zeroes the rest of that block first.
"""

import errno
import os
import stat
import time

import numpy as np

from kvfs.allocator import Extent
from kvfs.files.buffer_pool import BufferPool
from kvfs.files.extent_map import Piece
from kvfs.files.file_catalogue import EXTENT_BYTES, INODE_BYTES
from kvfs.files.inode import Inode
from kvfs.files.inode_table import InodeTable
from kvfs.files.write_behind import WriteBehind
from kvfs.placement import PLACEMENT_FILES
from kvfs.tree import FileError
from spdk_glue import dma

MAX_SIZE = (1 << 63) - 1
POOL_BYTES = 32 << 20  # idle transfer memory of each size
MAX_WAITS = 2  # of a read: the first for what was accepted before it, no more for who writes there on and on
SET_ID = stat.S_ISUID | stat.S_ISGID
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # of fallocate(2)


class FileData:
    """The extents of the inodes that are given have been loaded."""

    def __init__(self, store, inodes: InodeTable, behind: WriteBehind):
        self._store = store
        self._inodes = inodes
        self._behind = behind
        self._data_lock = inodes.data_lock
        self._namespace = store._namespace
        self._block_bytes = store._namespace.block_bytes
        self._pool = BufferPool(POOL_BYTES)

    # reading

    def read(self, inode: Inode, offset: int, size: int) -> memoryview | bytes:
        """Up to size bytes, with every write that was accepted before. Waits for no writer: of a write that is
        under way it gives some, all or nothing."""
        block_bytes = self._block_bytes
        num_waits = 0
        while True:
            with self._data_lock:
                size = min(size, inode.size - offset)
                if size <= 0 or offset < 0:
                    return b""
                first, stop = offset // block_bytes, -(-(offset + size) // block_bytes)
                pieces = inode.extents.pieces(first, stop)
                version = inode.extents.version
                is_behind = self._behind.touches(inode, first, stop)
            if is_behind and num_waits < MAX_WAITS:
                self._behind.wait(inode, first, stop)
                num_waits += 1
                continue
            buffer = self._pool.take((stop - first) * block_bytes)
            self._read_pieces(pieces, buffer)
            if inode.extents.version == version:
                return memoryview(buffer)[offset - first * block_bytes :][:size]
            # what was read may have been given to another file meanwhile

    def read_now(self, inode: Inode, offset: int, size: int) -> memoryview | None:
        """As `read`, from one run of blocks by the drive's short way; None where that is not possible."""
        block_bytes = self._block_bytes
        if not self._data_lock.acquire(blocking=False):
            return None
        try:
            if inode.num_writes_behind:
                return None
            size = min(size, inode.size - offset)
            if size <= 0 or offset < 0:
                return None
            first, stop = offset // block_bytes, -(-(offset + size) // block_bytes)
            lba = inode.extents.run_lba(first, stop)
            version = inode.extents.version
        finally:
            self._data_lock.release()
        if lba is None:
            return None
        buffer = self._pool.take((stop - first) * block_bytes)
        if not self._namespace.read_now(lba, buffer) or inode.extents.version != version:
            return None
        return memoryview(buffer)[offset - first * block_bytes :][:size]

    def _read_pieces(self, pieces: list[Piece], buffer: np.ndarray) -> None:
        """Fill a buffer that begins with the first piece."""
        first, block_bytes = pieces[0][0], self._block_bytes
        transfers = []
        for start, stop, lba in pieces:
            part = buffer[(start - first) * block_bytes : (stop - first) * block_bytes]
            if lba is None:
                part[:] = 0
            else:
                transfers.append((lba, part))
        if transfers:
            self._namespace.read_scattered(transfers)

    def seek(self, inode: Inode, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE: allocated blocks are data, written or not; the end is a hole."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FileError(errno.EINVAL)
        with self._data_lock:
            if not 0 <= offset < inode.size:
                raise FileError(errno.ENXIO)
            block = offset // self._block_bytes
            if whence == os.SEEK_HOLE:
                found = inode.extents.next_hole(block)
                return min(max(offset, found * self._block_bytes), inode.size)
            found = inode.extents.next_data(block)
            if found is None or found * self._block_bytes >= inode.size:
                raise FileError(errno.ENXIO)
            return max(offset, found * self._block_bytes)

    # writing

    def write(self, inode: Inode, offset: int, data: memoryview | bytes, keep_set_id: bool) -> int:
        """All of data, or an error and none of it in the file but what it overwrites.

        data: nobody may change it any more, since it may be written behind; what fails then says the next sync
        or close.
        """
        data = np.frombuffer(data, np.uint8)
        end = offset + data.nbytes
        if offset < 0:
            raise FileError(errno.EINVAL)
        if end > MAX_SIZE:
            raise FileError(errno.EFBIG)
        if not data.nbytes:
            return 0
        block_bytes = self._block_bytes
        first, stop = offset // block_bytes, -(-end // block_bytes)
        with inode.writing:
            self._behind.wait(inode, min(first, inode.size // block_bytes), stop)
            if offset > inode.size:
                self._zero_behind_end(inode)
            pieces = inode.extents.pieces(first, stop)
            new = self._allocate_holes(inode, pieces)
            try:
                if data.nbytes == (stop - first) * block_bytes and dma.address_of(data) % dma.ALIGNMENT == 0:
                    buffer = data  # as the drive takes it
                else:
                    buffer = self._pool.take((stop - first) * block_bytes)
                    self._fill_edges(inode, first, stop, offset, end, buffer)
                    head = offset - first * block_bytes
                    buffer[head : head + data.nbytes] = data
                transfers = self._transfers(first, pieces, new, buffer)
                if self._behind.takes(buffer.nbytes):
                    self._behind.start(inode, first, stop, transfers, buffer)
                else:
                    self._namespace.write_scattered(transfers, PLACEMENT_FILES)
            except BaseException:
                self._inodes.not_written([extent for extents in new.values() for extent in extents])
                raise
            now = time.time_ns()
            with self._data_lock:
                for start, extents in new.items():
                    self._inodes.add_extents(inode, start, extents)
                inode.size = max(inode.size, end)
                inode.mtime_ns = inode.ctime_ns = now
                if inode.mode & SET_ID and not keep_set_id:
                    inode.drop_privileges()
                self._inodes.note_changed(inode)
        return data.nbytes

    def _fill_edges(
        self, inode: Inode, first: int, stop: int, offset: int, end: int, buffer: np.ndarray
    ) -> None:
        """What a write leaves of its edge blocks: the file's bytes as they are, zeros behind the end."""
        block_bytes = self._block_bytes
        edges = set()
        if offset % block_bytes:
            edges.add(first)
        if end % block_bytes:
            edges.add(stop - 1)
        parts = {block: buffer[(block - first) * block_bytes :][:block_bytes] for block in edges}
        transfers = []
        for block, part in parts.items():
            lba = inode.extents.lba(block) if block * block_bytes < inode.size else None
            if lba is None:
                part[:] = 0
            else:
                transfers.append((lba, part))
        if transfers:
            self._namespace.read_scattered(transfers)
        for block, part in parts.items():
            part[max(0, inode.size - block * block_bytes) :] = 0

    def _transfers(
        self, first: int, pieces: list[Piece], new: dict[int, list[Extent]], buffer: np.ndarray
    ) -> list[tuple[int, np.ndarray]]:
        """Which part of the buffer goes where."""
        transfers, block_bytes = [], self._block_bytes
        for start, stop, lba in pieces:
            position = (start - first) * block_bytes
            for first_lba, count in new[start] if lba is None else [(lba, stop - start)]:
                transfers.append((first_lba, buffer[position : position + count * block_bytes]))
                position += count * block_bytes
        return transfers

    def _allocate_holes(self, inode: Inode, pieces: list[Piece]) -> dict[int, list[Extent]]:
        """Extents for the holes among some pieces, by first file block. Raises OutOfSpace, with none taken."""
        holes = [(start, stop - start) for start, stop, lba in pieces if lba is None]
        if not holes:
            return {}
        found: dict[int, list[Extent]] = {}
        with self._store._lock:
            self._store._check_open()
            try:
                for start, count in holes:
                    found[start] = self._store._allocate_some(count, inode.extents.lba_behind(start))
                num_extents = sum(map(len, found.values()))
                self._store._catalogue.batch.join(num_extents * EXTENT_BYTES + INODE_BYTES)
            except BaseException:
                for extents in found.values():
                    for extent in extents:
                        self._store._allocator.give_back(*extent)
                raise
        self._inodes.allocated([extent for extents in found.values() for extent in extents])
        return found

    # size and holes; each holds inode.writing

    def truncate(self, inode: Inode, size: int) -> None:
        """Move the end; what lies behind it is given back, also what was allocated in advance."""
        if size < 0:
            raise FileError(errno.EINVAL)
        if size > MAX_SIZE:
            raise FileError(errno.EFBIG)
        with inode.writing:
            self._behind.wait(inode)
            if size > inode.size:
                self._zero_behind_end(inode)
            with self._data_lock:
                if size <= inode.size:
                    self._inodes.remove_extents(inode, -(-size // self._block_bytes), 1 << 62)
                inode.size = size
                self._inodes.note_changed(inode)

    def allocate(self, inode: Inode, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        keeps_size = bool(mode & KEEP_SIZE)
        what = mode & ~KEEP_SIZE
        if what not in (0, PUNCH_HOLE, ZERO_RANGE) or (what == PUNCH_HOLE and not keeps_size):
            raise FileError(errno.EOPNOTSUPP)
        if offset < 0 or length <= 0:
            raise FileError(errno.EINVAL)
        end = offset + length
        if end > MAX_SIZE:
            raise FileError(errno.EFBIG)
        with inode.writing:
            self._behind.wait(inode)
            if end > inode.size and not keeps_size:
                self._zero_behind_end(inode)
            if what == PUNCH_HOLE:
                self._punch(inode, offset, end)
            else:
                if what == ZERO_RANGE:
                    self._zero(inode, offset, end)
                self._fill_holes(inode, offset, end)
            now = time.time_ns()
            with self._data_lock:
                if not keeps_size:
                    inode.size = max(inode.size, end)
                inode.mtime_ns = inode.ctime_ns = now
                self._inodes.note_changed(inode)

    def _fill_holes(self, inode: Inode, offset: int, end: int) -> None:
        """Free blocks read as zeros, so to allocate is all."""
        pieces = inode.extents.pieces(offset // self._block_bytes, -(-end // self._block_bytes))
        new = self._allocate_holes(inode, pieces)
        with self._data_lock:
            for start, extents in new.items():
                self._inodes.add_extents(inode, start, extents)

    def _punch(self, inode: Inode, offset: int, end: int) -> None:
        first, stop = self._zero_edges(inode, offset, end)
        if first < stop:
            with self._store._lock:
                self._store._check_open()
                self._store._catalogue.batch.join(EXTENT_BYTES)  # a hole in a run leaves two
            with self._data_lock:
                self._inodes.remove_extents(inode, first, stop)

    def _zero(self, inode: Inode, offset: int, end: int) -> None:
        """Deallocated blocks read as zeros, also those that stay in the file."""
        first, stop = self._zero_edges(inode, offset, end)
        if first < stop:
            pieces = inode.extents.pieces(first, stop)
            self._namespace.deallocate([(lba, b - a) for a, b, lba in pieces if lba is not None])

    def _zero_edges(self, inode: Inode, offset: int, end: int) -> tuple[int, int]:
        """Zero the parts of blocks at the edges of a range; the whole blocks [first, stop) between them."""
        block_bytes = self._block_bytes
        first, stop = -(-offset // block_bytes), end // block_bytes
        if first > stop:  # within one block
            self._zero_in_block(inode, offset, end)
        else:
            self._zero_in_block(inode, offset, first * block_bytes)
            self._zero_in_block(inode, stop * block_bytes, end)
        return first, stop

    def _zero_behind_end(self, inode: Inode) -> None:
        """Before the end moves up: the rest of its block becomes part of the file."""
        size = inode.size
        self._zero_in_block(inode, size, size + -size % self._block_bytes)

    def _zero_in_block(self, inode: Inode, offset: int, end: int) -> None:
        lba = inode.extents.lba(offset // self._block_bytes) if offset < end else None
        if lba is None:
            return
        buffer = self._pool.take(self._block_bytes)
        self._namespace.read_scattered([(lba, buffer)])
        start = offset % self._block_bytes
        part = buffer[start : start + end - offset]
        if part.any():
            part[:] = 0
            self._namespace.write_scattered([(lba, buffer)], PLACEMENT_FILES)
