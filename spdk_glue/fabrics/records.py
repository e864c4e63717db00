"""What every NVMe over Fabrics transport carries: fabrics commands, controller properties, the discovery log
page, SGL descriptors, and the rules for names.

Source: NVM Express Base Specification 2.0, sections 3.1.3 (properties), 4.1.2 (SGLs), 4.5 (NQNs), 5.16.1.23
(discovery log page) and 6 (fabrics commands).
"""

import re
import uuid
from enum import IntEnum

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY, SUBMISSION_ENTRY

FABRICS_OPCODE = 0x7F
PSDT_SGL = 1 << 6  # flags of every submission entry on a fabric: the data pointer is an SGL descriptor


class FabricsType(IntEnum):
    PROPERTY_SET = 0x00
    CONNECT = 0x01
    PROPERTY_GET = 0x04
    AUTHENTICATION_SEND = 0x05
    AUTHENTICATION_RECEIVE = 0x06
    DISCONNECT = 0x08


def _command(fields: dict[str, tuple[int, str]]) -> np.dtype:
    """A fabrics command: the fields that all have, and its own from byte 40 on."""
    common = {
        "opcode": (0, "u1"),
        "flags": (1, "u1"),
        "cid": (2, "<u2"),
        "fctype": (4, "u1"),
        "dptr": (24, "V16"),
    }
    fields = common | fields
    return np.dtype(
        {
            "names": list(fields),
            "formats": [form for _, form in fields.values()],
            "offsets": [offset for offset, _ in fields.values()],
            "itemsize": SUBMISSION_ENTRY.itemsize,
        }
    )


FABRICS_COMMAND = _command({})
CONNECT_COMMAND = _command(
    {
        "recfmt": (40, "<u2"),  # 0
        "qid": (42, "<u2"),  # 0: the admin queue
        "sqsize": (44, "<u2"),  # entries, less one
        "cattr": (46, "u1"),  # CONNECT_NO_FLOW_CONTROL
        "kato": (48, "<u4"),  # keep alive timeout, ms; admin queue only; 0: none
    }
)
PROPERTY_COMMAND = _command({"attrib": (40, "u1"), "ofst": (44, "<u4"), "value": (48, "<u8")})
AUTHENTICATION_COMMAND = _command(
    {
        "spsp0": (41, "u1"),  # 1, both
        "spsp1": (42, "u1"),
        "secp": (43, "u1"),  # SECURITY_PROTOCOL_NVME
        "length": (44, "<u4"),  # of the data sent, or of the room for what is received
    }
)
DISCONNECT_COMMAND = _command({"recfmt": (40, "<u2")})

CONNECT_NO_FLOW_CONTROL = 1 << 2
PROPERTY_8_BYTES = 1  # attrib, bits 2:0; else 0: 4 bytes
SECURITY_PROTOCOL_NVME = 0xE9
ADMIN_QUEUE_ID = 0

CONNECT_DATA = np.dtype(
    [
        ("hostid", "V16"),
        ("cntlid", "<u2"),  # CNTLID_DYNAMIC on the admin queue; else the controller's
        ("reserved0", "V238"),
        ("subnqn", "V256"),  # UTF-8, NUL-terminated: see nqn_of
        ("hostnqn", "V256"),
        ("reserved1", "V256"),
    ]
)
assert CONNECT_DATA.itemsize == 1024
CNTLID_DYNAMIC = 0xFFFF

# A completion's first eight bytes on fabrics. Of Connect: what was granted, or what was wrong with it.
CONNECT_RESULT = np.dtype([("cntlid", "<u2"), ("authreq", "<u2"), ("reserved", "V4")])
CONNECT_FAULT = np.dtype([("ipo", "<u2"), ("iattr", "u1"), ("reserved", "V5")])
PROPERTY_RESULT = np.dtype([("value", "<u8")])
AUTHREQ_TRANSACTION = 1 << 1  # authenticate before anything else
AUTHREQ_SECURE_CHANNEL = 1 << 2  # that, and over TLS
FAULT_IN_DATA = 1 << 0  # iattr: ipo counts from the start of the data, not of the command


class Property(IntEnum):
    """Offsets. CAP has 8 bytes, the others 4."""

    CAP = 0x00
    VS = 0x08
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20


PROPERTY_BYTES = {Property.CAP: 8, Property.VS: 4, Property.CC: 4, Property.CSTS: 4, Property.NSSR: 4}

CAP_CONTIGUOUS_QUEUES = 1 << 16  # CQR: always, on fabrics
CAP_NVM_COMMAND_SET = 1 << 37
CAP_TIMEOUT_MS = 500  # the unit of CAP's TO


def capabilities(max_queue_entries: int, timeout_ms: int) -> int:
    """CAP of a controller whose queues have up to so many entries, and which is ready in so much time."""
    units = -(-timeout_ms // CAP_TIMEOUT_MS)
    if not (2 <= max_queue_entries <= 1 << 16 and 1 <= units <= 0xFF):
        raise ValueError(f"no controller has {max_queue_entries} entries or needs {timeout_ms} ms")
    return max_queue_entries - 1 | CAP_CONTIGUOUS_QUEUES | units << 24 | CAP_NVM_COMMAND_SET


def cap_max_queue_entries(cap: int) -> int:
    return (cap & 0xFFFF) + 1


def cap_timeout_ms(cap: int) -> int:
    """How long enabling and disabling may take."""
    return (cap >> 24 & 0xFF) * CAP_TIMEOUT_MS


CC_ENABLE = 1 << 0
CC_SHUTDOWN = 3 << 14  # SHN
CC_SHUTDOWN_NORMAL = 1 << 14
CC_ENTRY_SIZES = 6 << 16 | 4 << 20  # IOSQES, IOCQES: 64 and 16 bytes, as powers of two
CSTS_READY = 1 << 0
CSTS_FATAL = 1 << 1
CSTS_SHUTDOWN = 3 << 2  # SHST
CSTS_SHUTDOWN_COMPLETE = 2 << 2
VERSION_1_4 = 0x00010400
VERSION_2_0 = 0x00020000


# SGL descriptors: the submission entry's data pointer.
SGL_DESCRIPTOR = np.dtype([("address", "<u8"), ("length", "<u4"), ("reserved", "V3"), ("type", "u1")])
assert SGL_DESCRIPTOR.itemsize == 16
SGL_IN_CAPSULE = 0x01  # data block, address is an offset into the capsule's data
SGL_TRANSPORT = 0x5A  # the transport's own data block: H2CData and C2HData PDUs, on TCP


def sgl(kind: int, length) -> np.ndarray:
    """SGL_DESCRIPTOR [n] for data of `length` bytes, one or an array of n."""
    lengths = np.asarray(length).reshape(-1)
    found = np.zeros(len(lengths), SGL_DESCRIPTOR)
    found["length"], found["type"] = lengths, kind
    return found


# Names.
DISCOVERY_NQN = "nqn.2014-08.org.nvmexpress.discovery"
NQN_BYTES_MAX = 223
NQN_FIELD_BYTES = 256
NQN_OF_DOMAIN = re.compile(r"nqn\.\d{4}-(0[1-9]|1[0-2])\.[^:\s]+(:\S+)?")
UUID_PREFIX = "nqn.2014-08.org.nvmexpress:uuid:"


class BadNqn(ValueError):
    """Not a name that NVMe lets a host or subsystem have; says why."""


def check_nqn(nqn: str) -> str:
    """The name itself. Raises BadNqn."""
    if len(nqn.encode("utf-8", "surrogateescape")) > NQN_BYTES_MAX:
        raise BadNqn(f"{nqn[:40]}...: an NVMe qualified name has at most {NQN_BYTES_MAX} bytes")
    if not (nqn.isprintable() and NQN_OF_DOMAIN.fullmatch(nqn)):
        raise BadNqn(f"{nqn!r}: not an NVMe qualified name such as nqn.2026-11.io.kvfs:drive")
    if nqn.startswith(UUID_PREFIX):
        try:
            uuid.UUID(nqn.removeprefix(UUID_PREFIX))
        except ValueError as error:
            raise BadNqn(f"{nqn}: no UUID after {UUID_PREFIX}") from error
    return nqn


def nqn_field(nqn: str) -> bytes:
    """As Connect's data and the discovery log page hold it: 256 bytes. Raises BadNqn."""
    return check_nqn(nqn).encode().ljust(NQN_FIELD_BYTES, b"\0")


def nqn_of(field: bytes | np.void) -> str:
    """The name in a field of 256 bytes. Raises BadNqn."""
    text, end, _ = bytes(field).partition(b"\0")
    if not end:
        raise BadNqn("an NVMe qualified name without its end")
    try:
        return check_nqn(text.decode())
    except UnicodeDecodeError as error:
        raise BadNqn(f"{text[:40]!r}: an NVMe qualified name that is not UTF-8") from error


def hostnqn_of(host_id: uuid.UUID) -> str:
    return UUID_PREFIX + str(host_id)


# The discovery log page: a header, then so many entries.
DISCOVERY_LOG_PAGE = 0x70
DISCOVERY_HEADER = np.dtype([("genctr", "<u8"), ("numrec", "<u8"), ("recfmt", "<u2"), ("reserved", "V1006")])
DISCOVERY_ENTRY = np.dtype(
    [
        ("trtype", "u1"),  # TRANSPORT_TCP
        ("adrfam", "u1"),  # AddressFamily
        ("subtype", "u1"),  # SubsystemType
        ("treq", "u1"),  # TREQ_*
        ("portid", "<u2"),
        ("cntlid", "<u2"),  # CNTLID_DYNAMIC
        ("asqsz", "<u2"),  # entries of the admin queue
        ("eflags", "<u2"),
        ("reserved0", "V20"),
        ("trsvcid", "S32"),  # the port, in decimal
        ("reserved1", "V192"),
        ("subnqn", "V256"),
        ("traddr", "S256"),
        ("sectype", "u1"),  # TCP: SECTYPE_*
        ("reserved2", "V255"),
    ]
)
assert DISCOVERY_HEADER.itemsize == 1024 and DISCOVERY_ENTRY.itemsize == 1024
TRANSPORT_TCP = 3
TREQ_SECURE_CHANNEL_REQUIRED = 1
TREQ_SECURE_CHANNEL_NOT_REQUIRED = 2
SECTYPE_NONE = 0
SECTYPE_TLS_1_3 = 2


class AddressFamily(IntEnum):
    IPV4 = 1
    IPV6 = 2


class SubsystemType(IntEnum):
    REFERRAL = 1  # to another discovery service
    NVM = 2
    CURRENT_DISCOVERY = 3


# Builders of what a host sends. The cid is the queue's business.


def _fabrics(kind: FabricsType, form: np.dtype, **fields: int) -> np.ndarray:
    entry = np.zeros(1, form)
    entry["opcode"], entry["flags"], entry["fctype"] = FABRICS_OPCODE, PSDT_SGL, kind
    for name, value in fields.items():
        entry[name] = value
    return entry.view(SUBMISSION_ENTRY)


def connect(
    queue_id: int, num_entries: int, *, keep_alive_ms: int = 0, flow_control: bool = True
) -> np.ndarray:
    """SUBMISSION_ENTRY [1]; its data are CONNECT_DATA in the capsule."""
    return _fabrics(
        FabricsType.CONNECT,
        CONNECT_COMMAND,
        qid=queue_id,
        sqsize=num_entries - 1,
        cattr=0 if flow_control else CONNECT_NO_FLOW_CONTROL,
        kato=keep_alive_ms,
    )


def connect_data(host_id: uuid.UUID, hostnqn: str, subnqn: str, cntlid: int = CNTLID_DYNAMIC) -> np.ndarray:
    """CONNECT_DATA [1]. Raises BadNqn."""
    data = np.zeros(1, CONNECT_DATA)
    data["hostid"], data["cntlid"] = np.void(host_id.bytes), cntlid
    data["subnqn"], data["hostnqn"] = np.void(nqn_field(subnqn)), np.void(nqn_field(hostnqn))
    return data


def property_get(which: Property) -> np.ndarray:
    attrib = PROPERTY_8_BYTES if PROPERTY_BYTES[which] == 8 else 0
    return _fabrics(FabricsType.PROPERTY_GET, PROPERTY_COMMAND, attrib=attrib, ofst=which)


def property_set(which: Property, value: int) -> np.ndarray:
    attrib = PROPERTY_8_BYTES if PROPERTY_BYTES[which] == 8 else 0
    return _fabrics(FabricsType.PROPERTY_SET, PROPERTY_COMMAND, attrib=attrib, ofst=which, value=value)


def authentication(kind: FabricsType, length: int) -> np.ndarray:
    """Authentication Send or Receive of so many bytes."""
    return _fabrics(kind, AUTHENTICATION_COMMAND, spsp0=1, spsp1=1, secp=SECURITY_PROTOCOL_NVME, length=length)


def disconnect() -> np.ndarray:
    return _fabrics(FabricsType.DISCONNECT, DISCONNECT_COMMAND)


def result_of(completion: np.ndarray, form: np.dtype) -> np.void:
    """The first eight bytes of one COMPLETION_ENTRY as CONNECT_RESULT, CONNECT_FAULT or PROPERTY_RESULT."""
    entry = np.ascontiguousarray(completion).reshape(1).view(np.uint8)
    assert entry.nbytes == COMPLETION_ENTRY.itemsize
    return entry[: form.itemsize].view(form)[0]
