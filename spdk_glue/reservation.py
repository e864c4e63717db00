"""Reservations of a namespace: one host has it alone, others get Reservation Conflict.

Only a host that is gone loses it: the target says of each registrant whether it has a controller now, and who
comes next pre-empts one that has none. A host that was merely cut off finds its next command refused: two never
write at once. A host is known by its identifier, so processes of one host need a lock of their own beside this.

Source: NVM Express Base Specification 2.0, sections 7.2 to 7.5 and 8.19.
"""

import logging
import secrets
import uuid
from enum import IntEnum

import numpy as np

from spdk_glue.command import SUBMISSION_ENTRY, IoOpcode
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeError, NvmeStatusError, Status

log = logging.getLogger(__name__)

ONCS_RESERVATIONS = 1 << 5

REGISTER_DATA = np.dtype([("current_key", "<u8"), ("new_key", "<u8")])
ACQUIRE_DATA = np.dtype([("current_key", "<u8"), ("preempted_key", "<u8")])
RELEASE_DATA = np.dtype([("current_key", "<u8")])
REPORT_HEADER = np.dtype(  # of the extended form, with 128-bit host identifiers
    {
        "names": ["generation", "type", "num_registrants", "persistence"],
        "formats": ["<u4", "u1", "<u2", "u1"],
        "offsets": [0, 4, 5, 9],
        "itemsize": 64,
    }
)
REGISTRANT = np.dtype(
    [
        ("cntlid", "<u2"),  # where controllers are made as hosts come: REGISTRANT_PRESENT or _GONE
        ("status", "u1"),  # HOLDS
        ("reserved0", "V5"),
        ("key", "<u8"),
        ("host_id", "V16"),
        ("reserved1", "V32"),
    ]
)
assert REGISTRANT.itemsize == 64
REGISTRANT_PRESENT, REGISTRANT_GONE = 0xFFFE, 0xFFFD
HOLDS = 1 << 0
IGNORE_EXISTING_KEY = 1 << 3  # CDW10 of Register
EXTENDED_DATA = 1 << 0  # CDW11 of Report
REPORT_BYTES = 4096


class ReservationType(IntEnum):
    """rtype, of which a namespace tells in RESCAP (bit `type`) what it has."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 2  # others may not even read


class Register(IntEnum):
    REGISTER = 0
    UNREGISTER = 1
    REPLACE = 2


class Acquire(IntEnum):
    ACQUIRE = 0
    PREEMPT = 1


class Release(IntEnum):
    RELEASE = 0
    CLEAR = 1


def _entry(opcode: IoOpcode, cdw10: int, cdw11: int = 0) -> np.ndarray:
    entry = np.zeros(1, SUBMISSION_ENTRY)
    entry["opcode"], entry["cdw10"], entry["cdw11"] = opcode, cdw10, cdw11
    return entry


def _data(form: np.dtype, **fields: int) -> np.ndarray:
    record = np.zeros(1, form)
    for name, value in fields.items():
        record[name] = value
    return record.view(np.uint8)


class NamespaceReserved(NvmeError):
    """Another host, which is there, has the namespace. host_id: UUID"""

    def __init__(self, host_id: uuid.UUID):
        self.host_id = host_id
        super().__init__(host_id)

    def __str__(self) -> str:
        return f"the namespace is reserved by host {self.host_id}"


class Reservation:
    """Exclusive access to a namespace, where its drive knows reservations; else there is nothing to hold."""

    def __init__(self, namespace: BlockNamespace):
        self._namespace = namespace
        self.is_supported = bool(int(namespace.controller["oncs"]) & ONCS_RESERVATIONS)
        self._key = secrets.randbits(63) + 1

    def acquire(self) -> None:
        """Raises NamespaceReserved."""
        if not self.is_supported:
            log.info("the drive knows no reservations: other hosts must be kept off it by other means")
            return
        self._register(Register.REGISTER)
        try:
            self._acquire(Acquire.ACQUIRE)
        except NvmeStatusError as error:
            if error.status != Status.RESERVATION_CONFLICT:
                raise
            self._take_over()

    def _take_over(self) -> None:
        """From a holder that is gone."""
        holder = next((one for one in self.registrants() if one["status"] & HOLDS), None)
        try:
            if holder is not None and holder["cntlid"] != REGISTRANT_GONE:
                raise NamespaceReserved(uuid.UUID(bytes=bytes(holder["host_id"])))
            if holder is None:
                self._acquire(Acquire.ACQUIRE)
            else:
                self._acquire(Acquire.PREEMPT, int(holder["key"]))
        except BaseException:
            self._register(Register.UNREGISTER)
            raise

    def registrants(self) -> np.ndarray:
        """REGISTRANT [n]"""
        data = np.zeros(REPORT_BYTES, np.uint8)
        entry = _entry(IoOpcode.RESERVATION_REPORT, len(data) // 4 - 1, EXTENDED_DATA)
        self._run(entry, data)
        header = data[: REPORT_HEADER.itemsize].view(REPORT_HEADER)[0]
        room = (len(data) - REPORT_HEADER.itemsize) // REGISTRANT.itemsize
        return data[REPORT_HEADER.itemsize :].view(REGISTRANT)[: min(int(header["num_registrants"]), room)]

    def release(self) -> None:
        """Others may have it. Where the target cannot be reached, it sees itself that this host is gone."""
        if not self.is_supported:
            return
        try:
            data = _data(RELEASE_DATA, current_key=self._key)
            cdw10 = Release.RELEASE | ReservationType.EXCLUSIVE_ACCESS << 8
            self._run(_entry(IoOpcode.RESERVATION_RELEASE, cdw10), data)
            self._register(Register.UNREGISTER)
        except NvmeError as error:
            log.info("the reservation was not released: %s", error)

    def _register(self, action: Register) -> None:
        """To register replaces a key of this host's that a killed process left."""
        if action == Register.UNREGISTER:
            data, cdw10 = _data(REGISTER_DATA, current_key=self._key), int(action)
        else:
            data, cdw10 = _data(REGISTER_DATA, new_key=self._key), action | IGNORE_EXISTING_KEY
        self._run(_entry(IoOpcode.RESERVATION_REGISTER, cdw10), data)

    def _acquire(self, action: Acquire, preempted_key: int = 0) -> None:
        data = _data(ACQUIRE_DATA, current_key=self._key, preempted_key=preempted_key)
        cdw10 = action | ReservationType.EXCLUSIVE_ACCESS << 8
        self._run(_entry(IoOpcode.RESERVATION_ACQUIRE, cdw10), data)

    def _run(self, entry: np.ndarray, data: np.ndarray) -> None:
        entry["nsid"] = self._namespace.nsid
        self._namespace.execute(entry, data)
