"""Typed calls into the C of this package. Everything here releases the GIL while it works.

Batches are arrays: `pages` int64 [n] physical pages, `addresses` uint64 [n] of page_size buffers. The caller
keeps the memory behind the addresses alive and, for direct I/O, aligned to 512 bytes.
"""

import collections
import os

import numpy as np

from ftl.direct_io._direct_io import ffi, lib
from ftl.errors import backing_error

QUEUE_DEPTH = 32
# Small enough to have several in flight in a 1 MiB read, which somebody waits for; writes come in batches of
# many MiB, and larger requests gain 10 to 15%.
READ_REQUEST_BYTES = 256 << 10
WRITE_REQUEST_BYTES = 1 << 20

# EXTENT, which is dio_extent here, is spdk_glue.dma's.
OOB_PIECE = np.dtype([("first", "=u8"), ("num_pages", "=u8"), ("image_address", "=u8")])

# Rings not in use. One job holds one ring, so as many exist as threads were in here at once.
_idle_rings: collections.deque = collections.deque()
_uring_refused = False


def _forget_rings():
    """A ring shared with the parent process would mix up both processes' completions."""
    _idle_rings.clear()


os.register_at_fork(after_in_child=_forget_rings)


def _take_ring():
    global _uring_refused
    try:
        return _idle_rings.pop()
    except IndexError:
        pass
    if _uring_refused:
        return ffi.NULL
    ring = lib.dio_ring_create(QUEUE_DEPTH)
    if ring == ffi.NULL and not _idle_rings:
        _uring_refused = True
    return ring


def io_uring_works() -> bool:
    """Whether this kernel and policy let us use io_uring; plain system calls are used otherwise."""
    ring = _take_ring()
    if ring == ffi.NULL:
        return False
    _idle_rings.append(ring)
    return True


def _pointer(ctype: str, array: np.ndarray):
    return ffi.from_buffer(ctype, array)  # a tenth of the time of __array_interface__


def _batch(pages: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pages = np.ascontiguousarray(pages, dtype=np.int64)
    addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
    if pages.shape != addresses.shape or pages.ndim != 1:
        raise ValueError(f"{pages.shape} pages and {addresses.shape} addresses are not one batch")
    return pages, addresses


class DirectFile:
    """Batches of transfers on one open file descriptor.

    use_uring=False forces plain preadv/pwritev (tests compare both).
    """

    def __init__(self, fd: int, path: str, page_size: int, data_start: int, use_uring: bool = True):
        self.fd = fd
        self.path = path
        self.page_size = page_size
        self.data_start = data_start
        self.use_uring = use_uring

    def _run(self, function, *arguments):
        """Calls a transfer function with a ring of its own; raises MediaIoError(errno, path, offset)."""
        ring = _take_ring() if self.use_uring else ffi.NULL
        failed_at = ffi.new("uint64_t *")
        result = function(ring, *arguments, failed_at)
        if ring != ffi.NULL:
            if result == 0:
                _idle_rings.append(ring)
            else:  # requests may be left in its queue
                lib.dio_ring_destroy(ring)
        if result:
            raise backing_error(-result, self.path, int(failed_at[0]))

    def read_pages(self, pages: np.ndarray, addresses: np.ndarray, crc32c: np.ndarray | None = None) -> None:
        """Reads pages; fills crc32c, uint32 [n], with the checksum of each as it lands."""
        pages, addresses = _batch(pages, addresses)
        out = ffi.NULL if crc32c is None else _pointer("uint32_t *", crc32c)
        self._run(
            lib.dio_read_pages,
            self.fd,
            _pointer("const int64_t *", pages),
            _pointer("const uint64_t *", addresses),
            len(pages),
            self.page_size,
            self.data_start,
            READ_REQUEST_BYTES,
            out,
        )

    def program_pages(self, pages, addresses, oob, oob_pieces, extents) -> None:
        """Writes pages and then, in the same batch, their OOB.

        oob: PAGE_OOB [n], both checksum fields are filled in here
        oob_pieces: OOB_PIECE [k], where runs of those records go in memory before they are written
        extents: EXTENT [m], the pieces of that memory to write
        """
        pages, addresses = _batch(pages, addresses)
        self._run(
            lib.dio_program_pages,
            self.fd,
            _pointer("const int64_t *", pages),
            _pointer("const uint64_t *", addresses),
            len(pages),
            self.page_size,
            self.data_start,
            WRITE_REQUEST_BYTES,
            _pointer("uint8_t *", oob),
            _pointer("const dio_oob_piece *", oob_pieces),
            len(oob_pieces),
            _pointer("const dio_extent *", extents),
            len(extents),
        )

    def _extents(self, write: bool, extents: np.ndarray) -> None:
        self._run(
            lib.dio_transfer_extents,
            self.fd,
            write,
            _pointer("const dio_extent *", extents),
            len(extents),
            WRITE_REQUEST_BYTES if write else READ_REQUEST_BYTES,
        )

    def read_extents(self, extents: np.ndarray) -> None:
        """Reads EXTENT [n]: memory from places of the file."""
        self._extents(False, extents)

    def write_extents(self, extents: np.ndarray) -> None:
        """Writes EXTENT [n]: memory to places of the file."""
        self._extents(True, extents)

    def punch_hole(self, offset: int, length: int) -> bool:
        """Makes a range zero and gives its space back; False where the file system cannot."""
        result = lib.dio_punch_hole(self.fd, offset, length)
        if result in (-95, -38):  # EOPNOTSUPP, ENOSYS
            return False
        if result:
            raise backing_error(-result, self.path, offset)
        return True


class MappedRuns:
    """Pages of a file by LBA, without a lock: see mapped_read.c.

    entries: page + 1 by LBA, zero where unmapped, uint32 or uint64; columns, known, slots, used: see
    ftl/checksums.py. All are the caller's, who changes them.
    """

    def __init__(self, file: DirectFile, entries, columns, known, slots, used):
        self._kept = file, entries, columns, known, slots, used
        self._map = ffi.new(
            "dio_map *",
            {
                "fd": file.fd,
                "is_wide": entries.dtype.itemsize == 8,
                "page_size": file.page_size,
                "data_start": file.data_start,
                "num_lbas": len(entries),
                "pages_per_superblock": columns.shape[1],
                "entries": _pointer("void *", entries),
                "slots": _pointer("int32_t *", slots),
                "columns": _pointer("uint32_t *", columns),
                "known": _pointer("uint8_t *", known),
                "used": _pointer("uint8_t *", used),
            },
        )

    @property
    def address(self) -> int:
        """Of the dio_map, for native code that reads pages in the same way; it lives as long as this object."""
        return int(ffi.cast("uintptr_t", self._map))

    def find(self, first_lba: int, num_pages: int):
        """For `read`: the run of pages that these LBAs are mapped to; None if they are not, or are several."""
        run = ffi.new("dio_run *")
        return run if lib.dio_find_run(self._map, first_lba, num_pages, run) else None

    def read(self, run, data: np.ndarray) -> bool:
        """Fill uint8 [num_pages * page_size]; False if that is not the LBAs' content for sure."""
        return bool(lib.dio_read_run(self._map, run, _pointer("uint8_t[]", data)))


def crc32c_pages(addresses: np.ndarray, page_size: int) -> np.ndarray:
    """uint32 [n]: CRC32C of page_size bytes (a multiple of 8) at each address."""
    addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
    out = np.empty(len(addresses), dtype=np.uint32)
    pointer = _pointer("const uint64_t *", addresses)
    lib.dio_crc32c_pages(pointer, len(addresses), page_size, _pointer("uint32_t *", out))
    return out


def crc32c_records(records: np.ndarray) -> np.ndarray:
    """uint32 [n]: CRC32C of each record, its bytes 4..7 (where the records keep it) counted as zero."""
    if not records.flags.c_contiguous or records.itemsize % 8:
        raise ValueError("records must be contiguous and a multiple of 8 bytes")
    out = np.empty(records.size, dtype=np.uint32)
    pointer = _pointer("const uint8_t *", records)
    lib.dio_crc32c_records(pointer, records.size, records.itemsize, _pointer("uint32_t *", out))
    return out


def xor_pages(targets: np.ndarray, sources: np.ndarray, page_size: int) -> None:
    """XORs each source page, uint64 [n] addresses, into its target; a target may come several times."""
    lib.dio_xor_pages(
        _pointer("const uint64_t *", np.ascontiguousarray(targets, np.uint64)),
        _pointer("const uint64_t *", np.ascontiguousarray(sources, np.uint64)),
        len(targets),
        page_size,
    )


def complete_oob(addresses: np.ndarray, page_size: int, oob: np.ndarray) -> None:
    """Fills both checksums of PAGE_OOB [n] for the payloads at `addresses`."""
    addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
    pointer = _pointer("const uint64_t *", addresses)
    lib.dio_complete_oob(pointer, len(addresses), page_size, _pointer("uint8_t *", oob))


def copy_pages(to: np.ndarray, source: np.ndarray, page_size: int) -> None:
    """Copies page_size bytes from each address of `source` to the one in `to`."""
    to, source = (np.ascontiguousarray(a, dtype=np.uint64) for a in (to, source))
    pointers = (_pointer("const uint64_t *", a) for a in (to, source))
    lib.dio_copy_pages(*pointers, len(to), page_size)


def zero_pages(addresses: np.ndarray, page_size: int) -> None:
    """Clears page_size bytes at each address."""
    addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
    lib.dio_zero_pages(_pointer("const uint64_t *", addresses), len(addresses), page_size)


def use_software_crc32c(on: bool) -> bool:
    """For tests: turns the CRC instruction off and on; returns whether it is in use now."""
    return bool(lib.dio_crc32c_force_software(on))
