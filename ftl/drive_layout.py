"""Where everything lies in the store behind a drive, and the header that says so. FORMAT.md draws it."""

import os
import time
from dataclasses import dataclass

import numpy as np

from ftl.direct_io.api import crc32c_pages, crc32c_records
from ftl.errors import FormatVersionTooNew, NotADrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, DRIVE_HEADER, DRIVE_MAGIC, ERASE_BLOCK, FORMAT_VERSION, PAGE_OOB
from ftl.provisioning import num_lbas
from spdk_glue import dma

DATA_ALIGNMENT = 1 << 20
HEADERS_BYTES = 2 * BLOCK_BYTES  # at the start of the store: the header, twice


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class DriveLayout:
    """A header's facts. Offsets and sizes in bytes, multiples of BLOCK_BYTES."""

    header: bytes
    geometry: Geometry
    uuid: bytes
    table_start: int
    oob_start: int
    oob_stride: int  # OOB of one superblock
    data_start: int

    @property
    def size_bytes(self) -> int:
        return self.data_start + self.geometry.capacity_bytes

    @property
    def oob_end(self) -> int:
        return self.oob_start + self.oob_stride * self.geometry.num_superblocks

    def oob_of(self, superblock: int) -> int:
        return self.oob_start + superblock * self.oob_stride

    def data_of(self, superblock: int) -> int:
        return self.data_start + superblock * self.geometry.superblock_bytes

    @staticmethod
    def new(geometry: Geometry) -> "DriveLayout":
        """The layout of a new drive. Raises ValueError for a geometry without room for a drive."""
        return _from_header(make_header(geometry))

    @staticmethod
    def read(name, headers: bytes) -> "DriveLayout":
        """The layout that the first good copy of the header gives; `name` is for the errors.

        Raises NotADrive, with what is wrong with the copies, or FormatVersionTooNew.
        """
        whys = []
        for start in range(0, len(headers) - BLOCK_BYTES + 1, BLOCK_BYTES):
            header = np.frombuffer(headers, DRIVE_HEADER, 1, start).copy()
            why = _what_is_wrong(header)
            if why is None:
                return _from_header(header)
            whys.append(why)
        found = [why for why in whys if why != "no kvfs header"]
        if len(found) == 2 and found[0] == found[1]:
            raise NotADrive(name, f"both copies of the header: {found[0]}")
        raise NotADrive(name, found[0] if found else "no kvfs header")


def has_magic(headers: bytes) -> bool:
    """Whether the first HEADERS_BYTES of a store are a drive's, whole or damaged."""
    size = DRIVE_HEADER.itemsize
    copies = [headers[start : start + size] for start in range(0, HEADERS_BYTES, BLOCK_BYTES)]
    return any(
        len(copy) == size and np.frombuffer(copy, DRIVE_HEADER)["magic"][0] == DRIVE_MAGIC for copy in copies
    )


def make_header(geometry: Geometry) -> np.ndarray:
    """DRIVE_HEADER [1] of a new drive."""
    header = np.zeros(1, DRIVE_HEADER)
    header["format_version"] = FORMAT_VERSION
    header["magic"] = DRIVE_MAGIC
    header["uuid"] = os.urandom(16)
    header["created_ns"] = time.time_ns()
    for name, value in (vars(geometry) | _places(geometry)).items():
        header[name] = value
    header["crc32c"] = crc32c_records(header)
    return header


def _places(geometry: Geometry) -> dict[str, int]:
    """The header's fields that follow from its geometry."""
    table_start = HEADERS_BYTES
    oob_start = round_up(table_start + geometry.num_erase_blocks * ERASE_BLOCK.itemsize, BLOCK_BYTES)
    oob_stride = round_up(geometry.pages_per_superblock * PAGE_OOB.itemsize, BLOCK_BYTES)
    return {
        "num_lbas": num_lbas(geometry),
        "erase_block_table_start": table_start,
        "oob_start": oob_start,
        "oob_stride": oob_stride,
        "data_start": round_up(oob_start + oob_stride * geometry.num_superblocks, DATA_ALIGNMENT),
    }


def _geometry(header: np.ndarray) -> Geometry:
    return Geometry(**{name: int(header[name][0]) for name in Geometry.__dataclass_fields__})


def _what_is_wrong(header: np.ndarray) -> str | None:
    """Why a copy of the header cannot be used; None if it can. Raises FormatVersionTooNew."""
    if header["magic"][0] != DRIVE_MAGIC:
        return "no kvfs header"
    if header["crc32c"][0] != crc32c_records(header)[0]:
        return "the header is damaged"
    version = int(header["format_version"][0])
    if version > FORMAT_VERSION:
        raise FormatVersionTooNew(version, FORMAT_VERSION)
    if version < FORMAT_VERSION:
        return f"format version {version} is not supported any more"
    try:
        expected = _places(_geometry(header))
    except ValueError as error:
        return f"impossible geometry: {error}"
    for name, value in expected.items():
        if int(header[name][0]) != value:
            return f"the header's {name} does not fit its geometry"
    return None


def _from_header(header: np.ndarray) -> DriveLayout:
    return DriveLayout(
        header=header.tobytes(),
        geometry=_geometry(header),
        uuid=header["uuid"][0].tobytes(),
        table_start=int(header["erase_block_table_start"][0]),
        oob_start=int(header["oob_start"][0]),
        oob_stride=int(header["oob_stride"][0]),
        data_start=int(header["data_start"][0]),
    )


def new_table(geometry: Geometry) -> np.ndarray:
    """ERASE_BLOCK [num_superblocks, num_planes] of a new drive."""
    table = np.zeros((geometry.num_superblocks, geometry.num_planes), ERASE_BLOCK)
    table["crc32c"] = erase_block_crc32c(table)
    return table


def erase_block_crc32c(table: np.ndarray, first_superblock: int = 0) -> np.ndarray:
    """uint32 [n, num_planes]: the checksums that ERASE_BLOCK [n, num_planes] of consecutive superblocks should
    have: over count, flags and the erase block's number, so that a record in another's place does not pass."""
    numbered = np.empty(table.shape, [("erase_count", "<u4"), ("flags", "<u4"), ("erase_block", "<u8")])
    for name in ("erase_count", "flags"):
        numbered[name] = table[name]
    numbered["erase_block"] = np.arange(table.size).reshape(table.shape) + first_superblock * table.shape[1]
    return crc32c_pages(dma.page_addresses(numbered, numbered.itemsize), numbered.itemsize).reshape(table.shape)


def damaged_erase_blocks(table: np.ndarray) -> np.ndarray:
    """bool [num_superblocks, num_planes]: records of a drive's table that are not whole."""
    return (table["crc32c"] != erase_block_crc32c(table)) | (table["reserved"] != 0)
