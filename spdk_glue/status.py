"""NVMe status codes, and the error that carries one.

A code here is `sct << 8 | sc` (status code type, status code). Source: NVM Express Base Specification 2.0,
section 3.3.3.2.1; Zoned Namespace Command Set Specification 1.1 (01B8h to 01BFh); status code type 7 is
vendor specific.
"""

from enum import IntEnum


class Status(IntEnum):
    SUCCESS = 0x0000
    INVALID_OPCODE = 0x0001
    INVALID_FIELD = 0x0002
    COMMAND_ID_CONFLICT = 0x0003
    DATA_TRANSFER_ERROR = 0x0004
    INTERNAL_ERROR = 0x0006
    ABORTED_BY_REQUEST = 0x0007
    ABORTED_SQ_DELETION = 0x0008  # also what a lost connection took with it
    INVALID_NAMESPACE = 0x000B
    COMMAND_SEQUENCE_ERROR = 0x000C
    INVALID_NUM_SGL_DESCRIPTORS = 0x000E
    SGL_LENGTH_INVALID = 0x000F
    SGL_TYPE_INVALID = 0x0011
    SGL_OFFSET_INVALID = 0x0016
    HOST_IDENTIFIER_INCONSISTENT = 0x0018
    KEEP_ALIVE_EXPIRED = 0x0019
    KEEP_ALIVE_INVALID = 0x001A
    NAMESPACE_WRITE_PROTECTED = 0x0020
    TRANSIENT_TRANSPORT_ERROR = 0x0022  # a data digest, on fabrics: the command may be sent again
    LBA_OUT_OF_RANGE = 0x0080
    CAPACITY_EXCEEDED = 0x0081
    RESERVATION_CONFLICT = 0x0083
    INVALID_QUEUE = 0x0101
    ASYNC_EVENT_LIMIT = 0x0105
    INVALID_LOG_PAGE = 0x0109
    FEATURE_NOT_SAVEABLE = 0x010D
    FEATURE_NOT_CHANGEABLE = 0x010E
    # of fabrics commands
    CONNECT_INCOMPATIBLE_FORMAT = 0x0180
    CONNECT_CONTROLLER_BUSY = 0x0181
    CONNECT_INVALID_PARAMETERS = 0x0182
    CONNECT_RESTART_DISCOVERY = 0x0183
    CONNECT_INVALID_HOST = 0x0184
    DISCOVERY_RESTART = 0x0190
    AUTHENTICATION_REQUIRED = 0x0191
    ZONE_BOUNDARY_ERROR = 0x01B8
    ZONE_IS_FULL = 0x01B9
    ZONE_IS_READ_ONLY = 0x01BA
    ZONE_IS_OFFLINE = 0x01BB
    ZONE_INVALID_WRITE = 0x01BC
    TOO_MANY_ACTIVE_ZONES = 0x01BD
    TOO_MANY_OPEN_ZONES = 0x01BE
    INVALID_ZONE_STATE_TRANSITION = 0x01BF
    WRITE_FAULT = 0x0280
    UNRECOVERED_READ_ERROR = 0x0281
    COMPARE_FAILURE = 0x0285
    DEALLOCATED_BLOCK = 0x0287  # attention over a page that was never written
    # vendor specific
    INVALID_DESCRIPTOR = 0x07C0
    UNKNOWN_TICKET = 0x07C1
    TICKET_IN_USE = 0x07C2
    TOO_MANY_TICKETS = 0x07C3
    ATTENTION_CANCELLED = 0x07C4
    CANNOT_BE_SEALED = 0x07C5  # keys or values that nothing can be derived of: not finite
    NOT_COMPUTABLE = 0x07C6  # the drive's worker has no numbers for it, and may leave it to no other
    WORKER_FAILED = 0x07C7  # the drive's worker, a card say, has broken down


# Completion status field: bit 0 phase, 8:1 sc, 11:9 sct, 13:12 retry delay, 14 more, 15 do not retry.
_MORE = 1 << 14
_DO_NOT_RETRY = 1 << 15


def encode(status: int, more: bool = False, do_not_retry: bool = False) -> int:
    return (status & 0x7FF) << 1 | (_MORE if more else 0) | (_DO_NOT_RETRY if do_not_retry else 0)


def decode(field):
    """Of one status field, or of an array of them."""
    return field >> 1 & 0x7FF


def has_more(field: int) -> bool:
    """Whether the error log page tells more about this failure."""
    return bool(field & _MORE)


def describe(status: int) -> str:
    try:
        return Status(status).name.lower().replace("_", " ")
    except ValueError:
        return f"status code type {status >> 8:#x} code {status & 0xFF:#x}"


class NvmeError(Exception):
    """Base of everything that the NVMe layer raises."""


class NvmeStatusError(NvmeError):
    """A command that the drive answered with an error status.

    opcode, status (`sct << 8 | sc`), do_not_retry, nsid; lba and detail where the error log names them.
    """

    def __init__(
        self,
        opcode: int,
        status: int,
        *,
        nsid: int = 0,
        do_not_retry: bool = False,
        lba: int | None = None,
        detail: str = "",
    ):
        self.opcode = opcode
        self.status = status
        self.nsid = nsid
        self.do_not_retry = do_not_retry
        self.lba = lba
        self.detail = detail
        super().__init__(opcode, status)

    @property
    def sct(self) -> int:
        return self.status >> 8

    @property
    def sc(self) -> int:
        return self.status & 0xFF

    def __str__(self) -> str:
        text = f"NVMe command {self.opcode:#04x} failed: {describe(self.status)}"
        if self.lba is not None:
            text += f" at LBA {self.lba}"
        return f"{text} ({self.detail})" if self.detail else text


class QueueFull(NvmeError):
    """More commands outstanding than the queue pair is deep."""

    def __init__(self, depth: int):
        self.depth = depth
        super().__init__(depth)

    def __str__(self) -> str:
        return f"the queue pair holds at most {self.depth} outstanding commands"


class ConnectionLost(NvmeError):
    """The drive cannot be reached any more; says which, and what of the work is in doubt."""


class BadLocation(NvmeError):
    """No drive can be reached by this; says what is wrong and what would do."""


class ConnectionRefused(NvmeError):
    """A controller cannot be reached or does not take us; says which and why."""


class NamespaceInUse(NvmeError):
    """Somebody else's data are, or may be, on the namespace; says whose, and how to proceed."""


class QueuePairInUse(NvmeError):
    """Two threads on one queue pair."""


class NotAKvfsDrive(NvmeError):
    """The controller's vendor area does not say that it computes attention."""


class OtherAttentionVersion(NvmeError):
    """A kvfs drive whose attention commands are not of this host's version."""

    def __init__(self, version: int, wanted: int):
        self.version, self.wanted = version, wanted
        super().__init__(
            f"the drive's attention commands are of version {version}, this host's of {wanted}:"
            f" use the newer kvfs {'at the drive' if version < wanted else 'here'} as well"
        )


class CommandFailed(NvmeError):
    """Raised by a command handler on the drive's side; the controller turns it into a completion.

    `lba` and `detail` go to the error log page, so that the host can say what was hit.
    """

    def __init__(self, status: Status, *, lba: int | None = None, detail: str = "", do_not_retry: bool = True):
        self.status = status
        self.lba = lba
        self.detail = detail
        self.do_not_retry = do_not_retry
        super().__init__(status)

    def __str__(self) -> str:
        return f"{describe(self.status)}: {self.detail}" if self.detail else describe(self.status)
