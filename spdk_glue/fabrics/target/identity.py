"""Identify as a controller on a fabric answers it: what the drive says of itself, and what the fabric adds."""

import uuid
from collections.abc import Callable, Sequence

import numpy as np

from spdk_glue import command
from spdk_glue.command import NSID, NSID_ALL, SUBMISSION_ENTRY
from spdk_glue.controller import REQUEST_FIELDS, Handler, Request
from spdk_glue.fabrics.records import UUID_PREFIX
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.reservations import RESCAP
from spdk_glue.identify import (
    CONTROLLER_TYPE_DISCOVERY,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    NAMESPACE_DESCRIPTOR,
    Cns,
)
from spdk_glue.reservation import ONCS_RESERVATIONS
from spdk_glue.status import CommandFailed, Status

STRUCTURE_BYTES = 4096
KEEP_ALIVE_GRANULARITY_MS = 100
KEEP_ALIVE_UNITS = 10  # KAS: a second
CMIC_SEVERAL_CONTROLLERS = 1 << 1
CTRATT_HOST_IDENTIFIER_128 = 1 << 0
SGLS_SUPPORTED, SGLS_OFFSET, SGLS_TRANSPORT = 1 << 0, 1 << 20, 1 << 21
LPA_COMMANDS_SUPPORTED, LPA_EXTENDED = 1 << 1, 1 << 2
FRMW_ONE_READ_ONLY_SLOT = 1 << 1 | 1 << 0
OFCS_DISCONNECT = 1 << 0
NMIC_SHARED = 1 << 0
NSATTR_WRITE_PROTECTED = 1 << 0
NSTAT_READY = 1 << 0
DESCRIPTOR_NGUID, DESCRIPTOR_UUID, DESCRIPTOR_COMMAND_SET = 2, 3, 4
IORCSZ_BYTES = 16


def fill(request: Request, structure: np.ndarray | bytes, offset: int = 0) -> None:
    """The structure from `offset` on into the request's buffer, and zeros behind it: no old byte stays."""
    raw = np.frombuffer(structure, np.uint8) if isinstance(structure, bytes) else structure.reshape(-1)
    part = raw.view(np.uint8)[offset : offset + request.data.nbytes]
    request.data[: len(part)] = part
    request.data[len(part) :] = 0


def describe_fabric(record: np.ndarray, cntlid: int, subnqn: str, limits: Limits) -> np.ndarray:
    """IDENTIFY_CONTROLLER [1] with what every controller of this target says."""
    record["cntlid"] = cntlid
    record["subnqn"] = subnqn.encode()
    record["mdts"] = limits.mdts
    record["kas"] = KEEP_ALIVE_UNITS
    record["maxcmd"] = limits.queue_entries
    record["sgls"] = SGLS_SUPPORTED | SGLS_OFFSET | SGLS_TRANSPORT
    record["ioccsz"] = (SUBMISSION_ENTRY.itemsize + limits.in_capsule_bytes) // 16
    record["iorcsz"] = IORCSZ_BYTES // 16
    record["msdbd"] = 1
    record["ofcs"] = OFCS_DISCONNECT
    record["aerl"] = limits.num_events - 1
    record["acl"] = 3
    record["lpa"] |= LPA_COMMANDS_SUPPORTED | LPA_EXTENDED
    record["ctratt"] |= CTRATT_HOST_IDENTIFIER_128
    return record


def discovery_controller(cntlid: int, subnqn: str, version: int, limits: Limits) -> np.ndarray:
    """IDENTIFY_CONTROLLER [1] of the discovery service."""
    record = np.zeros(1, IDENTIFY_CONTROLLER)
    record["cntrltype"] = CONTROLLER_TYPE_DISCOVERY
    record["ver"] = version
    record["fr"] = b"1"
    record["mn"] = b"kvfs discovery"
    record["sn"] = b"kvfs"
    record["elpe"] = 0
    return describe_fabric(record, cntlid, subnqn, limits)


def ask_drive(identify: Handler, entry: np.ndarray, form: np.dtype) -> np.ndarray:
    """What the drive itself answers to an Identify. Raises CommandFailed."""
    fields = [int(entry[name][0]) for name in REQUEST_FIELDS]
    request = Request(*fields, np.zeros(STRUCTURE_BYTES, np.uint8))
    identify([request])
    if request.failure is not None:
        raise request.failure
    return request.data.view(form)


class DriveIdentity:
    """The answers of one host's controller of a drive with one namespace. drive: its own Identify handler"""

    def __init__(
        self,
        drive: Handler,
        cntlid: int,
        subnqn: str,
        limits: Limits,
        *,
        is_read_only: bool,
        controllers: Callable[[], list[int]],
    ):
        self._drive = drive
        self._cntlid = cntlid
        self._subnqn = subnqn
        self._limits = limits
        self._is_read_only = is_read_only
        self._controllers = controllers
        self._uuid = namespace_uuid(ask_drive(drive, command.identify(Cns.CONTROLLER), IDENTIFY_CONTROLLER))

    def identify(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                structure = self._STRUCTURES.get(request.cdw10 & 0xFF)
                if structure is None or request.cdw11 >> 24:  # the only command set is NVM
                    cns, command_set = request.cdw10 & 0xFF, request.cdw11 >> 24
                    raise CommandFailed(Status.INVALID_FIELD, detail=f"CNS {cns:#x} set {command_set}")
                fill(request, structure(self, request))
            except CommandFailed as failure:
                request.fail(failure)

    def controller(self, request: Request | None = None) -> np.ndarray:
        record = ask_drive(self._drive, command.identify(Cns.CONTROLLER), IDENTIFY_CONTROLLER)
        record["cmic"] |= CMIC_SEVERAL_CONTROLLERS
        record["oncs"] |= 0 if self._is_read_only else ONCS_RESERVATIONS
        record["frmw"] = FRMW_ONE_READ_ONLY_SLOT
        attention = record["attention"]
        attention["max_tickets"] = np.minimum(attention["max_tickets"], self._limits.max_tickets)
        attention["max_transfer_bytes"] = np.minimum(
            attention["max_transfer_bytes"], self._limits.max_transfer_bytes
        )
        attention["one_flight_bytes"] = self._limits.in_capsule_bytes  # no command waits for data of such a one
        return describe_fabric(record, self._cntlid, self._subnqn, self._limits)

    def _namespace(self, request: Request) -> np.ndarray:
        if request.nsid not in (NSID, NSID_ALL):
            raise CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid}")
        record = ask_drive(self._drive, command.identify(Cns.NAMESPACE, NSID), IDENTIFY_NAMESPACE)
        record["nmic"] |= NMIC_SHARED
        record["rescap"] = 0 if self._is_read_only else RESCAP
        record["nguid"] = np.void(self._uuid.bytes)
        if self._is_read_only:
            record["nsattr"] |= NSATTR_WRITE_PROTECTED
        return record

    def _namespace_list(self, request: Request) -> np.ndarray:
        """The namespaces above the one given."""
        if request.nsid >= NSID_ALL - 1:
            raise CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid:#x}")
        return np.array([NSID] if request.nsid < NSID else [], "<u4")

    def _descriptors(self, request: Request) -> bytes:
        self._check_namespace(request)
        found = b""
        for kind, identifier in (
            (DESCRIPTOR_NGUID, self._uuid.bytes),
            (DESCRIPTOR_UUID, self._uuid.bytes),
            (DESCRIPTOR_COMMAND_SET, b"\0"),
        ):
            header = np.zeros(1, NAMESPACE_DESCRIPTOR)
            header["type"], header["length"] = kind, len(identifier)
            found += header.tobytes() + identifier
        return found

    def _nothing_more_of_namespace(self, request: Request) -> bytes:
        self._check_namespace(request)
        return b""

    def _independent_namespace(self, request: Request) -> bytes:
        self._check_namespace(request)
        record = np.zeros(16, np.uint8)
        record[1] = NMIC_SHARED
        record[8] = NSATTR_WRITE_PROTECTED if self._is_read_only else 0
        record[14] = NSTAT_READY
        return record.tobytes()

    def _controller_list(self, request: Request) -> np.ndarray:
        lowest = request.cdw10 >> 16
        found = sorted(cntlid for cntlid in self._controllers() if cntlid >= lowest)
        return np.array([len(found), *found], "<u2")

    def _namespace_controllers(self, request: Request) -> np.ndarray:
        self._check_namespace(request)
        return self._controller_list(request)

    @staticmethod
    def _check_namespace(request: Request) -> None:
        if request.nsid != NSID:
            raise CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid:#x}")

    _STRUCTURES = {  # noqa: RUF012 - by CNS
        Cns.NAMESPACE: _namespace,
        Cns.CONTROLLER: controller,
        Cns.ACTIVE_NAMESPACES: _namespace_list,
        Cns.NAMESPACE_DESCRIPTORS: _descriptors,
        Cns.COMMAND_SET_NAMESPACE: _nothing_more_of_namespace,
        Cns.COMMAND_SET_CONTROLLER: lambda self, request: b"",
        Cns.INDEPENDENT_NAMESPACE: _independent_namespace,
        Cns.ALLOCATED_NAMESPACES: _namespace_list,
        Cns.ALLOCATED_NAMESPACE: _namespace,
        Cns.NAMESPACE_CONTROLLERS: _namespace_controllers,
        Cns.CONTROLLERS: _controller_list,
    }


def namespace_uuid(controller: np.ndarray) -> uuid.UUID:
    """The same for a drive wherever it is served: its own, or one made of its model and serial number."""
    name = controller["subnqn"][0].decode(errors="replace")
    if name.startswith(UUID_PREFIX):
        try:
            return uuid.UUID(name.removeprefix(UUID_PREFIX))
        except ValueError:
            pass  # a name of somebody else's making
    return uuid.uuid5(uuid.NAMESPACE_OID, repr((controller["mn"][0], controller["sn"][0])))
