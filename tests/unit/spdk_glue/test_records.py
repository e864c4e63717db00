"""Records and builders against the bytes that the NVMe specifications draw."""

import re
from itertools import pairwise

import numpy as np
import pytest

from spdk_glue import command, identify, vendor_command
from spdk_glue.command import AdminOpcode, Direction, IoOpcode, direction
from spdk_glue.vendor_command import KvDtype

SIZES = [
    (command.SUBMISSION_ENTRY, 64),
    (command.COMPLETION_ENTRY, 16),
    (command.DATASET_RANGE, 16),
    (command.ZONE_REPORT_HEADER, 64),
    (command.ZONE_DESCRIPTOR, 64),
    (identify.NAMESPACE_DESCRIPTOR, 4),
    (identify.LBA_FORMAT_EXTENSION, 16),
    (identify.IDENTIFY_ZONED_NAMESPACE, 4096),
    (command.HANDLE_STATUS_HEADER, 16),
    (command.HANDLE_STATUS_DESCRIPTOR, 32),
    (identify.IDENTIFY_CONTROLLER, 4096),
    (identify.IDENTIFY_NAMESPACE, 4096),
    (identify.LBA_FORMAT, 4),
    (identify.SMART_LOG, 512),
    (identify.ERROR_LOG_ENTRY, 64),
    (identify.ATTENTION_CAPABILITIES, 80),
    (vendor_command.ATTENTION_HEADER, 64),
    (vendor_command.ATTENTION_ITEM, 32),
    (vendor_command.GROUP_EXTENT, 16),
    (vendor_command.TOKEN_RANGE, 8),
    (vendor_command.ANSWER_HEADER, 48),
    (vendor_command.SEAL_HEADER, 32),
]

# field: (byte offset, bytes)
LAYOUTS = {
    "SUBMISSION_ENTRY": (
        command.SUBMISSION_ENTRY,
        {
            "opcode": (0, 1),
            "flags": (1, 1),
            "cid": (2, 2),
            "nsid": (4, 4),
            "cdw2": (8, 4),
            "cdw3": (12, 4),
            "mptr": (16, 8),
            "dptr": (24, 16),
            "cdw10": (40, 4),
            "cdw11": (44, 4),
            "cdw12": (48, 4),
            "cdw13": (52, 4),
            "cdw14": (56, 4),
            "cdw15": (60, 4),
        },
    ),
    "COMPLETION_ENTRY": (
        command.COMPLETION_ENTRY,
        {"cdw0": (0, 4), "cdw1": (4, 4), "sqhd": (8, 2), "sqid": (10, 2), "cid": (12, 2), "status": (14, 2)},
    ),
    "DATASET_RANGE": (
        command.DATASET_RANGE,
        {"attributes": (0, 4), "num_lbas": (4, 4), "first_lba": (8, 8)},
    ),
    "HANDLE_STATUS_HEADER": (command.HANDLE_STATUS_HEADER, {"num_descriptors": (14, 2)}),
    "HANDLE_STATUS_DESCRIPTOR": (
        command.HANDLE_STATUS_DESCRIPTOR,
        {
            "placement_id": (0, 2),
            "handle": (2, 2),
            "active_reclaim_unit_time": (4, 4),
            "available_lbas": (8, 8),
        },
    ),
    "ZONE_REPORT_HEADER": (command.ZONE_REPORT_HEADER, {"num_zones": (0, 8)}),
    "ZONE_DESCRIPTOR": (
        command.ZONE_DESCRIPTOR,
        {
            "type": (0, 1),
            "state": (1, 1),
            "attributes": (2, 1),
            "attributes_information": (3, 1),
            "capacity": (8, 8),
            "first_lba": (16, 8),
            "write_pointer": (24, 8),
        },
    ),
    "NAMESPACE_DESCRIPTOR": (identify.NAMESPACE_DESCRIPTOR, {"type": (0, 1), "length": (1, 1)}),
    "LBA_FORMAT_EXTENSION": (identify.LBA_FORMAT_EXTENSION, {"zsze": (0, 8), "zdes": (8, 1)}),
    "IDENTIFY_ZONED_NAMESPACE": (
        identify.IDENTIFY_ZONED_NAMESPACE,
        {"zoc": (0, 2), "ozcs": (2, 2), "mar": (4, 4), "mor": (8, 4), "lbafe": (2816, 1024)},
    ),
    "IDENTIFY_CONTROLLER": (
        identify.IDENTIFY_CONTROLLER,
        {
            "vid": (0, 2),
            "sn": (4, 20),
            "mn": (24, 40),
            "fr": (64, 8),
            "rab": (72, 1),
            "ieee": (73, 3),
            "cmic": (76, 1),
            "mdts": (77, 1),
            "cntlid": (78, 2),
            "ver": (80, 4),
            "rtd3r": (84, 4),
            "oaes": (92, 4),
            "ctratt": (96, 4),
            "cntrltype": (111, 1),
            "oacs": (256, 2),
            "acl": (258, 1),
            "aerl": (259, 1),
            "frmw": (260, 1),
            "lpa": (261, 1),
            "elpe": (262, 1),
            "npss": (263, 1),
            "wctemp": (266, 2),
            "cctemp": (268, 2),
            "hmpre": (272, 4),
            "tnvmcap": (280, 8),
            "unvmcap": (296, 8),
            "kas": (320, 2),
            "sanicap": (328, 4),
            "sqes": (512, 1),
            "cqes": (513, 1),
            "maxcmd": (514, 2),
            "nn": (516, 4),
            "oncs": (520, 2),
            "fuses": (522, 2),
            "fna": (524, 1),
            "vwc": (525, 1),
            "awun": (526, 2),
            "awupf": (528, 2),
            "nwpc": (531, 1),
            "sgls": (536, 4),
            "mnan": (540, 4),
            "subnqn": (768, 256),
            "attention": (3072, 80),
        },
    ),
    "IDENTIFY_NAMESPACE": (
        identify.IDENTIFY_NAMESPACE,
        {
            "nsze": (0, 8),
            "ncap": (8, 8),
            "nuse": (16, 8),
            "nsfeat": (24, 1),
            "nlbaf": (25, 1),
            "flbas": (26, 1),
            "mc": (27, 1),
            "dpc": (28, 1),
            "dps": (29, 1),
            "nmic": (30, 1),
            "rescap": (31, 1),
            "fpi": (32, 1),
            "dlfeat": (33, 1),
            "nawun": (34, 2),
            "nawupf": (36, 2),
            "nacwu": (38, 2),
            "noiob": (46, 2),
            "nvmcap": (48, 8),
            "npwg": (64, 2),
            "npwa": (66, 2),
            "npdg": (68, 2),
            "npda": (70, 2),
            "nows": (72, 2),
            "nsattr": (99, 1),
            "nvmsetid": (100, 2),
            "endgid": (102, 2),
            "nguid": (104, 16),
            "eui64": (120, 8),
            "lbaf": (128, 64),
        },
    ),
    "LBA_FORMAT": (identify.LBA_FORMAT, {"ms": (0, 2), "lbads": (2, 1), "rp": (3, 1)}),
    "SMART_LOG": (
        identify.SMART_LOG,
        {
            "critical_warning": (0, 1),
            "temperature_kelvin": (1, 2),
            "available_spare": (3, 1),
            "available_spare_threshold": (4, 1),
            "percentage_used": (5, 1),
            "endurance_group_warning": (6, 1),
            "data_units_read": (32, 8),
            "data_units_written": (48, 8),
            "host_read_commands": (64, 8),
            "host_write_commands": (80, 8),
            "controller_busy_minutes": (96, 8),
            "power_cycles": (112, 8),
            "power_on_hours": (128, 8),
            "unsafe_shutdowns": (144, 8),
            "media_errors": (160, 8),
            "num_error_log_entries": (176, 8),
            "warning_temperature_minutes": (192, 4),
            "critical_temperature_minutes": (196, 4),
            "temperature_sensors_kelvin": (200, 16),
            "thermal_transitions": (216, 8),
            "thermal_seconds": (224, 8),
        },
    ),
    "ERROR_LOG_ENTRY": (
        identify.ERROR_LOG_ENTRY,
        {
            "error_count": (0, 8),
            "sqid": (8, 2),
            "cid": (10, 2),
            "status": (12, 2),
            "lba": (16, 8),
            "nsid": (24, 4),
            "opcode": (31, 1),
        },
    ),
    # spdk_glue/FORMAT.md
    "ATTENTION_HEADER": (
        vendor_command.ATTENTION_HEADER,
        {"magic": (0, 4), "num_items": (8, 4), "num_layers": (24, 2), "dtype": (36, 1), "scale": (40, 4)},
    ),
    "SEAL_HEADER": (
        vendor_command.SEAL_HEADER,
        {"magic": (0, 4), "version": (4, 2), "derive": (6, 2), "layer_lbas": (16, 4), "placement_id": (20, 4)},
    ),
}


@pytest.mark.parametrize(("record", "size"), SIZES)
def test_sizes(record, size):
    assert record.itemsize == size


@pytest.mark.parametrize("name", LAYOUTS)
def test_offsets(name):
    record, fields = LAYOUTS[name]
    for field, (offset, size) in fields.items():
        form, found = record.fields[field][:2]
        assert (field, found, form.itemsize) == (field, offset, size)


@pytest.mark.parametrize("record", [record for record, _ in SIZES])
def test_fields_do_not_overlap(record):
    """A field placed over another: one of them is overwritten when a record is filled."""
    spans = sorted((offset, offset + form.itemsize) for form, offset, *_ in record.fields.values())
    for (_, stop), (start, _) in pairwise(spans):
        assert stop <= start
    assert spans[-1][1] <= record.itemsize


def test_magics_spell_names():
    assert vendor_command.ATTENTION_MAGIC.to_bytes(4, "little") == b"KVAT"
    assert vendor_command.SEAL_MAGIC.to_bytes(4, "little") == b"KVSL"
    assert len(identify.CAPABILITIES_SIGNATURE) == 8


def raw(entry):
    return entry.tobytes()


def dwords(entry, first=10, count=4):
    return np.frombuffer(raw(entry), "<u4")[first : first + count].tolist()


@pytest.mark.parametrize(
    ("first_lba", "num_lbas"), [(0, 1), (5, 65536), ((1 << 40) + 3, 8), ((1 << 64) - 1, 1)]
)
def test_read_and_write(first_lba, num_lbas):
    """SLBA is CDW10 and 11, NLB (minus one) CDW12[15:0]; a hint is directive type 2 with CDW13[31:16]."""
    low, high = first_lba & 0xFFFFFFFF, first_lba >> 32
    entry = command.read(first_lba, num_lbas)
    assert raw(entry)[0] == 0x02
    assert dwords(entry) == [low, high, num_lbas - 1, 0]
    entry = command.write(first_lba, num_lbas, placement_id=9)
    assert raw(entry)[0] == 0x01
    assert dwords(entry) == [low, high, 2 << 20 | num_lbas - 1, 9 << 16]
    assert dwords(entry, first=1, count=1) == [1]


def test_arrays_of_ranges():
    """One entry per range, the same as one by one."""
    lbas, counts = [3, (1 << 40) + 1, (1 << 64) - 1], [1, 65536, 2]
    for builder, hints in ((command.read, {}), (command.write, {"placement_id": 4})):
        one_by_one = [builder(*each, **hints) for each in zip(lbas, counts, strict=True)]
        assert builder(lbas, counts, **hints).tobytes() == np.concatenate(one_by_one).tobytes()
        with pytest.raises(ValueError, match="1 to 65536"):
            builder(lbas, [1, 65537, 1], **hints)


@pytest.mark.parametrize("num_lbas", [0, -1, 65537])
def test_block_count_limits(num_lbas):
    for builder in (command.read, command.write):
        with pytest.raises(ValueError, match="1 to 65536"):
            builder(0, num_lbas)


@pytest.mark.parametrize("num_ranges", [1, 256])
def test_deallocate(num_ranges):
    entry = command.deallocate(num_ranges)
    assert raw(entry)[0] == 0x09
    assert dwords(entry) == [num_ranges - 1, 4, 0, 0]


@pytest.mark.parametrize("num_ranges", [0, 257])
def test_range_count_limits(num_ranges):
    with pytest.raises(ValueError, match="1 to 256"):
        command.deallocate(num_ranges)


def test_flush_and_identify():
    assert raw(command.flush()) == bytes([0, 0, 0, 0, 1]) + bytes(59)
    entry = command.identify(identify.Cns.CONTROLLER)
    assert (raw(entry)[0], dwords(entry, first=1, count=1), dwords(entry)) == (0x06, [0], [1, 0, 0, 0])
    assert dwords(command.identify(identify.Cns.NAMESPACE, nsid=3), first=1, count=1) == [3]


@pytest.mark.parametrize(
    ("size", "offset", "expected"),
    [
        (512, 0, [0xC0 | 127 << 16, 0, 0, 0]),
        (4, 8, [0xC0, 0, 8, 0]),
        ((65536 + 2) * 4, (3 << 32) + 4, [0xC0 | 1 << 16, 1, 4, 3]),  # NUMDU, LPOU
    ],
)
def test_get_log_page(size, offset, expected):
    entry = command.get_log_page(0xC0, size, offset)
    assert raw(entry)[0] == 0x02
    assert dwords(entry) == expected
    assert dwords(entry, first=1, count=1) == [0xFFFFFFFF]


def test_vendor():
    entry = command.vendor(IoOpcode.ATTENTION_FETCH, 0xFFFFFFFF, num_pages=65536)
    assert raw(entry)[0] == 0x82
    assert dwords(entry) == [0xFFFFFFFF, 0, 65535, 0]


DIRECTIONS = {
    Direction.NONE: [IoOpcode.FLUSH, IoOpcode.ATTENTION_CANCEL],
    Direction.HOST_TO_DRIVE: [
        IoOpcode.WRITE,
        IoOpcode.DATASET_MANAGEMENT,
        IoOpcode.ATTENTION_SUBMIT,
        IoOpcode.SEAL_GROUPS,
    ],
    Direction.DRIVE_TO_HOST: [
        IoOpcode.READ,
        IoOpcode.ATTENTION_FETCH,
        AdminOpcode.IDENTIFY,
        AdminOpcode.GET_LOG_PAGE,
    ],
}


def test_directions():
    """Opcode bits 1:0 say which way data move; a wrong one and no fabric would carry them."""
    for way, opcodes in DIRECTIONS.items():
        for opcode in opcodes:
            assert direction(opcode) == way


@pytest.mark.parametrize(
    ("page_size", "head_dim", "dtype", "group_tokens", "per_page", "pages"),
    [
        (4096, 128, KvDtype.FLOAT16, 256, 16, 16),
        (4096, 80, KvDtype.FLOAT16, 256, 25, 11),
        (4096, 256, KvDtype.FLOAT32, 16, 4, 4),
        (65536, 64, KvDtype.BFLOAT16, 256, 512, 1),
    ],
)
def test_pages_of_a_head(page_size, head_dim, dtype, group_tokens, per_page, pages):
    assert vendor_command.tokens_per_page(page_size, head_dim, dtype) == per_page
    assert vendor_command.pages_per_head(page_size, head_dim, dtype, group_tokens) == pages


def test_answer_bytes():
    assert vendor_command.answer_bytes(0, 1, 8, 64) == 48
    assert vendor_command.answer_bytes(2, 3, 8, 64) == 48 + 4 * (2 * 3 * 8 * 64) + 4 * (2 * 3 * 8)


def test_dtype_names():
    for dtype in KvDtype:
        name = vendor_command.DTYPE_NAME[dtype]
        assert vendor_command.DTYPE_OF_NAME[name] is dtype
        assert int(re.search(r"\d+", name)[0]) == vendor_command.ITEM_BITS[dtype]


def test_data_placement():
    """Get Features names feature 1Dh and the endurance group; I/O Management Receive counts dwords from 0."""
    entry = command.get_features(command.Feature.FLEXIBLE_DATA_PLACEMENT, 7)
    assert (raw(entry)[0], dwords(entry, count=2)) == (0x0A, [0x1D, 7])
    entry = command.reclaim_unit_handle_status(16 + 3 * 32)
    assert (raw(entry)[0], dwords(entry, count=2)) == (0x12, [1, 27])


def test_zones():
    """Zone Management names a zone by its first LBA; Receive counts dwords from 0 and asks for what fits."""
    first_lba = (3 << 32) + 9
    entry = command.manage_zone(first_lba, command.ZoneAction.RESET)
    assert (raw(entry)[0], dwords(entry)) == (0x79, [9, 3, 0, 4])
    assert dwords(command.manage_zone(0, command.ZoneAction.FINISH)) == [0, 0, 0, 2]
    entry = command.report_zones(first_lba, 64 + 5 * 64)
    assert (raw(entry)[0], dwords(entry)) == (0x7A, [9, 3, 95, 1 << 16])
    entry = command.identify(identify.Cns.COMMAND_SET_NAMESPACE, 1, command.CommandSet.ZONED)
    assert (raw(entry)[0], dwords(entry, count=2)) == (0x06, [5, 2 << 24])
