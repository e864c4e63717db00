"""Identify data structures and log pages as record types.

Only the fields that kvfs fills, reads or shows are named; the offsets are the specification's, so any NVMe host
can read them. Source: NVM Express Base Specification 2.0, figures 275 (Identify Controller), 202 (SMART), 198
(Error Information); NVM Command Set Specification 1.0, figure 97 (Identify Namespace); Zoned Namespace
Command Set Specification 1.1 (Identify Namespace of that command set).
"""

from enum import IntEnum

import numpy as np


class Cns(IntEnum):
    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03
    COMMAND_SET_NAMESPACE = 0x05
    COMMAND_SET_CONTROLLER = 0x06
    INDEPENDENT_NAMESPACE = 0x08  # of any command set
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11
    NAMESPACE_CONTROLLERS = 0x12
    CONTROLLERS = 0x13


class LogPage(IntEnum):
    SUPPORTED_LOG_PAGES = 0x00
    ERROR_INFORMATION = 0x01
    SMART = 0x02
    FIRMWARE_SLOTS = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMANDS_SUPPORTED = 0x05
    FLASH_HEALTH = 0xC0  # vendor: what the flash translation layer did
    ATTENTION_COUNTERS = 0xC1  # vendor: what the attention unit did
    SUPERBLOCKS = 0xC2  # vendor: a SUPERBLOCK_RECORD for each
    FLASH_CHECK = 0xC3  # vendor: what the latest check of map against flash found
    LATENCY = 0xC4  # vendor: histograms of what the drive's work took, probes.LATENCY_RECORD


def _record(size_bytes: int, fields: dict[str, tuple[int, str]]) -> np.dtype:
    """A record type of `size_bytes` with named fields at given offsets."""
    return np.dtype(
        {
            "names": list(fields),
            "formats": [form for _, form in fields.values()],
            "offsets": [offset for offset, _ in fields.values()],
            "itemsize": size_bytes,
        }
    )


VENDOR_AREA_OFFSET = 3072

# What a kvfs drive says of itself in Identify Controller's vendor area. The host goes by this alone.
ATTENTION_CAPABILITIES = np.dtype(
    [
        ("signature", "S8"),  # CAPABILITIES_SIGNATURE, or the drive has no attention unit
        ("version", "<u4"),
        ("dtype_mask", "<u4"),  # bit i: KvDtype i
        ("max_items", "<u4"),
        ("max_queries", "<u4"),
        ("max_group_size", "<u4"),
        ("head_dim_min", "<u4"),
        ("head_dim_max", "<u4"),
        ("max_transfer_bytes", "<u4"),  # of a descriptor or an answer
        ("max_tickets", "<u4"),
        ("num_workers", "<u4"),
        ("num_placement_ids", "<u4"),  # streams that hints can tell apart
        ("worker", "S16"),
        # A descriptor of at most so many bytes: its Fetch may follow it on its queue at once. 0: it may not.
        ("one_flight_bytes", "<u4"),
        ("sparse_methods", "<u4"),  # bit i: SparseMethod i; a drive without these has none
        ("descriptor_flags", "<u4"),  # that it takes; 0 of a drive that is older than EXACT_IF_CACHED
    ]
)
CAPABILITIES_SIGNATURE = b"KVFSATTN"

IDENTIFY_CONTROLLER = _record(
    4096,
    {
        "vid": (0, "<u2"),  # PCI vendor, 0 for a drive without PCI
        "ssvid": (2, "<u2"),  # PCI subsystem vendor
        "sn": (4, "S20"),
        "mn": (24, "S40"),
        "fr": (64, "S8"),
        "rab": (72, "u1"),  # recommended arbitration burst, 2**rab commands
        "ieee": (73, ("u1", 3)),  # OUI, least significant byte first
        "cmic": (76, "u1"),
        "mdts": (77, "u1"),  # maximum data transfer size, 2**mdts pages; 0 is no limit
        "cntlid": (78, "<u2"),
        "ver": (80, "<u4"),
        "rtd3r": (84, "<u4"),  # microseconds to resume from, and to enter, runtime D3
        "rtd3e": (88, "<u4"),
        "oaes": (92, "<u4"),
        "ctratt": (96, "<u4"),
        "cntrltype": (111, "u1"),
        "oacs": (256, "<u2"),
        "acl": (258, "u1"),  # Abort commands at once, less one
        "aerl": (259, "u1"),  # Asynchronous Event Requests at once, less one
        "frmw": (260, "u1"),
        "lpa": (261, "u1"),
        "elpe": (262, "u1"),  # entries of the error log, less one
        "npss": (263, "u1"),  # power states, less one
        "wctemp": (266, "<u2"),  # kelvin; 0: not told
        "cctemp": (268, "<u2"),
        "hmpre": (272, "<u4"),  # host memory buffer wanted, and the least of use, in 4 KiB
        "hmmin": (276, "<u4"),
        "tnvmcap": (280, "<u8"),  # bytes of flash, and of them in no namespace: low halves of 128 bits
        "unvmcap": (296, "<u8"),
        "kas": (320, "<u2"),  # granularity of Keep Alive, 100 ms
        "sanicap": (328, "<u4"),
        "sqes": (512, "u1"),
        "cqes": (513, "u1"),
        "maxcmd": (514, "<u2"),
        "nn": (516, "<u4"),
        "oncs": (520, "<u2"),
        "fuses": (522, "<u2"),
        "fna": (524, "u1"),
        "vwc": (525, "u1"),
        "awun": (526, "<u2"),  # blocks written atomically, less one; awupf also in a power failure
        "awupf": (528, "<u2"),
        "nwpc": (531, "u1"),
        "sgls": (536, "<u4"),
        "mnan": (540, "<u4"),
        "subnqn": (768, "S256"),
        # fabrics
        "ioccsz": (1792, "<u4"),  # a command's capsule on an I/O queue, in 16 bytes, and an answer's
        "iorcsz": (1796, "<u4"),
        "icdoff": (1800, "<u2"),  # where the capsule's data start behind the entry, in 16 bytes
        "fcatt": (1802, "u1"),
        "msdbd": (1803, "u1"),  # SGL descriptors in a capsule at most
        "ofcs": (1804, "<u2"),
        "attention": (VENDOR_AREA_OFFSET, ATTENTION_CAPABILITIES),
    },
)
CONTROLLER_TYPE_IO = 1
CONTROLLER_TYPE_DISCOVERY = 2
CTRATT_FLEXIBLE_DATA_PLACEMENT = 1 << 19
OACS_GET_LBA_STATUS = 1 << 9
ONCS_DATASET_MANAGEMENT = 1 << 2
ONCS_VERIFY = 1 << 7
VWC_PRESENT = 1
FLBAS_FORMAT = 0xF  # bits of flbas: which of the LBA formats is in use

LBA_FORMAT = np.dtype([("ms", "<u2"), ("lbads", "u1"), ("rp", "u1")])
IDENTIFY_NAMESPACE = _record(
    4096,
    {
        "nsze": (0, "<u8"),
        "ncap": (8, "<u8"),
        "nuse": (16, "<u8"),
        "nsfeat": (24, "u1"),
        "nlbaf": (25, "u1"),
        "flbas": (26, "u1"),
        "mc": (27, "u1"),
        "dpc": (28, "u1"),
        "dps": (29, "u1"),
        "nmic": (30, "u1"),
        "rescap": (31, "u1"),
        "fpi": (32, "u1"),
        "dlfeat": (33, "u1"),
        "nawun": (34, "<u2"),
        "nawupf": (36, "<u2"),
        "nacwu": (38, "<u2"),
        "noiob": (46, "<u2"),  # blocks between boundaries that commands should not cross; 0: not told
        "nvmcap": (48, "<u8"),  # bytes of flash: low half of 128 bits
        # In blocks less one, where nsfeat says that they hold: what suits writes and deallocations best.
        "npwg": (64, "<u2"),
        "npwa": (66, "<u2"),
        "npdg": (68, "<u2"),
        "npda": (70, "<u2"),
        "nows": (72, "<u2"),
        "nsattr": (99, "u1"),
        "nvmsetid": (100, "<u2"),
        "endgid": (102, "<u2"),
        "nguid": (104, "V16"),
        "eui64": (120, "V8"),
        "lbaf": (128, (LBA_FORMAT, 16)),
    },
)
FLBAS_EXTENDED = 1 << 4  # metadata follow each block in the data
DEALLOCATED_READS_ZEROS = 1  # dlfeat, bits 2:0

# The namespace identification descriptor list: headers, `length` bytes after each, ended by type 0.
NAMESPACE_DESCRIPTOR = np.dtype([("type", "u1"), ("length", "u1"), ("reserved", "V2")])
NAMESPACE_DESCRIPTOR_COMMAND_SET = 4  # of one byte: the command set identifier

# Identify Namespace of the Zoned Namespace Command Set.
LBA_FORMAT_EXTENSION = np.dtype([("zsze", "<u8"), ("zdes", "u1"), ("reserved", "V7")])
IDENTIFY_ZONED_NAMESPACE = _record(
    4096,
    {
        "zoc": (0, "<u2"),
        "ozcs": (2, "<u2"),
        "mar": (4, "<u4"),  # active zones at once, minus one; ZONES_UNLIMITED
        "mor": (8, "<u4"),  # open zones at once, minus one; ZONES_UNLIMITED
        "lbafe": (2816, (LBA_FORMAT_EXTENSION, 64)),
    },
)
ZONES_UNLIMITED = 0xFFFFFFFF

WARNING_SPARE = 1 << 0
WARNING_READ_ONLY = 1 << 3
SMART_LOG = _record(
    512,
    {
        "critical_warning": (0, "u1"),  # WARNING_*
        "temperature_kelvin": (1, "<u2"),
        "available_spare": (3, "u1"),  # percent of what the drive had when it was made
        "available_spare_threshold": (4, "u1"),
        "percentage_used": (5, "u1"),  # mean erase count over rated cycles; more than 100 is allowed
        "endurance_group_warning": (6, "u1"),
        # 128-bit counters; the low half is enough for 2**64 units
        "data_units_read": (32, "<u8"),  # thousands of 512 bytes
        "data_units_written": (48, "<u8"),
        "host_read_commands": (64, "<u8"),
        "host_write_commands": (80, "<u8"),
        "controller_busy_minutes": (96, "<u8"),
        "power_cycles": (112, "<u8"),
        "power_on_hours": (128, "<u8"),
        "unsafe_shutdowns": (144, "<u8"),
        "media_errors": (160, "<u8"),
        "num_error_log_entries": (176, "<u8"),
        "warning_temperature_minutes": (192, "<u4"),
        "critical_temperature_minutes": (196, "<u4"),
        "temperature_sensors_kelvin": (200, ("<u2", 8)),  # 0: no such sensor
        "thermal_transitions": (216, ("<u4", 2)),  # into light and heavy throttling, and seconds spent there
        "thermal_seconds": (224, ("<u4", 2)),
    },
)

ERROR_LOG_ENTRY = _record(
    64,
    {
        "error_count": (0, "<u8"),  # 0: no entry
        "sqid": (8, "<u2"),
        "cid": (10, "<u2"),
        "status": (12, "<u2"),
        "lba": (16, "<u8"),  # LBA_UNKNOWN where the failure has none
        "nsid": (24, "<u4"),
        "opcode": (31, "u1"),
        "detail": (42, "S21"),  # in the specification's reserved bytes: a short text
    },
)
ERROR_LOG_ENTRIES = 64
LBA_UNKNOWN = 0xFFFFFFFFFFFFFFFF

WEAR_BINS = 32
FLASH_HEALTH_LOG = np.dtype(
    [
        ("version", "<u4"),
        ("num_channels", "<u4"),
        ("num_superblocks", "<u8"),
        ("free_superblocks", "<u8"),
        ("page_size", "<u8"),
        ("num_pages", "<u8"),
        ("mapped_pages", "<u8"),
        ("host_pages_written", "<u8"),
        ("host_pages_read", "<u8"),
        ("gc_pages_written", "<u8"),
        ("metadata_pages_written", "<u8"),
        ("media_pages_programmed", "<u8"),
        ("media_pages_read", "<u8"),
        ("superblocks_erased", "<u8"),
        ("media_syncs", "<u8"),
        ("corrupt_pages", "<u8"),
        ("erase_count_min", "<u8"),
        ("erase_count_max", "<u8"),
        ("erase_count_mean", "<f8"),
        ("wear_histogram", "<u8", WEAR_BINS),  # superblocks per equal bin of erase count, 0..erase_count_max
        # version 2
        ("wear_leveling_pages_written", "<u8"),  # of gc_pages_written
        ("parity_pages_written", "<u8"),
        ("padding_pages", "<u8"),  # left unwritten to complete a parity row
        ("repaired_pages", "<u8"),  # corrupt, and given back by parity
        ("program_failures", "<u8"),  # erase blocks
        ("erase_failures", "<u8"),
        ("num_erase_blocks", "<u8"),
        ("bad_erase_blocks", "<u8"),  # factory and grown
        ("open_superblocks", "<u8"),
        ("full_superblocks", "<u8"),
        ("log_superblocks", "<u8"),
        ("erasing_superblocks", "<u8"),
        ("quarantined_superblocks", "<u8"),  # hold a page that cannot be read
        ("bad_superblocks", "<u8"),
        ("damaged_superblocks", "<u8"),  # hold a page that only parity gives back
        ("rated_cycles", "<u8"),  # erases that a block is made for
        ("num_parity_dies", "<u8"),  # of each row: 0 or 1
        # Over the drive's whole life: pages programmed, and versions given (host pages and deallocations).
        ("lifetime_pages_programmed", "<u8"),
        ("lifetime_versions", "<u8"),
    ]
)

STREAM_COLLECTED = 0xFFFFFFFF  # what garbage collection has moved there, of all streams
SUPERBLOCK_RECORD = np.dtype(
    [
        ("state", "S12"),  # ftl.superblocks.State, in lower case
        ("bad_erase_blocks", "<u2"),
        ("is_damaged", "u1"),
        ("reserved", "u1"),
        ("valid_pages", "<u4"),
        ("capacity_pages", "<u4"),
        ("erase_count", "<u4"),
        ("newest_program_number", "<u8"),  # of the last page programmed: its age
        ("stream", "<u4"),  # plus one, whose pages it takes; 0: not known, or none; STREAM_COLLECTED
    ]
)
assert SUPERBLOCK_RECORD.itemsize == 40

# The FLASH_CHECK log page: a header, then up to MAX_FINDINGS records.
FLASH_CHECK_HEADER = np.dtype([("num_findings", "<u8"), ("num_records", "<u8")])
FLASH_FINDING = np.dtype(
    [
        ("kind", "S16"),  # ftl.check.Kind
        ("superblock", "<u8"),
        ("page", "<u8"),  # physical
        ("lba", "<u8"),
        ("expected", "<u8"),
        ("found", "<u8"),
    ]
)
assert FLASH_FINDING.itemsize == 56
MAX_FINDINGS = 1024
NOT_GIVEN = 0xFFFFFFFFFFFFFFFF  # in a FLASH_FINDING: the field says nothing

ATTENTION_COUNTERS_LOG = np.dtype(
    [
        ("version", "<u4"),
        ("num_workers", "<u4"),
        ("commands", "<u8"),
        ("cancelled", "<u8"),
        ("failed", "<u8"),
        ("items", "<u8"),
        ("pages_from_flash", "<u8"),
        ("pages_from_cache", "<u8"),
        ("kernel_ns", "<u8"),  # summed over workers
        ("command_ns", "<u8"),  # from submit to ticket done
        ("cache_bytes", "<u8"),
        ("cache_bytes_used", "<u8"),
        # version 2
        ("sparse_commands", "<u8"),
        ("index_pages", "<u8"),  # of sparse commands, as in ANSWER_HEADER
        ("chosen_pages", "<u8"),
        ("dense_pages", "<u8"),
        ("damaged_segments", "<u8"),  # each time that a command met one
        # version 3
        ("core_units", "<u8"),  # by cores that count their cycles: an FPGA's
        ("core_cycles", "<u8"),
        ("core_bytes", "<u8"),  # of K and V streamed to them
        ("fallback_units", "<u8"),  # that the worker left to another
        # version 4
        ("pages_read_ahead", "<u8"),  # from flash for commands to come: none of the numbers above has them
    ]
)
