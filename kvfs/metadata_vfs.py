"""A SQLite VFS whose files are ranges of logical blocks.

Two files live in the reserved metadata area: the database and its write-ahead log. SQLite runs in WAL
mode with exclusive locking, so there is no shared memory and one process at a time. Writes collect in
memory, whole blocks at a time, until SQLite or `sync` asks for durability; then they go out in one batch
between two NVMe Flushes, the first for the data that they name. A block is written atomically by the drive,
and WAL frames carry checksums, so a power cut between blocks loses whole transactions from the end and
nothing else.

Block 0 of the volume is the volume header: format version, area sizes, file sizes.
"""

import zlib
from collections import OrderedDict

import apsw
import numpy as np

from kvfs.errors import NotADrive
from spdk_glue import dma
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeError, NvmeStatusError, Status

VOLUME_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("crc32", "<u4"),  # zlib.crc32 of this record with the field zero
        ("database_lbas", "<u8"),
        ("wal_lbas", "<u8"),
        ("database_bytes", "<u8"),
        ("wal_bytes", "<u8"),
        ("wal_exists", "<u4"),
        ("reserved", "V76"),
    ]
)
assert VOLUME_HEADER.itemsize == 128
VOLUME_MAGIC = b"KVFSVOL1"
VOLUME_VERSION = 1
DATABASE_NAME = "kvfs.db"
PLACEMENT_METADATA = 0
READ_AHEAD_BLOCKS = 16  # a command costs about as much as so many blocks
CACHED_BLOCKS = 2048  # clean blocks kept for reading: a WAL between checkpoints fits


def metadata_area(num_lbas: int) -> tuple[int, int]:
    """(database_lbas, wal_lbas): 1/32 of the volume, at 4 KiB blocks 4 MiB to 2 GiB, halved between them.

    From 512 GiB on 1/256: the token ids of a million groups take 1 GiB. A million short sequences take 520 MB
    (tools/bench/many_sequences.py). The log is as large as the database, so that no transaction is too large
    for it.
    """
    total = min(max(num_lbas // 32, 1024), max(1 << 19, num_lbas // 256))
    return total // 2, total // 2


class BlockFile:
    """One file: bytes over a fixed range of blocks, with a write-back buffer."""

    def __init__(self, namespace: Namespace, first_lba: int, num_lbas: int, size: int):
        self._namespace = namespace
        self.first_lba = first_lba
        self._block_bytes = namespace.block_bytes
        self.capacity = num_lbas * self._block_bytes
        self.size = size
        self._dirty: dict[int, bytearray] = {}
        self._clean: OrderedDict[int, bytes] = OrderedDict()
        self._next = 0  # the block behind the last one that was asked for

    def _block(self, index: int) -> bytes | bytearray:
        is_in_order, self._next = index == self._next, index + 1
        if index in self._dirty:
            return self._dirty[index]
        if index in self._clean:
            self._clean.move_to_end(index)
            return self._clean[index]
        return self._read_ahead(index, READ_AHEAD_BLOCKS if is_in_order else 1)

    def _read_ahead(self, index: int, num_blocks: int) -> bytes:
        """Read a block, and with it those of so many behind it that are not in memory.

        Not for who looks here and there: on flash, neighbours lie apart, as they were written.
        """
        stop = min(index + num_blocks, -(-self.size // self._block_bytes))
        known = (i for i in range(index + 1, stop) if i in self._dirty or i in self._clean)
        count = max(1, next(known, stop) - index)
        data = self._namespace.read(self.first_lba + index, count).tobytes()
        blocks = [data[start : start + self._block_bytes] for start in range(0, len(data), self._block_bytes)]
        for position, block in enumerate(blocks):
            self._keep(index + position, block)
        return blocks[0]

    def _keep(self, index: int, data: bytes) -> None:
        self._clean[index] = data
        while len(self._clean) > CACHED_BLOCKS:
            self._clean.popitem(last=False)

    def read(self, amount: int, offset: int) -> bytes:
        """Up to `amount` bytes; short at the end of the file, as SQLite expects."""
        amount = max(0, min(amount, self.size - offset))
        if amount == self._block_bytes and offset % amount == 0:  # as SQLite reads all but the header
            return bytes(self._block(offset // amount))
        pieces = []
        while amount > 0:
            index, start = divmod(offset, self._block_bytes)
            piece = self._block(index)[start : start + amount]
            pieces.append(bytes(piece))
            offset += len(piece)
            amount -= len(piece)
        return b"".join(pieces)

    def write(self, data: bytes, offset: int) -> None:
        if offset + len(data) > self.capacity:
            raise apsw.FullError(f"the metadata area of {self.capacity} bytes is full")
        known_blocks = -(-self.size // self._block_bytes)  # what lies behind them is nobody's
        self.size = max(self.size, offset + len(data))
        view = memoryview(data)
        while view:
            index, start = divmod(offset, self._block_bytes)
            count = min(len(view), self._block_bytes - start)
            if index not in self._dirty:
                whole = count == self._block_bytes or index >= known_blocks
                self._dirty[index] = bytearray(self._block_bytes) if whole else bytearray(self._block(index))
                self._clean.pop(index, None)
            self._dirty[index][start : start + count] = view[:count]
            view = view[count:]
            offset += count

    def truncate(self, size: int) -> None:
        self.size = min(self.size, size)

    def drain(self) -> list[tuple[int, np.ndarray]]:
        """(LBA, buffer) of the dirty blocks, neighbours joined; they are clean afterwards."""
        extents = []
        indices = sorted(self._dirty)
        first = 0
        while first < len(indices):
            stop = first + 1
            while stop < len(indices) and indices[stop] == indices[stop - 1] + 1:
                stop += 1
            buffer = dma.allocate((stop - first) * self._block_bytes)
            for position, index in enumerate(indices[first:stop]):
                start = position * self._block_bytes
                buffer[start : start + self._block_bytes] = np.frombuffer(self._dirty[index], np.uint8)
                self._keep(index, bytes(self._dirty[index]))
            extents.append((self.first_lba + indices[first], buffer))
            first = stop
        return extents

    def forget_dirty(self) -> None:
        self._dirty.clear()

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty)


class Volume:
    """The volume header and the two metadata files of one drive."""

    def __init__(self, namespace: Namespace, header: np.ndarray):
        self._namespace = namespace
        self._header = header
        database_lbas, wal_lbas = int(header["database_lbas"][0]), int(header["wal_lbas"][0])
        self.database = BlockFile(namespace, 1, database_lbas, int(header["database_bytes"][0]))
        self.wal = BlockFile(namespace, 1 + database_lbas, wal_lbas, int(header["wal_bytes"][0]))
        self.wal_exists = bool(header["wal_exists"][0])
        self.detached = False  # a drive that failed is not written any more
        self.first_data_lba = 1 + database_lbas + wal_lbas

    @classmethod
    def format(cls, namespace: Namespace, area: tuple[int, int] | None = None) -> "Volume":
        """An empty volume. area: (database_lbas, wal_lbas), metadata_area's choice when None."""
        header = np.zeros(1, VOLUME_HEADER)
        header["magic"] = VOLUME_MAGIC
        header["version"] = VOLUME_VERSION
        header["database_lbas"], header["wal_lbas"] = area or metadata_area(namespace.num_lbas)
        volume = cls(namespace, header)
        if volume.first_data_lba >= namespace.num_lbas:
            raise ValueError(f"a drive of {namespace.num_lbas} blocks is too small for kvfs")
        volume.sync()
        return volume

    @classmethod
    def open(cls, namespace: Namespace, path) -> "Volume":
        """Raises NotADrive when block 0 does not hold a volume this version can read."""
        header = namespace.read(0, 1)[: VOLUME_HEADER.itemsize].view(VOLUME_HEADER).copy()
        if header["magic"][0] != VOLUME_MAGIC:
            raise NotADrive(path, "the drive holds no kvfs volume; format it with kvfsctl format")
        if header["crc32"][0] != _header_crc(header):
            raise NotADrive(path, "the volume header is damaged")
        if header["version"][0] > VOLUME_VERSION:
            raise NotADrive(
                path, f"volume version {header['version'][0]}, but this kvfs reads up to {VOLUME_VERSION}"
            )
        return cls(namespace, header)

    def sync(self) -> None:
        """Everything written to the files so far is durable when this returns."""
        if self.detached:
            return
        extents = self.database.drain() + self.wal.drain()
        sizes = (self.database.size, self.wal.size, self.wal_exists)
        header = self._header.copy()
        header["database_bytes"], header["wal_bytes"], header["wal_exists"] = sizes
        header["crc32"] = _header_crc(header)
        if header.tobytes() != self._header.tobytes():
            block = dma.allocate(self._namespace.block_bytes)
            block[: header.nbytes] = header.view(np.uint8)
            extents.append((0, block))
        if extents:
            # of what is not yet durable, any part may survive a power cut: rows must not outlive their data
            self._namespace.flush()
            self._namespace.write_scattered(extents, PLACEMENT_METADATA)
        self._namespace.flush()
        self.database.forget_dirty()
        self.wal.forget_dirty()
        self._header = header


def _header_crc(header: np.ndarray) -> int:
    copy = header.copy()
    copy["crc32"] = 0
    return zlib.crc32(copy.tobytes())


class _OpenFile:
    """What SQLite holds open: apsw calls these by SQLite's names."""

    def __init__(self, volume: Volume, file: BlockFile):
        self._volume = volume
        self._file = file

    def xRead(self, amount, offset):
        return self._file.read(amount, offset)

    def xWrite(self, data, offset):
        self._file.write(data, offset)

    def xTruncate(self, size):
        self._file.truncate(size)

    def xSync(self, flags):
        try:
            self._volume.sync()
        except NvmeError as error:
            is_status = isinstance(error, NvmeStatusError)
            if is_status and error.status == Status.NAMESPACE_WRITE_PROTECTED:
                return  # opened to be looked into: what an upgrade has changed stays in memory
            raise apsw.IOError(str(error)) from error

    def xFileSize(self):
        return self._file.size

    def xSectorSize(self):
        return self._volume.database._block_bytes

    def xDeviceCharacteristics(self):
        return apsw.SQLITE_IOCAP_SAFE_APPEND

    def xLock(self, level):
        """One process owns the drive (its file is locked); there is nobody to lock out."""

    def xUnlock(self, level):
        """See xLock."""

    def xCheckReservedLock(self):
        return False

    def xFileControl(self, op, pointer):
        return False

    def xClose(self):
        """The volume outlives SQLite's handle."""


class VolumeVfs(apsw.VFS):
    """Registers `name` as a SQLite VFS over one volume."""

    def __init__(self, name: str, volume: Volume):
        self._volume = volume
        super().__init__(name, "")

    def xOpen(self, name, flags):
        filename = name.filename() if isinstance(name, apsw.URIFilename) else name
        if filename and filename.endswith("-wal"):
            self._volume.wal_exists = True
            return _OpenFile(self._volume, self._volume.wal)
        if filename and filename.endswith(DATABASE_NAME):
            return _OpenFile(self._volume, self._volume.database)
        raise apsw.CantOpenError(f"the volume has no file {filename}")

    def xDelete(self, name, sync):
        if name.endswith("-wal"):
            self._volume.wal_exists = False
            self._volume.wal.truncate(0)

    def xAccess(self, name, flags):
        if name.endswith("-wal"):
            return self._volume.wal_exists
        return name.endswith(DATABASE_NAME) and self._volume.database.size > 0

    def xFullPathname(self, name):
        return name
