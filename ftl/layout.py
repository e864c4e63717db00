"""Every record that the drive keeps on flash, declared once. FORMAT.md beside this draws them.

All fields are little-endian. Records with `crc32c` keep it in bytes 4..7 and compute it over the whole
record with that field zero.
"""

from enum import IntEnum

import numpy as np

FORMAT_VERSION = 2
# Everything the file holds besides pages starts on such a boundary, so that direct I/O reaches it.
BLOCK_BYTES = 4096

OOB_MAGIC = 0x504B564B  # "KVKP"
LBA_NONE = 0xFFFF_FFFF_FFFF_FFFF


class PageKind(IntEnum):
    """What a programmed page holds. All but DATA are pages of the metadata log."""

    DATA = 1
    DEALLOCATE = 2  # ranges deallocated; with none, a mark that carries a durable_program_number
    MAPPING_SNAPSHOT = 3  # every unmapped range: what the log said before is superseded
    PARITY = 4  # XOR of the other pages of its group in a row: see parity.py
    CHECKPOINT = 5  # a piece of the map
    SESSIONS = 6  # what was durable of earlier sessions, whose own pages that say so may be gone


PAGE_OOB = np.dtype(
    [
        ("magic", "<u4"),  # OOB_MAGIC; 0 on a page that was never programmed
        ("oob_crc32c", "<u4"),  # of this record
        ("payload_crc32c", "<u4"),  # of the page
        ("kind", "u1"),  # PageKind
        ("stream", "u1"),  # placement stream it was written in
        # On parity pages the XOR of their members' fields, as in `lba` and `sequence_number`; else zero.
        ("xor_kind", "u1"),
        ("xor_stream", "u1"),
        ("lba", "<u8"),  # LBA_NONE on metadata
        ("sequence_number", "<u8"),  # version of the data: the highest per LBA counts; copies keep it
        ("program_number", "<u8"),  # grows with every page programmed
        # Every page of this session with a program number up to this one was on stable media before this
        # page was programmed.
        ("durable_program_number", "<u8"),
        ("session", "<u4"),  # one number per opening of the drive that changed it
        ("member_dies", "<u4"),  # of a parity page: a bit per die with a member
        ("xor_program_number", "<u4"),  # the lower halves
        ("members_check", "<u4"),  # of a parity page: XOR over the members of a hash of what each is
    ]
)
assert PAGE_OOB.itemsize == 64

MAX_DISTANCE = 0xFFFF

# The same bytes on a data page of a drive without parity: the page before it in its superblock.
PREVIOUS_PAGE = np.dtype(
    {
        # lba_plus_1: 0 for none, or not known; version: the lower half of its sequence_number; distance: how
        # much lower its program_number is, MAX_DISTANCE at most, or 0 where that was not kept
        "names": ["lba_plus_1", "version", "distance"],
        "formats": ["<u8", "<u4", "<u2"],
        "offsets": [52, 60, 14],
        "itemsize": PAGE_OOB.itemsize,
    }
)

LOG_MAGIC = 0x474C564B  # "KVLG"

# Start of the payload of every metadata page; `num_records` DEALLOCATION records follow.
LOG_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("num_records", "<u4"),
        ("part", "<u4"),  # of a snapshot of num_parts pages; it counts only when all are there
        ("num_parts", "<u4"),
        ("snapshot_sequence_number", "<u8"),  # log records below it are superseded
        ("reserved", "V40"),
    ]
)
assert LOG_HEADER.itemsize == 64

# Versions of these LBAs below sequence_number are dead.
DEALLOCATION = np.dtype([("lba", "<u8"), ("num_lbas", "<u8"), ("sequence_number", "<u8")])

# In the place of a DEALLOCATION on a page of kind SESSIONS: pages of this session up to this one were durable.
SESSION = np.dtype([("session", "<u8"), ("reserved", "<u8"), ("durable_program_number", "<u8")])
assert SESSION.itemsize == DEALLOCATION.itemsize

CHECKPOINT_MAGIC = 0x5043564B  # "KVCP"

# Start of the payload of every checkpoint page.
CHECKPOINT_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("session", "<u4"),
        ("part", "<u4"),
        ("num_parts", "<u4"),
        ("sequence_number", "<u8"),  # the next one when the checkpoint was taken
        ("program_number", "<u8"),  # all up to it were durable and are in the map
        ("payload_bytes", "<u8"),  # of all parts together
        ("reserved", "V24"),
    ]
)
assert CHECKPOINT_HEADER.itemsize == 64

# What a checkpoint knows of each superblock; all zero where it held nothing.
CHECKPOINT_SUPERBLOCK = np.dtype(
    [
        ("first_program_number", "<u8"),  # of the first page on a good block: tells one life from the next
        ("newest_program_number", "<u8"),
        ("fill", "<u4"),
        ("is_closed", "u1"),  # nothing was programmed in it after the checkpoint
        ("reserved", "V3"),
    ]
)
assert CHECKPOINT_SUPERBLOCK.itemsize == 24

ZONE_RECORD_MAGIC = 0x525A564B  # "KVZR"
ZONE_EXTENTS_MAX = 252

# On a zoned namespace, of what is not pages: what a record says of blocks that follow each other.
ZONE_EXTENT = np.dtype([("first_block", "<u8"), ("num_blocks", "<u4"), ("is_zero", "<u4")])
assert ZONE_EXTENT.itemsize == 16

# The block that starts a record; the blocks of its extents follow, in their order, but for those that are zero.
ZONE_RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("crc32c", "<u4"),
        ("sequence_number", "<u8"),  # of two records with a block the one with the higher number counts
        ("place", "<u8"),  # where this record is, in blocks of the namespace
        ("previous", "<u8"),  # where the one before it in this zone is; its own place in the first
        ("num_blocks", "<u4"),  # that follow
        ("blocks_crc32c", "<u4"),  # of all of them
        ("num_zones", "<u4"),  # of the namespace's first zones, that hold such records
        ("num_extents", "<u4"),
        ("space_blocks", "<u8"),  # blocks that there are to name
        ("is_copy", "<u4"),  # 1: of what lies in a zone that is being emptied
        ("reserved", "V4"),
        ("extents", ZONE_EXTENT, ZONE_EXTENTS_MAX),
    ]
)
assert ZONE_RECORD.itemsize == BLOCK_BYTES

DRIVE_MAGIC = 0x4456_5246_5356_4B00 | 0x31  # "1KVSFRVD" read as a little-endian u8

DRIVE_HEADER = np.dtype(
    [
        ("format_version", "<u4"),
        ("crc32c", "<u4"),
        ("magic", "<u8"),
        ("uuid", "V16"),
        ("created_ns", "<u8"),  # Unix time
        ("page_size", "<u4"),
        ("num_channels", "<u4"),
        ("dies_per_channel", "<u4"),
        ("planes_per_die", "<u4"),
        ("pages_per_erase_block", "<u4"),
        ("spare_percent", "<u4"),
        ("num_superblocks", "<u8"),
        ("num_lbas", "<u8"),
        ("erase_block_table_start", "<u8"),  # byte offsets in the file
        ("oob_start", "<u8"),
        ("oob_stride", "<u8"),  # bytes of OOB per superblock, a multiple of BLOCK_BYTES
        ("data_start", "<u8"),
        ("parity", "<u4"),
        ("reserved", "V3980"),
    ]
)
assert DRIVE_HEADER.itemsize == BLOCK_BYTES

# Of each erase block.
ERASE_BLOCK = np.dtype(
    [
        ("erase_count", "<u4"),
        ("flags", "<u4"),  # ERASE_BLOCK_BAD
        ("crc32c", "<u4"),  # of erase_count, flags and the erase block's number, u64
        ("reserved", "<u4"),  # zero
    ]
)
ERASE_BLOCK_BAD = 1  # factory or grown: not programmed or erased any more
assert BLOCK_BYTES % ERASE_BLOCK.itemsize == 0
