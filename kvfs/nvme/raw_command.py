"""Raw commands: what is checked before a command that somebody has composed goes to a drive.

A driver maps as much memory as it is told; the controller moves as much as the command says. Where these differ
the controller writes to memory that is not its buffer, so lengths are compared for every command that tells its
own. What is larger than the transfer limit may end a queue pair, and what belongs to the driver (queues,
asynchronous events) would hang it: both are refused.
"""

from dataclasses import dataclass

import numpy as np

from kvfs.errors import InvalidArgument
from spdk_glue.command import (
    DATASET_RANGE,
    SUBMISSION_ENTRY,
    AdminOpcode,
    Direction,
    IoOpcode,
    direction,
)

ZONE_APPEND, ZONE_RECEIVE, RESERVATION_REPORT = 0x7D, 0x7A, 0x0E
OF_BLOCKS = (IoOpcode.READ, IoOpcode.WRITE, IoOpcode.COMPARE, ZONE_APPEND)
IDENTIFY_BYTES = 4096
DRIVERS_OWN = {
    0x00: "Delete I/O Submission Queue",
    0x01: "Create I/O Submission Queue",
    0x04: "Delete I/O Completion Queue",
    0x05: "Create I/O Completion Queue",
    0x0C: "Asynchronous Event Request",
    0x7C: "Doorbell Buffer Config",
}
FABRICS = 0x7F
DWORD_MAX = 0xFFFFFFFF
DWORDS = ("cdw2", "cdw3", *(f"cdw{number}" for number in range(10, 16)))


@dataclass(frozen=True)
class RawCommand:
    """One command as an administrator composes it.

    data_bytes: of its buffer; nsid: None for the namespace that was opened (of an admin command: 0);
    dwords: of DWORDS those that are not zero
    """

    opcode: int
    is_admin: bool = False
    nsid: int | None = None
    flags: int = 0
    data_bytes: int = 0
    dwords: tuple[tuple[str, int], ...] = ()

    def dword(self, name: str) -> int:
        return dict(self.dwords).get(name, 0)

    @property
    def direction(self) -> int:
        """Where its data go, by the opcode: a Direction, or 3 for both ways."""
        return direction(self.opcode)

    @property
    def reads(self) -> bool:
        return self.direction == Direction.DRIVE_TO_HOST

    @property
    def writes(self) -> bool:
        return self.direction == Direction.HOST_TO_DRIVE

    @property
    def changes_nothing(self) -> bool:
        """Whether what the drive holds is the same afterwards for sure."""
        harmless = (IoOpcode.FLUSH, IoOpcode.VERIFY, IoOpcode.COMPARE)
        return self.reads or (not self.is_admin and self.opcode in harmless)

    def entry(self, nsid: int) -> np.ndarray:
        """SUBMISSION_ENTRY [1]; nsid: of the namespace that was opened."""
        entry = np.zeros(1, SUBMISSION_ENTRY)
        default = 0 if self.is_admin else nsid
        entry["opcode"], entry["flags"] = self.opcode, self.flags
        entry["nsid"] = default if self.nsid is None else self.nsid
        for name, value in self.dwords:
            entry[name] = value
        return entry


def check(
    command: RawCommand, block_bytes: int, max_transfer_bytes: int, separate_metadata: bool = False
) -> None:
    """Raises InvalidArgument for a command that could hang or harm this process, or its queue.

    block_bytes: what moves for one block, with metadata that follow it; separate_metadata: the format has some
    in a buffer of their own
    """
    _check_fields(command)
    whose = "admin" if command.is_admin else "I/O"
    name = f"{whose} command {command.opcode:#04x}"
    if command.opcode == FABRICS or (command.is_admin and command.opcode in DRIVERS_OWN):
        what = DRIVERS_OWN.get(command.opcode, "a Fabrics command")
        raise InvalidArgument(f"{name} is {what}, which only the driver may send")
    if command.direction == 3:
        raise InvalidArgument(f"{name} moves data both ways by its opcode, which no transport carries")
    if command.direction == Direction.NONE and command.data_bytes:
        raise InvalidArgument(f"{name} moves no data by its opcode: leave out the data length")
    if command.direction != Direction.NONE and not command.data_bytes:
        way = "from" if command.reads else "to"
        raise InvalidArgument(f"{name} moves data {way} the drive by its opcode: give the data length")
    if command.data_bytes > max_transfer_bytes:
        raise InvalidArgument(
            f"{name} with {command.data_bytes} bytes: this drive takes at most {max_transfer_bytes} at once"
        )
    if command.is_admin:
        _check_admin(command, name)
    else:
        _check_io(command, name, block_bytes, separate_metadata)


def _check_fields(command: RawCommand) -> None:
    for name, value, limit in (
        ("opcode", command.opcode, 0xFF),
        ("flags", command.flags, 0xFF),
        ("namespace id", command.nsid or 0, DWORD_MAX),
        *((name, value, DWORD_MAX) for name, value in command.dwords),
    ):
        if not 0 <= value <= limit:
            raise InvalidArgument(f"{name} is 0 to {limit:#x}, not {value:#x}")
    if command.data_bytes < 0:
        raise InvalidArgument(f"a data length is not negative: {command.data_bytes}")
    if command.flags:
        raise InvalidArgument("flags other than 0 (fused commands, SGLs) are the driver's to set")


def _check_io(command: RawCommand, name: str, block_bytes: int, separate_metadata: bool) -> None:
    if command.opcode in OF_BLOCKS:
        if separate_metadata:
            raise InvalidArgument(f"{name}: this format has its metadata in a buffer of their own")
        num_lbas = (command.dword("cdw12") & 0xFFFF) + 1
        if command.data_bytes != num_lbas * block_bytes:
            raise InvalidArgument(
                f"{name} says {num_lbas} blocks of {block_bytes} bytes (cdw12 counts from zero), but the data"
                f" length is {command.data_bytes}, not {num_lbas * block_bytes}"
            )
    elif command.opcode == IoOpcode.DATASET_MANAGEMENT:
        _at_least(command, name, ((command.dword("cdw10") & 0xFF) + 1) * DATASET_RANGE.itemsize)
    elif command.opcode == ZONE_RECEIVE:
        _at_least(command, name, 4 * (command.dword("cdw12") + 1))
    elif command.opcode == RESERVATION_REPORT:
        _at_least(command, name, 4 * (command.dword("cdw10") + 1))


def _check_admin(command: RawCommand, name: str) -> None:
    if command.opcode == AdminOpcode.IDENTIFY:
        _at_least(command, name, IDENTIFY_BYTES)
    elif command.opcode == AdminOpcode.GET_LOG_PAGE:
        num_dwords = (command.dword("cdw11") & 0xFFFF) << 16 | command.dword("cdw10") >> 16
        _at_least(command, name, 4 * (num_dwords + 1))
    elif command.opcode == AdminOpcode.GET_LBA_STATUS:
        _at_least(command, name, 4 * (command.dword("cdw12") + 1))


def _at_least(command: RawCommand, name: str, needed_bytes: int) -> None:
    if command.data_bytes < needed_bytes:
        raise InvalidArgument(f"{name} moves {needed_bytes} bytes, but the data length is {command.data_bytes}")
