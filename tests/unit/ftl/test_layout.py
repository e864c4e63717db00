"""Records on flash: the bytes that FORMAT.md draws. A drive written today must open tomorrow."""

import numpy as np
import pytest

from ftl import layout
from ftl.direct_io.api import crc32c_pages, crc32c_records, use_software_crc32c
from ftl.layout import BLOCK_BYTES, DEALLOCATION, DRIVE_HEADER, ERASE_BLOCK, LOG_HEADER, PAGE_OOB
from spdk_glue import dma

# field: (byte offset, bytes)
LAYOUTS = {
    "PAGE_OOB": (
        PAGE_OOB,
        64,
        {
            "magic": (0, 4),
            "oob_crc32c": (4, 4),
            "payload_crc32c": (8, 4),
            "kind": (12, 1),
            "stream": (13, 1),
            "lba": (16, 8),
            "sequence_number": (24, 8),
            "program_number": (32, 8),
            "durable_program_number": (40, 8),
            "xor_kind": (14, 1),
            "xor_stream": (15, 1),
            "session": (48, 4),
            "member_dies": (52, 4),
            "xor_program_number": (56, 4),
            "members_check": (60, 4),
        },
    ),
    "LOG_HEADER": (
        LOG_HEADER,
        64,
        {
            "magic": (0, 4),
            "num_records": (4, 4),
            "part": (8, 4),
            "num_parts": (12, 4),
            "snapshot_sequence_number": (16, 8),
        },
    ),
    "DEALLOCATION": (DEALLOCATION, 24, {"lba": (0, 8), "num_lbas": (8, 8), "sequence_number": (16, 8)}),
    "DRIVE_HEADER": (
        DRIVE_HEADER,
        4096,
        {
            "format_version": (0, 4),
            "crc32c": (4, 4),
            "magic": (8, 8),
            "uuid": (16, 16),
            "created_ns": (32, 8),
            "page_size": (40, 4),
            "num_channels": (44, 4),
            "dies_per_channel": (48, 4),
            "planes_per_die": (52, 4),
            "pages_per_erase_block": (56, 4),
            "spare_percent": (60, 4),
            "num_superblocks": (64, 8),
            "num_lbas": (72, 8),
            "erase_block_table_start": (80, 8),
            "oob_start": (88, 8),
            "oob_stride": (96, 8),
            "data_start": (104, 8),
            "parity": (112, 4),
        },
    ),
    "ERASE_BLOCK": (ERASE_BLOCK, 16, {"erase_count": (0, 4), "flags": (4, 4), "crc32c": (8, 4)}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_offsets(name):
    record, size, wanted = LAYOUTS[name]
    assert record.itemsize == size
    for field, (offset, length) in wanted.items():
        form, found = record.fields[field][:2]
        assert (field, found, form.itemsize) == (field, offset, length)
    # what FORMAT.md does not name is reserved
    assert all(field in wanted or field.startswith("reserved") for field in record.names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_little_endian_without_gaps(name):
    record = LAYOUTS[name][0]
    end = 0
    for field in record.names:
        form, offset = record.fields[field][:2]
        assert offset == end
        assert form.str[0] in "<|"
        end += form.itemsize
    assert end == record.itemsize


def test_magics():
    assert layout.OOB_MAGIC.to_bytes(4, "little") == b"KVKP"
    assert layout.LOG_MAGIC.to_bytes(4, "little") == b"KVLG"
    assert layout.DRIVE_MAGIC.to_bytes(8, "little") == b"1KVSFRVD"


def test_numbers():
    """What old drives hold: none of these may change."""
    assert {kind.name: int(kind) for kind in layout.PageKind} == {
        "DATA": 1,
        "DEALLOCATE": 2,
        "MAPPING_SNAPSHOT": 3,
        "PARITY": 4,
        "CHECKPOINT": 5,
        "SESSIONS": 6,
    }
    assert (layout.FORMAT_VERSION, layout.ERASE_BLOCK_BAD, layout.BLOCK_BYTES) == (2, 1, 4096)
    assert np.iinfo(np.uint64).max == layout.LBA_NONE
    assert BLOCK_BYTES % PAGE_OOB.itemsize == BLOCK_BYTES % ERASE_BLOCK.itemsize == 0


def crc32c(data: bytes) -> int:
    """The definition, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_crc32c_definition():
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(("record", "field"), [(PAGE_OOB, "oob_crc32c"), (DRIVE_HEADER, "crc32c")])
def test_records_that_carry_a_checksum(record, field):
    """Over the whole record with bytes 4..7 zero."""
    records = np.random.default_rng(3).integers(0, 256, (3, record.itemsize), np.uint8).view(record).reshape(-1)
    records[field] = 0
    wanted = [crc32c(one.tobytes()) for one in records]
    records[field] = wanted  # must not matter
    assert crc32c_records(records).tolist() == wanted


@pytest.mark.parametrize("is_software", [False, True])
@pytest.mark.parametrize("size", [512, 4096, 8192])
def test_checksums_of_pages(size, is_software):
    """However many pages come together, and however long: some ways of computing are for some of these."""
    data = np.random.default_rng(size).integers(0, 256, (9, size), np.uint8)
    wanted = [crc32c(page.tobytes()) for page in data]
    addresses = dma.page_addresses(data, size)
    use_software_crc32c(is_software)
    try:
        for count in range(1, 10):
            assert crc32c_pages(addresses[:count], size).tolist() == wanted[:count]
    finally:
        use_software_crc32c(False)
