"""The drive as each host, which is a controller of SPDK's, has it: with tickets and an error log of its own.

SPDK says nothing when a host goes. One that was silent for SILENT_SECONDS, without as much as a Keep Alive, is
taken for gone; until then what it left under way uses memory, and some of the drive's tickets.
"""

import threading
from collections.abc import Callable, Sequence

from spdk_glue.command import AdminOpcode
from spdk_glue.controller import Controller, Request
from spdk_glue.fabrics.target.identity import fill
from spdk_glue.fabrics.target.tickets import Tickets
from spdk_glue.identify import LogPage

SILENT_SECONDS = 120


class HostController:
    """For one host. `controller` runs its commands."""

    def __init__(self, drives: Controller, max_tickets: int):
        self._drives_log_pages = drives.handlers(is_admin=True)[AdminOpcode.GET_LOG_PAGE]
        self._tickets = Tickets(drives.handlers(is_admin=False), max_tickets)
        self.controller = drives.with_handlers(
            self._tickets.handlers(), {AdminOpcode.GET_LOG_PAGE: self._get_log_page}
        )

    def _get_log_page(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.cdw10 & 0xFF == LogPage.ERROR_INFORMATION:
                fill(request, self.controller.error_log.page(), request.cdw12 | request.cdw13 << 32)
            else:
                self._drives_log_pages([request])

    def close(self) -> None:
        """The host is gone: what it left under way is stopped."""
        self._tickets.cancel_all()


class Hosts:
    """By the identifier of SPDK's controller. Thread-safe."""

    def __init__(self, drives: Controller, max_tickets: int):
        self._drives = drives
        self._max_tickets = max_tickets
        self._hosts: dict[int, HostController] = {}
        self._lock = threading.Lock()

    def controller(self, controller_id: int) -> Controller:
        """A host's, made when it is first asked for."""
        with self._lock:
            host = self._hosts.get(controller_id)
            if host is None:
                host = self._hosts[controller_id] = HostController(self._drives, self._max_tickets)
            return host.controller

    def forget(self, is_gone: Callable[[int], bool]) -> list[int]:
        """Let go of those of whose identifier `is_gone` is true; the identifiers."""
        with self._lock:
            gone = [controller_id for controller_id in self._hosts if is_gone(controller_id)]
            hosts = [self._hosts.pop(controller_id) for controller_id in gone]
        for host in hosts:
            host.close()
        return gone
