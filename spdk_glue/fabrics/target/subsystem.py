"""What a target offers: the discovery service and one drive, and which hosts have a controller of them."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spdk_glue import command
from spdk_glue.command import AdminOpcode
from spdk_glue.controller import Controller, Handler, Request
from spdk_glue.fabrics.records import (
    ADMIN_QUEUE_ID,
    CNTLID_DYNAMIC,
    CONNECT_COMMAND,
    CONNECT_DATA,
    DISCOVERY_NQN,
    FAULT_IN_DATA,
    VERSION_2_0,
    BadNqn,
    check_nqn,
    nqn_of,
)
from spdk_glue.fabrics.target import identity, log_pages
from spdk_glue.fabrics.target.association import (
    WRITING,
    Association,
    Queue,
    protected_admin,
    protected_io,
)
from spdk_glue.fabrics.target.host_access import AllowedHost, HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.reservation_file import ReservationFile
from spdk_glue.fabrics.target.reservations import Reservations
from spdk_glue.fabrics.target.tickets import Tickets
from spdk_glue.identify import IDENTIFY_CONTROLLER, Cns, LogPage
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)

_VENDOR_LOG_PAGES = (
    LogPage.FLASH_HEALTH,
    LogPage.ATTENTION_COUNTERS,
    LogPage.SUPERBLOCKS,
    LogPage.FLASH_CHECK,
    LogPage.LATENCY,
)
LAST_CNTLID = 0xFFEF


def run_at_once(ticket: int, call: Callable[[], None]) -> None:
    call()


def no_short_way(descriptor: np.ndarray, answer: np.ndarray) -> bool:
    return False


@dataclass(frozen=True)
class ServedDrive:
    """What a target exports.

    controller: the drive's handlers; when_fetchable: (ticket, call): calls once, from any thread, when an
    Attention Fetch of a ticket has nothing to wait for any more, or at once; attend_small_now: (descriptor,
    answer): fills the answer of a small command whose pages are cached, uint8 of its exact length, on the
    caller's thread; False, with nothing done, for all others.
    """

    controller: Controller
    when_fetchable: Callable[[int, Callable[[], None]], None] = run_at_once
    attend_small_now: Callable[[np.ndarray, np.ndarray], bool] = no_short_way


class ConnectRefused(CommandFailed):
    """Connect's own failures. result: CDW0, which says where the fault is"""

    def __init__(self, status: Status, detail: str, result: int = 0):
        self.result = result
        super().__init__(status, detail=detail)


def _fault(form: np.dtype, field: str, detail: str) -> ConnectRefused:
    """A parameter of Connect, in its command or its data."""
    in_data = FAULT_IN_DATA << 16 if form is CONNECT_DATA else 0
    return ConnectRefused(Status.CONNECT_INVALID_PARAMETERS, detail, form.fields[field][1] | in_data)


class Subsystems:
    """nqn: of the drive; None: the drive's own name; reservations: the file that keeps them, None for none"""

    def __init__(
        self,
        drive: ServedDrive,
        access: HostAccess,
        limits: Limits | None = None,
        nqn: str | None = None,
        reservations: str | os.PathLike | None = None,
    ):
        self.drive = drive
        self.limits = limits or Limits()
        self.access = access
        record = identity.ask_drive(
            drive.controller.handlers(is_admin=True)[AdminOpcode.IDENTIFY],
            command.identify(Cns.CONTROLLER),
            IDENTIFY_CONTROLLER,
        )
        self.nqn = check_nqn(nqn or record["subnqn"][0].decode())
        self._revision = bytes(record["fr"][0])
        self._associations: dict[int, Association] = {}
        self._next_cntlid = 1
        self._lock = threading.Lock()
        serial_number = bytes(record["sn"][0]).decode("ascii", "replace").strip()
        file = None if reservations is None else ReservationFile(reservations, serial_number)
        self.reservations = Reservations(self._is_present, file)

    def _is_present(self, host_id: bytes) -> bool:
        with self._lock:
            return any(
                one.host_id == host_id and one.ended is None and not one.is_discovery
                for one in self._associations.values()
            )

    # Connect.

    def connect(
        self, entry: np.void, data: np.void, queue: Queue, address: tuple[str, int], now: float
    ) -> tuple[Association, AllowedHost]:
        """entry: CONNECT_COMMAND, data: CONNECT_DATA; address: IP and port that the host reached us at.

        Raises ConnectRefused, CommandFailed.
        """
        if entry["recfmt"] != 0:
            raise ConnectRefused(Status.CONNECT_INCOMPATIBLE_FORMAT, f"record format {entry['recfmt']}")
        names = {}
        for field in ("hostnqn", "subnqn"):
            try:
                # SPDK's tools have no name unless they are given one; no list has that
                is_nameless = field == "hostnqn" and not any(bytes(data[field]))
                names[field] = "" if is_nameless else nqn_of(data[field])
            except BadNqn as error:
                raise _fault(CONNECT_DATA, field, str(error)) from error
        if names["subnqn"] not in (self.nqn, DISCOVERY_NQN):
            raise _fault(CONNECT_DATA, "subnqn", f"no subsystem {names['subnqn']}")
        host = self.access.allowed(names["hostnqn"])
        if host is None:
            raise ConnectRefused(
                Status.CONNECT_INVALID_HOST, f"host {names['hostnqn'] or 'without a name'} is not on the list"
            )
        if not 1 <= entry["sqsize"] < self.limits.queue_entries:
            raise _fault(CONNECT_COMMAND, "sqsize", f"a queue of {int(entry['sqsize']) + 1} entries")
        if entry["qid"] == ADMIN_QUEUE_ID:
            return self._connect_admin(entry, data, names, host, queue, address, now), host
        return self._connect_io(entry, data, names, queue), host

    def _connect_admin(self, entry, data, names, host, queue, address, now) -> Association:
        if data["cntlid"] != CNTLID_DYNAMIC:
            raise _fault(CONNECT_DATA, "cntlid", f"controller {data['cntlid']:#x}: they are given by us")
        with self._lock:
            association = Association(
                self._free_cntlid(),
                names["subnqn"],
                names["hostnqn"],
                bytes(data["hostid"]),
                self.limits,
                keep_alive_ms=int(entry["kato"]),
                now=now,
                is_discovery=names["subnqn"] == DISCOVERY_NQN,
                is_read_only=host.read_only,
            )
            self._associations[association.cntlid] = association
        try:
            (self._serve_discovery if association.is_discovery else self._serve_drive)(association, address)
            association.add_queue(ADMIN_QUEUE_ID, queue)
        except BaseException:
            self.forget(association)
            raise
        log.info("host %s: controller %d of %s", names["hostnqn"], association.cntlid, names["subnqn"])
        return association

    def _free_cntlid(self) -> int:
        for _ in range(LAST_CNTLID):
            found = self._next_cntlid
            self._next_cntlid = found % LAST_CNTLID + 1
            if found not in self._associations:
                return found
        raise ConnectRefused(Status.CONNECT_CONTROLLER_BUSY, "no controller is free")

    def _connect_io(self, entry, data, names, queue) -> Association:
        association = self._associations.get(int(data["cntlid"]))
        if association is None or association.ended is not None:
            raise _fault(CONNECT_DATA, "cntlid", f"no controller {data['cntlid']:#x}")
        # who guesses a number must not get at another host's controller
        if association.subnqn != names["subnqn"]:
            raise _fault(CONNECT_DATA, "subnqn", "the controller is another subsystem's")
        if association.hostnqn != names["hostnqn"]:
            raise _fault(CONNECT_DATA, "hostnqn", "the controller is another host's")
        if association.host_id != bytes(data["hostid"]):
            raise _fault(CONNECT_DATA, "hostid", "the controller is another host's")
        association.add_queue(int(entry["qid"]), queue)
        return association

    def forget(self, association: Association) -> None:
        """Once it has ended."""
        with self._lock:
            if self._associations.get(association.cntlid) is association:
                del self._associations[association.cntlid]

    def end_all(self, why: str) -> None:
        with self._lock:
            found = list(self._associations.values())
        for association in found:
            association.end(why)

    def _cntlids(self) -> list[int]:
        with self._lock:
            return [a.cntlid for a in self._associations.values() if not a.is_discovery and a.ended is None]

    # What a controller answers with.

    def _serve_drive(self, association: Association, address: tuple[str, int]) -> None:
        its_io = self.drive.controller.handlers(is_admin=False)
        its_admin = self.drive.controller.handlers(is_admin=True)
        tickets = Tickets(its_io, self.limits.max_tickets)
        identify = identity.DriveIdentity(
            its_admin[AdminOpcode.IDENTIFY],
            association.cntlid,
            association.subnqn,
            self.limits,
            is_read_only=association.is_read_only,
            controllers=self._cntlids,
        )
        pages = log_pages.LogPages(
            {
                LogPage.ERROR_INFORMATION: lambda: association.controller.error_log.page(),
                LogPage.FIRMWARE_SLOTS: lambda: log_pages.firmware_slots(self._revision),
                LogPage.CHANGED_NAMESPACES: lambda: bytes(4096),
                LogPage.COMMANDS_SUPPORTED: lambda: log_pages.commands_supported(
                    association.controller, WRITING
                ),
            },
            association.events,
            its_admin.get(AdminOpcode.GET_LOG_PAGE),
            (LogPage.SMART, *_VENDOR_LOG_PAGES),
        )
        io_handlers, admin_handlers = tickets.handlers(), self._common(association, identify.identify, pages)
        if association.is_read_only:
            io_handlers |= protected_io(its_io)
            admin_handlers |= protected_admin(its_admin)
        controller = self.drive.controller.with_handlers(
            self.reservations.guarded(association.host_id, its_io | io_handlers)
            | ({} if association.is_read_only else self.reservations.handlers(association.host_id)),
            admin_handlers,
            self.reservations.guarded_batches(association.host_id, self.drive.controller.batch_handlers),
        )
        association.serve(controller, tickets)

    def _serve_discovery(self, association: Association, address: tuple[str, int]) -> None:
        def identify(requests: Sequence[Request]) -> None:
            for request in requests:
                if request.cdw10 & 0xFF == Cns.CONTROLLER:
                    cntlid, nqn = association.cntlid, association.subnqn
                    record = identity.discovery_controller(cntlid, nqn, VERSION_2_0, self.limits)
                    identity.fill(request, record)
                else:
                    request.fail(CommandFailed(Status.INVALID_FIELD, detail=f"CNS {request.cdw10 & 0xFF:#x}"))

        pages = log_pages.LogPages(
            {
                log_pages.DISCOVERY_LOG_PAGE: lambda: log_pages.discovery_log(
                    [self.nqn], *address, self.limits.queue_entries, generation=1
                ),
                LogPage.ERROR_INFORMATION: lambda: association.controller.error_log.page(),
            },
            association.events,
        )
        association.serve(Controller({}, self._common(association, identify, pages)))

    @staticmethod
    def _common(association: Association, identify: Handler, pages: log_pages.LogPages) -> dict[int, Handler]:
        return {
            AdminOpcode.IDENTIFY: identify,
            AdminOpcode.GET_LOG_PAGE: pages.get,
            AdminOpcode.SET_FEATURES: lambda requests: association.features.set(requests),
            AdminOpcode.GET_FEATURES: lambda requests: association.features.get(requests),
        }
