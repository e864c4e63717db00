"""NVMe submission and completion queue entries, opcodes, and builders of the commands that kvfs sends.

Source: NVM Express Base Specification 2.0, figures 87 and 91 (entries), and 2.1 (flexible data placement: Get
Features 1Dh, I/O Management Receive); NVM Command Set Specification 1.0 (Read, Write, Dataset Management,
Verify, Get LBA Status); Zoned Namespace Command Set Specification 1.1 (Zone Management Send and Receive).
Entries are NumPy records, so a batch of commands is one array and the bytes are the ones that go on a wire.
"""

from enum import IntEnum

import numpy as np

SUBMISSION_ENTRY = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),  # fused operation, PRP or SGL: zero here
        ("cid", "<u2"),  # command identifier, chosen by the queue pair
        ("nsid", "<u4"),
        ("cdw2", "<u4"),
        ("cdw3", "<u4"),
        ("mptr", "<u8"),
        ("dptr", "V16"),  # data pointer: an SGL descriptor on a wire, unused in process
        ("cdw10", "<u4"),
        ("cdw11", "<u4"),
        ("cdw12", "<u4"),
        ("cdw13", "<u4"),
        ("cdw14", "<u4"),
        ("cdw15", "<u4"),
    ]
)
assert SUBMISSION_ENTRY.itemsize == 64

COMPLETION_ENTRY = np.dtype(
    [
        ("cdw0", "<u4"),  # command-specific result
        ("cdw1", "<u4"),
        ("sqhd", "<u2"),
        ("sqid", "<u2"),
        ("cid", "<u2"),
        ("status", "<u2"),  # phase, sc[8], sct[3], crd[2], more, dnr: see status.py
    ]
)
assert COMPLETION_ENTRY.itemsize == 16

DATASET_RANGE = np.dtype([("attributes", "<u4"), ("num_lbas", "<u4"), ("first_lba", "<u8")])
assert DATASET_RANGE.itemsize == 16

# What Get LBA Status returns: the header, then so many descriptors.
LBA_STATUS_HEADER = np.dtype([("num_descriptors", "<u4"), ("completion_condition", "u1"), ("reserved", "V3")])
LBA_STATUS_DESCRIPTOR = np.dtype(
    [("first_lba", "<u8"), ("num_lbas", "<u4"), ("reserved0", "u1"), ("status", "u1"), ("reserved1", "<u2")]
)
assert LBA_STATUS_HEADER.itemsize == 8 and LBA_STATUS_DESCRIPTOR.itemsize == 16
LBA_STATUS_ALLOCATED = 0x02  # action type: which LBAs are allocated (not deallocated)

NSID = 1  # a kvfs drive has one namespace
NSID_ALL = 0xFFFFFFFF
MAX_LBAS_PER_COMMAND = 1 << 16  # NLB is a 16-bit count minus one
MAX_DATASET_RANGES = 256
DIRECTIVE_DATA_PLACEMENT = 2  # directive type of Write, CDW12[23:20]
DATASET_DEALLOCATE = 1 << 2  # CDW11 bit AD


class AdminOpcode(IntEnum):
    GET_LOG_PAGE = 0x02
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    KEEP_ALIVE = 0x18
    GET_LBA_STATUS = 0x86
    # Vendor command; see FORMAT.md.
    FLASH_MAINTENANCE = 0xC0


class Maintenance(IntEnum):
    """CDW10 of FLASH_MAINTENANCE; CDW0 of the completion counts what was done."""

    COLLECT = 1  # garbage, up to CDW11 superblocks; 0 for as long as that gains something
    RENEW = 2  # superblocks with pages that only parity could give back
    CHECK = 3  # map against flash; the findings are in the FLASH_CHECK log page
    DROP_CACHE = 4  # the read cache forgets what nobody reads just now; counted in lines


class IoOpcode(IntEnum):
    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    RESERVATION_REGISTER = 0x0D
    RESERVATION_REPORT = 0x0E
    RESERVATION_ACQUIRE = 0x11
    IO_MANAGEMENT_RECEIVE = 0x12
    RESERVATION_RELEASE = 0x15
    ZONE_MANAGEMENT_SEND = 0x79
    ZONE_MANAGEMENT_RECEIVE = 0x7A
    # Vendor commands; what they mean is in vendor_command.py.
    ATTENTION_SUBMIT = 0x81
    ATTENTION_FETCH = 0x82
    ATTENTION_CANCEL = 0x84
    SEAL_GROUPS = 0x85


class Feature(IntEnum):
    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUM_QUEUES = 0x07
    ASYNC_EVENT_CONFIGURATION = 0x0B
    KEEP_ALIVE_TIMER = 0x0F
    FLEXIBLE_DATA_PLACEMENT = 0x1D
    HOST_IDENTIFIER = 0x81


FDP_ENABLED = 1 << 0  # CDW0 of the completion of Get Features

# What I/O Management Receive returns of reclaim unit handles: the header, then so many descriptors.
RECLAIM_UNIT_HANDLE_STATUS = 1  # management operation
HANDLE_STATUS_HEADER = np.dtype([("reserved", "V14"), ("num_descriptors", "<u2")])
HANDLE_STATUS_DESCRIPTOR = np.dtype(
    [
        ("placement_id", "<u2"),
        ("handle", "<u2"),
        ("active_reclaim_unit_time", "<u4"),  # estimated, seconds
        ("available_lbas", "<u8"),  # left in the reclaim unit that the handle points to
        ("reserved", "V16"),
    ]
)
assert HANDLE_STATUS_HEADER.itemsize == 16 and HANDLE_STATUS_DESCRIPTOR.itemsize == 32


class CommandSet(IntEnum):
    """Command set identifiers."""

    NVM = 0
    ZONED = 2


class ZoneAction(IntEnum):
    """Of Zone Management Send."""

    CLOSE = 1
    FINISH = 2
    OPEN = 3
    RESET = 4


class ZoneState(IntEnum):
    EMPTY = 0x1
    IMPLICITLY_OPEN = 0x2
    EXPLICITLY_OPEN = 0x3
    CLOSED = 0x4
    READ_ONLY = 0xD
    FULL = 0xE
    OFFLINE = 0xF


# What Zone Management Receive returns: the header, then so many descriptors.
REPORT_ZONES = 0  # action
REPORT_PARTIAL = 1 << 16  # CDW13: the header counts the descriptors that are there, not all that there would be
ZONE_REPORT_HEADER = np.dtype([("num_zones", "<u8"), ("reserved", "V56")])
ZONE_DESCRIPTOR = np.dtype(
    [
        ("type", "u1"),  # bits 3:0: ZONE_SEQUENTIAL
        ("state", "u1"),  # bits 7:4: ZoneState
        ("attributes", "u1"),
        ("attributes_information", "u1"),
        ("reserved0", "V4"),
        ("capacity", "<u8"),  # LBAs that can be written; what is left of the zone's size cannot
        ("first_lba", "<u8"),
        ("write_pointer", "<u8"),  # an LBA; says nothing of zones that are full, read-only or offline
        ("reserved1", "V32"),
    ]
)
assert ZONE_REPORT_HEADER.itemsize == 64 and ZONE_DESCRIPTOR.itemsize == 64
ZONE_SEQUENTIAL = 2  # sequential write required, the only type there is


class Direction(IntEnum):
    """Opcode bits 1:0: which way data moves. Bidirectional (3) is not carried by any fabric."""

    NONE = 0
    HOST_TO_DRIVE = 1
    DRIVE_TO_HOST = 2


# Of a data transfer command, those whose variants may have no data.
MAY_MOVE_NOTHING = {AdminOpcode.GET_FEATURES, AdminOpcode.SET_FEATURES, IoOpcode.ZONE_MANAGEMENT_SEND}


def direction(opcode: int) -> int:
    return opcode & 3


def _entry(opcode: int, nsid: int, **dwords: int) -> np.ndarray:
    entry = np.zeros(1, SUBMISSION_ENTRY)
    entry["opcode"] = opcode
    entry["nsid"] = nsid
    for name, value in dwords.items():
        entry[name] = value
    return entry


_LOWER_HALF, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _lba_ranges(opcode: int, first_lba, num_lbas, cdw12: int = 0, cdw13: int = 0) -> np.ndarray:
    """SUBMISSION_ENTRY [n] for a range, or arrays of n first LBAs and numbers of LBAs."""
    lbas = np.asarray(first_lba, np.uint64).reshape(-1)
    counts = np.asarray(num_lbas).reshape(-1)
    if not ((counts >= 1) & (counts <= MAX_LBAS_PER_COMMAND)).all():
        raise ValueError(f"one command moves 1 to {MAX_LBAS_PER_COMMAND} blocks, not {counts.tolist()}")
    entries = np.zeros(len(lbas), SUBMISSION_ENTRY)
    entries["opcode"] = opcode
    entries["nsid"] = NSID
    entries["cdw10"] = lbas & _LOWER_HALF
    entries["cdw11"] = lbas >> _HALF
    entries["cdw12"] = counts - 1 | cdw12
    if cdw13:
        entries["cdw13"] = cdw13
    return entries


def read(first_lba, num_lbas) -> np.ndarray:
    """SUBMISSION_ENTRY [n]: one read, or one for each of an array of ranges."""
    return _lba_ranges(IoOpcode.READ, first_lba, num_lbas)


def write(first_lba, num_lbas, placement_id: int | None = None) -> np.ndarray:
    """As `read`, with a placement hint: data of one placement identifier is expected to die together.

    None for a drive without data placement, which would refuse the hint.
    """
    if placement_id is None:
        return _lba_ranges(IoOpcode.WRITE, first_lba, num_lbas)
    return _lba_ranges(
        IoOpcode.WRITE, first_lba, num_lbas, cdw12=DIRECTIVE_DATA_PLACEMENT << 20, cdw13=placement_id << 16
    )


def verify(first_lba, num_lbas) -> np.ndarray:
    """As `read`, without transfer: the drive reads the blocks and checks them."""
    return _lba_ranges(IoOpcode.VERIFY, first_lba, num_lbas)


def flush() -> np.ndarray:
    return _entry(IoOpcode.FLUSH, NSID)


def report_zones(first_lba: int, size_bytes: int) -> np.ndarray:
    """The zones from the one with `first_lba` on, as many as fit into `size_bytes`."""
    return _entry(
        IoOpcode.ZONE_MANAGEMENT_RECEIVE,
        NSID,
        cdw10=first_lba & 0xFFFFFFFF,
        cdw11=first_lba >> 32,
        cdw12=size_bytes // 4 - 1,
        cdw13=REPORT_ZONES | REPORT_PARTIAL,
    )


def manage_zone(first_lba: int, action: ZoneAction) -> np.ndarray:
    return _entry(
        IoOpcode.ZONE_MANAGEMENT_SEND, NSID, cdw10=first_lba & 0xFFFFFFFF, cdw11=first_lba >> 32, cdw13=action
    )


def deallocate(num_ranges: int) -> np.ndarray:
    """Dataset Management with the deallocate attribute; the data are `num_ranges` DATASET_RANGE records."""
    if not 1 <= num_ranges <= MAX_DATASET_RANGES:
        raise ValueError(f"Dataset Management takes 1 to {MAX_DATASET_RANGES} ranges, not {num_ranges}")
    return _entry(IoOpcode.DATASET_MANAGEMENT, NSID, cdw10=num_ranges - 1, cdw11=DATASET_DEALLOCATE)


def identify(cns: int, nsid: int = 0, command_set: int = CommandSet.NVM) -> np.ndarray:
    return _entry(AdminOpcode.IDENTIFY, nsid, cdw10=cns, cdw11=command_set << 24)


def get_features(feature: Feature, cdw11: int = 0) -> np.ndarray:
    return _entry(AdminOpcode.GET_FEATURES, 0, cdw10=feature, cdw11=cdw11)


def set_features(feature: Feature, cdw11: int) -> np.ndarray:
    return _entry(AdminOpcode.SET_FEATURES, 0, cdw10=feature, cdw11=cdw11)


def keep_alive() -> np.ndarray:
    return _entry(AdminOpcode.KEEP_ALIVE, 0)


def reclaim_unit_handle_status(size_bytes: int) -> np.ndarray:
    """As many of the namespace's handles as fit into `size_bytes`."""
    num_dwords = size_bytes // 4 - 1
    return _entry(IoOpcode.IO_MANAGEMENT_RECEIVE, NSID, cdw10=RECLAIM_UNIT_HANDLE_STATUS, cdw11=num_dwords)


def get_log_page(log_id: int, size_bytes: int, offset_bytes: int = 0, nsid: int = NSID_ALL) -> np.ndarray:
    num_dwords = size_bytes // 4 - 1  # zero-based, as the specification has it
    return _entry(
        AdminOpcode.GET_LOG_PAGE,
        nsid,
        cdw10=log_id | (num_dwords & 0xFFFF) << 16,
        cdw11=num_dwords >> 16,
        cdw12=offset_bytes & 0xFFFFFFFF,
        cdw13=offset_bytes >> 32,
    )


def get_lba_status(first_lba: int, size_bytes: int) -> np.ndarray:
    """Which LBAs from `first_lba` on are allocated, as far as `size_bytes` of descriptors tell it."""
    return _entry(
        AdminOpcode.GET_LBA_STATUS,
        NSID,
        cdw10=first_lba & 0xFFFFFFFF,
        cdw11=first_lba >> 32,
        cdw12=size_bytes // 4 - 1,
        cdw13=LBA_STATUS_ALLOCATED << 24,  # range length 0: to the end of the namespace
    )


def flash_maintenance(action: Maintenance, limit: int = 0) -> np.ndarray:
    return _entry(AdminOpcode.FLASH_MAINTENANCE, NSID_ALL, cdw10=action, cdw11=limit)


def vendor(opcode: IoOpcode, ticket: int, num_pages: int = 1, request: int = 0) -> np.ndarray:
    """A vendor command: CDW10 is the ticket, CDW12[15:0] the transfer length in pages minus one.

    CDW14 and CDW15 say for which request it is, see request_id, or nothing; what a drive does with it is log.
    """
    return _entry(
        opcode,
        NSID,
        cdw10=ticket,
        cdw12=num_pages - 1,
        cdw14=request & 0xFFFFFFFF,
        cdw15=request >> 32,
    )


REQUEST_OFFSET = SUBMISSION_ENTRY.fields["cdw14"][1]  # of the request in a vendor command, uint64
