"""The protocol data units (PDUs) of NVMe/TCP: records, the rules of their headers, digests.

    header (hlen bytes) | header digest | padding up to pdo | data | data digest          plen bytes in all

Nothing here sends or receives. `take_pdu` is the definition of what may arrive; the C of tcp_glue does the same
for runs of PDUs, out of the same table RULES. The builders return arrays of headers, one for each command of a
batch; who sends them puts the digests in. Source: NVMe/TCP Transport Specification 1.0, section 3.6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np

from spdk_glue import dma
from spdk_glue.command import COMPLETION_ENTRY, SUBMISSION_ENTRY
from spdk_glue.fabrics.crc32c import crc32c
from spdk_glue.status import NvmeError


class PduType(IntEnum):
    IC_REQUEST = 0x00  # initialise connection
    IC_RESPONSE = 0x01
    H2C_TERMINATE = 0x02
    C2H_TERMINATE = 0x03
    CAPSULE_COMMAND = 0x04
    CAPSULE_RESPONSE = 0x05
    H2C_DATA = 0x06
    C2H_DATA = 0x07
    R2T = 0x09  # ready to transfer: the controller asks for data


class PduFlag(IntFlag):
    HEADER_DIGEST = 1 << 0
    DATA_DIGEST = 1 << 1
    LAST = 1 << 2  # of the H2CData of one R2T, or the C2HData of one command
    SUCCESS = 1 << 3  # of C2HData: stands for a successful response capsule, which does not come


class FatalError(IntEnum):
    """FES of a terminate request: why a connection ends."""

    INVALID_HEADER_FIELD = 0x01  # FEI: the field's offset
    SEQUENCE_ERROR = 0x02
    HEADER_DIGEST_ERROR = 0x03  # FEI: the digest that was received
    DATA_OUT_OF_RANGE = 0x04
    LIMIT_EXCEEDED = 0x05  # more data, or more R2Ts, than was agreed
    UNSUPPORTED_PARAMETER = 0x06


class FatalPduError(NvmeError):
    """The peer broke the transport's rules; the connection ends with a terminate request.

    fes: FatalError; fei: field error information; detail: what was wrong, for the log.
    """

    def __init__(self, fes: FatalError, detail: str, fei: int = 0):
        self.fes = fes
        self.fei = fei
        self.detail = detail
        super().__init__(fes, detail, fei)

    def __str__(self) -> str:
        return f"{self.fes.name.lower().replace('_', ' ')}: {self.detail}"


_COMMON = [("type", "u1"), ("flags", "u1"), ("hlen", "u1"), ("pdo", "u1"), ("plen", "<u4")]
TYPE_OFFSET, FLAGS_OFFSET, HLEN_OFFSET, PDO_OFFSET, PLEN_OFFSET = 0, 1, 2, 3, 4

COMMON_HEADER = np.dtype(_COMMON)
IC_REQUEST = np.dtype(
    [
        *_COMMON,
        ("pfv", "<u2"),  # PDU format version, PFV
        ("hpda", "u1"),  # data to the host start at multiples of 4 * (hpda + 1)
        ("digests", "u1"),  # PduFlag.HEADER_DIGEST, DATA_DIGEST: asked for
        ("maxr2t", "<u4"),  # R2Ts outstanding for one command, less one
        ("reserved", "V112"),
    ]
)
IC_RESPONSE = np.dtype(
    [
        *_COMMON,
        ("pfv", "<u2"),
        ("cpda", "u1"),  # data to the controller start at multiples of 4 * (cpda + 1)
        ("digests", "u1"),  # granted
        ("maxh2cdata", "<u4"),  # bytes in one H2CData
        ("reserved", "V112"),
    ]
)
TERMINATE = np.dtype(
    # fei is not aligned; the header of the PDU at fault follows as data
    [*_COMMON, ("fes", "<u2"), ("fei", "<u4"), ("reserved", "V10")]
)
CAPSULE_COMMAND = np.dtype([*_COMMON, ("entry", SUBMISSION_ENTRY)])
CAPSULE_RESPONSE = np.dtype([*_COMMON, ("entry", COMPLETION_ENTRY)])
DATA = np.dtype(  # H2CData and C2HData, which has no tag
    [*_COMMON, ("cid", "<u2"), ("ttag", "<u2"), ("offset", "<u4"), ("length", "<u4"), ("reserved", "V4")]
)
R2T = np.dtype(
    [*_COMMON, ("cid", "<u2"), ("ttag", "<u2"), ("offset", "<u4"), ("length", "<u4"), ("reserved", "V4")]
)
assert COMMON_HEADER.itemsize == 8 and IC_REQUEST.itemsize == IC_RESPONSE.itemsize == 128
assert CAPSULE_COMMAND.itemsize == 72
assert TERMINATE.itemsize == CAPSULE_RESPONSE.itemsize == DATA.itemsize == R2T.itemsize == 24

PFV = 0
DIGEST_BYTES = 4
MAX_HEADER_BYTES = 128
MAX_TERMINATE_DATA_BYTES = 128
MAX_PDA = 31  # of hpda and cpda
# What a PDU has besides its data, at most: data start within the 255 bytes that pdo can say.
PDU_OVERHEAD_BYTES = 256 + DIGEST_BYTES

# What may follow a header. The type is the index; a row whose hlen is zero is no type.
NO_DATA, MAY_HAVE_DATA, HAS_DATA = 0, 1, 2
RULE = np.dtype([("hlen", "u1"), ("may_have_digests", "u1"), ("data", "u1"), ("from_host", "u1")])
RULES = np.zeros(16, RULE)
for _type, _rule in {
    PduType.IC_REQUEST: (128, 0, NO_DATA, 1),
    PduType.IC_RESPONSE: (128, 0, NO_DATA, 0),
    PduType.H2C_TERMINATE: (24, 0, MAY_HAVE_DATA, 1),
    PduType.C2H_TERMINATE: (24, 0, MAY_HAVE_DATA, 0),
    PduType.CAPSULE_COMMAND: (72, 1, MAY_HAVE_DATA, 1),
    PduType.CAPSULE_RESPONSE: (24, 1, NO_DATA, 0),
    PduType.H2C_DATA: (24, 1, HAS_DATA, 1),
    PduType.C2H_DATA: (24, 1, HAS_DATA, 0),
    PduType.R2T: (24, 1, NO_DATA, 0),
}.items():
    RULES[_type] = _rule
RULES.flags.writeable = False

RECORDS = {
    PduType.IC_REQUEST: IC_REQUEST,
    PduType.IC_RESPONSE: IC_RESPONSE,
    PduType.H2C_TERMINATE: TERMINATE,
    PduType.C2H_TERMINATE: TERMINATE,
    PduType.CAPSULE_COMMAND: CAPSULE_COMMAND,
    PduType.CAPSULE_RESPONSE: CAPSULE_RESPONSE,
    PduType.H2C_DATA: DATA,
    PduType.C2H_DATA: DATA,
    PduType.R2T: R2T,
}


@dataclass(frozen=True)
class Framing:
    """What two peers agreed on, as far as it shapes PDUs.

    header_digest, data_digest: whether PDUs carry them; alignment: data that this side sends start at its
    multiples; from_host: which side's PDUs arrive here; max_data_bytes: in one PDU that arrives.
    """

    from_host: bool
    header_digest: bool = False
    data_digest: bool = False
    alignment: int = 4
    max_data_bytes: int = 1 << 20

    @property
    def header_digest_bytes(self) -> int:
        return DIGEST_BYTES if self.header_digest else 0

    @property
    def data_digest_bytes(self) -> int:
        return DIGEST_BYTES if self.data_digest else 0


@dataclass(frozen=True)
class Pdu:
    """One PDU that arrived. header: `hlen` bytes; is_data_intact: False where the data digest is another."""

    type: PduType
    header: bytes
    data: bytes
    is_data_intact: bool = True

    @property
    def record(self) -> np.void:
        return np.frombuffer(self.header, RECORDS[self.type])[0]


def _check_header(common: np.void, framing: Framing) -> tuple[int, int, int]:
    """(hlen with digest, offset of the data, length of the data). Raises FatalPduError."""

    def refuse(field: int, detail: str):
        return FatalPduError(FatalError.INVALID_HEADER_FIELD, detail, field)

    pdu_type, flags, hlen, pdo, plen = (int(value) for value in common.item())
    rule = RULES[pdu_type] if pdu_type < len(RULES) else RULES[-1]
    if not rule["hlen"] or bool(rule["from_host"]) != framing.from_host:
        raise refuse(TYPE_OFFSET, f"PDU type {pdu_type:#04x}")
    if hlen != rule["hlen"]:
        raise refuse(HLEN_OFFSET, f"a header of {hlen} bytes in PDU type {pdu_type:#04x}")
    has_header_digest = bool(rule["may_have_digests"]) and framing.header_digest
    if bool(flags & PduFlag.HEADER_DIGEST) != has_header_digest:
        raise refuse(FLAGS_OFFSET, f"flags {flags:#04x}: the header digest is not as agreed")
    head = hlen + (DIGEST_BYTES if has_header_digest else 0)
    forbidden = NO_DATA if plen > head else HAS_DATA
    if plen < head or rule["data"] == forbidden:
        raise refuse(PLEN_OFFSET, f"{plen} bytes of PDU type {pdu_type:#04x}")
    if plen == head:
        return head, head, 0
    if pdu_type in (PduType.H2C_TERMINATE, PduType.C2H_TERMINATE):
        if plen > head + MAX_TERMINATE_DATA_BYTES:
            raise refuse(PLEN_OFFSET, f"a terminate request of {plen} bytes")
        return head, head, plen - head
    has_data_digest = framing.data_digest
    if bool(flags & PduFlag.DATA_DIGEST) != has_data_digest:
        raise refuse(FLAGS_OFFSET, f"flags {flags:#04x}: the data digest is not as agreed")
    tail = DIGEST_BYTES if has_data_digest else 0
    if pdo < head or pdo % 4 or pdo + tail >= plen:
        raise refuse(PDO_OFFSET, f"data at {pdo} of {plen} bytes")
    length = plen - pdo - tail
    if length > framing.max_data_bytes:
        raise FatalPduError(FatalError.LIMIT_EXCEEDED, f"{length} bytes of data in one PDU", PLEN_OFFSET)
    return head, pdo, length


def take_pdu(received: bytes | memoryview, framing: Framing) -> tuple[Pdu, int] | None:
    """The PDU at the start of what was received, and its length; None where it is not all there yet.

    A header is refused as soon as its eight common bytes are there, whatever length it claims.
    Raises FatalPduError.
    """
    if len(received) < COMMON_HEADER.itemsize:
        return None
    common = np.frombuffer(received, COMMON_HEADER, 1)[0]
    head, data_at, length = _check_header(common, framing)
    hlen, plen = int(common["hlen"]), int(common["plen"])
    if len(received) < head:
        return None
    if head > hlen:
        digest = int.from_bytes(received[hlen:head], "little")
        if digest != crc32c(received[:hlen]):
            raise FatalPduError(FatalError.HEADER_DIGEST_ERROR, "the header digest is not the header's", digest)
    if len(received) < plen:
        return None
    data = bytes(received[data_at : data_at + length])
    has_digest = length and plen > data_at + length
    intact = not has_digest or int.from_bytes(received[plen - DIGEST_BYTES : plen], "little") == crc32c(data)
    return Pdu(PduType(int(common["type"])), bytes(received[:hlen]), data, intact), plen


def headers(pdu_type: PduType, num: int, framing: Framing, lengths=0, flags: int = 0) -> np.ndarray:
    """RECORDS[pdu_type] [num] with the common header filled in; `lengths` of their data, one or [num]."""
    records = np.zeros(num, RECORDS[pdu_type])
    rule = RULES[pdu_type]
    head = hlen = int(rule["hlen"])
    has_digests = bool(rule["may_have_digests"])
    if has_digests and framing.header_digest:
        flags |= PduFlag.HEADER_DIGEST
        head += DIGEST_BYTES
    records["type"] = pdu_type
    records["hlen"] = hlen
    if np.ndim(lengths) == 0 and lengths == 0:
        records["flags"] = flags
        records["plen"] = head
        return records
    has_data = np.asarray(lengths) > 0
    pdo = -(-head // framing.alignment) * framing.alignment if has_digests else head
    tail = 0
    if has_digests and framing.data_digest:
        flags = np.where(has_data, flags | PduFlag.DATA_DIGEST, flags)
        tail = DIGEST_BYTES
    records["flags"] = flags
    records["pdo"] = np.where(has_data & has_digests, pdo, 0)
    records["plen"] = np.where(has_data, pdo + np.asarray(lengths, np.int64) + tail, head)
    return records


def ic_request(*, header_digest: bool, data_digest: bool, max_r2t: int = 1, hpda: int = 0) -> np.ndarray:
    """IC_REQUEST [1]; max_r2t: R2Ts that one command may have outstanding."""
    record = headers(PduType.IC_REQUEST, 1, Framing(from_host=True))
    record["hpda"], record["maxr2t"] = hpda, max_r2t - 1
    record["digests"] = PduFlag.HEADER_DIGEST * header_digest | PduFlag.DATA_DIGEST * data_digest
    return record


def ic_response(
    *, header_digest: bool, data_digest: bool, max_h2c_data_bytes: int, cpda: int = 0
) -> np.ndarray:
    """IC_RESPONSE [1]."""
    record = headers(PduType.IC_RESPONSE, 1, Framing(from_host=False))
    record["cpda"], record["maxh2cdata"] = cpda, max_h2c_data_bytes
    record["digests"] = PduFlag.HEADER_DIGEST * header_digest | PduFlag.DATA_DIGEST * data_digest
    return record


def terminate(pdu_type: PduType, error: FatalPduError, header: bytes = b"") -> bytes:
    """The whole PDU; `header`: of the PDU at fault, of which the first 128 bytes go with it."""
    header = bytes(header[:MAX_TERMINATE_DATA_BYTES])
    record = headers(pdu_type, 1, Framing(from_host=False), len(header))
    record["fes"], record["fei"] = error.fes, error.fei & 0xFFFFFFFF
    return record.tobytes() + header


def capsule_commands(entries: np.ndarray, framing: Framing, in_capsule_lengths=0) -> np.ndarray:
    """CAPSULE_COMMAND [n] of SUBMISSION_ENTRY [n]; lengths of the data that go with each."""
    records = headers(PduType.CAPSULE_COMMAND, len(entries), framing, in_capsule_lengths)
    records["entry"] = entries
    return records


def capsule_responses(entries: np.ndarray, framing: Framing) -> np.ndarray:
    """CAPSULE_RESPONSE [n] of COMPLETION_ENTRY [n]."""
    records = headers(PduType.CAPSULE_RESPONSE, len(entries), framing)
    records["entry"] = entries
    return records


def data(pdu_type: PduType, cids, lengths, framing: Framing, *, offsets=0, ttags=0, flags=0) -> np.ndarray:
    """DATA [n], H2CData or C2HData. cids, lengths, offsets, ttags, flags: one, or [n]."""
    num = max(np.size(cids), np.size(lengths))
    records = headers(pdu_type, num, framing, np.broadcast_to(lengths, num))
    records["flags"] |= np.asarray(flags, np.uint8)
    records["cid"], records["ttag"] = cids, ttags
    records["offset"], records["length"] = offsets, lengths
    return records


def r2t(cids, ttags, offsets, lengths, framing: Framing) -> np.ndarray:
    """R2T [n]."""
    records = headers(PduType.R2T, np.size(cids), framing)
    records["cid"], records["ttag"] = cids, ttags
    records["offset"], records["length"] = offsets, lengths
    return records


def with_digests(
    header: np.ndarray, data: bytes | memoryview = b"", checksum: Callable[[bytes], int] = crc32c
) -> bytes:
    """One whole PDU as it goes on the wire: padding and digests as its header says. header: a record [1]"""
    raw = header.tobytes()
    common = np.frombuffer(raw, COMMON_HEADER, 1)[0]
    if common["flags"] & PduFlag.HEADER_DIGEST:
        raw += checksum(raw).to_bytes(DIGEST_BYTES, "little")
    if not len(data):
        return raw
    raw += bytes(max(0, int(common["pdo"]) - len(raw))) + bytes(data)
    if common["flags"] & PduFlag.DATA_DIGEST:
        raw += checksum(data).to_bytes(DIGEST_BYTES, "little")
    return raw


# A PDU that arrived, whole, or refused.
FRAME = np.dtype(
    [
        ("header", "u1", MAX_HEADER_BYTES),  # zeros behind its hlen bytes
        ("data_at", "<u8"),  # where its data begin in the stream's buffer
        ("data_length", "<u4"),
        ("fei", "<u4"),  # field error information
        ("fes", "u1"),  # a FatalError, and nothing comes after it; or 0
        ("is_data_intact", "u1"),  # the data digest is right, or there is none
        ("reserved", "V6"),
    ]
)

# A PDU to send: its header, and its data where it has some. The header says which digests follow.
PIECE = np.dtype([("header_address", "<u8"), ("data_address", "<u8"), ("data_length", "<u8")])


def join(pieces: np.ndarray, checksum: Callable[[bytes], int] = crc32c) -> bytes:
    """PIECE [n] as they go on the wire; the definition of what tcp_glue sends."""
    wire = b""
    for header_address, data_address, length in pieces.tolist():
        hlen = int(dma.view(header_address + HLEN_OFFSET, 1)[0])
        body = dma.view(data_address, length).tobytes() if length else b""
        wire += with_digests(dma.view(header_address, hlen).copy(), body, checksum)
    return wire
