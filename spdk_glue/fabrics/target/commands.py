"""One command of a host on its way through a connection: what its capsule says, and its data."""

import struct
from dataclasses import dataclass

import numpy as np

from spdk_glue.command import REQUEST_OFFSET, SUBMISSION_ENTRY, Direction, direction
from spdk_glue.fabrics.records import (
    FABRICS_COMMAND,
    FABRICS_OPCODE,
    PSDT_SGL,
    SGL_DESCRIPTOR,
    SGL_IN_CAPSULE,
    SGL_TRANSPORT,
)
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import record_struct

_ENTRY = record_struct(SUBMISSION_ENTRY)
_SGL = record_struct(SGL_DESCRIPTOR)
_REQUEST = struct.Struct("<Q")
_FCTYPE_OFFSET = FABRICS_COMMAND.fields["fctype"][1]
FUSED, PSDT = 0x03, 0xC0  # bits of flags


@dataclass(slots=True, eq=False)
class Command:
    """raw: its SUBMISSION_ENTRY; dwords: CDW10 to CDW13; length: of its data, of which `received` bytes came
    from the host so far; memory: of which `data` are the first bytes; is_intact: no data digest was wrong"""

    raw: bytes
    cid: int
    opcode: int
    nsid: int
    dwords: tuple[int, int, int, int]
    direction: Direction
    length: int = 0
    is_in_capsule: bool = False
    memory: np.ndarray | None = None
    data: np.ndarray | None = None
    received: int = 0
    is_intact: bool = True

    @property
    def cdw10(self) -> int:
        return self.dwords[0]

    @property
    def request(self) -> int | None:
        """Of the host, which an attention command is for; None if it does not say."""
        return _REQUEST.unpack_from(self.raw, REQUEST_OFFSET)[0] or None

    @property
    def is_fabrics(self) -> bool:
        return self.opcode == FABRICS_OPCODE


def parse(raw: bytes, in_capsule_length: int, limits: Limits) -> tuple[Command, CommandFailed | None]:
    """The command in a capsule with so many bytes of data, and what is wrong with it."""
    opcode, flags, cid, nsid, _, _, _, dptr, *dwords = _ENTRY.unpack(raw)
    way = direction(raw[_FCTYPE_OFFSET] if opcode == FABRICS_OPCODE else opcode)
    command = Command(raw, cid, opcode, nsid, tuple(dwords[:4]), way)
    try:
        _find_data(command, flags, dptr, in_capsule_length, limits)
    except CommandFailed as failure:
        return command, failure
    return command, None


def _find_data(command: Command, flags: int, dptr: bytes, in_capsule_length: int, limits: Limits) -> None:
    if flags & FUSED:
        raise CommandFailed(Status.INVALID_FIELD, detail="fused")
    if command.direction == Direction.NONE:
        return
    if command.direction == Direction.HOST_TO_DRIVE | Direction.DRIVE_TO_HOST:
        raise CommandFailed(Status.INVALID_OPCODE, detail="bidirectional")
    address, length, _, kind = _SGL.unpack(dptr)
    if length == 0 and not in_capsule_length:
        return
    if flags & PSDT != PSDT_SGL:
        raise CommandFailed(Status.INVALID_FIELD, detail="data without SGL")
    if kind == SGL_IN_CAPSULE:
        if command.direction != Direction.HOST_TO_DRIVE:
            raise CommandFailed(Status.SGL_TYPE_INVALID, detail="data to host in capsule")
        if address:
            raise CommandFailed(Status.SGL_OFFSET_INVALID, detail=f"offset {address}")
        if length != in_capsule_length or length > limits.in_capsule_bytes:
            raise CommandFailed(Status.SGL_LENGTH_INVALID, detail=f"{in_capsule_length} in capsule")
        command.is_in_capsule = True
    elif kind != SGL_TRANSPORT:
        raise CommandFailed(Status.SGL_TYPE_INVALID, detail=f"SGL type {kind:#x}")
    elif in_capsule_length:
        raise CommandFailed(Status.SGL_LENGTH_INVALID, detail="data twice")
    if length > limits.max_transfer_bytes:
        raise CommandFailed(Status.SGL_LENGTH_INVALID, detail=f"limit {limits.max_transfer_bytes}")
    command.length = length
