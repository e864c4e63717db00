"""Get Log Page on a fabric: the controller's own pages, and the drive's behind them."""

from collections.abc import Callable, Sequence

import numpy as np

from spdk_glue.command import AdminOpcode
from spdk_glue.controller import Controller, Handler, Request
from spdk_glue.fabrics.records import (
    CNTLID_DYNAMIC,
    DISCOVERY_ENTRY,
    DISCOVERY_HEADER,
    DISCOVERY_LOG_PAGE,
    SECTYPE_NONE,
    TRANSPORT_TCP,
    TREQ_SECURE_CHANNEL_NOT_REQUIRED,
    AddressFamily,
    SubsystemType,
    nqn_field,
)
from spdk_glue.fabrics.target.events import Events
from spdk_glue.fabrics.target.identity import fill
from spdk_glue.identify import LogPage
from spdk_glue.status import CommandFailed, Status

RETAIN_EVENT = 1 << 15  # CDW10
LOG_PAGE_SUPPORTED = 1 << 0
COMMAND_SUPPORTED, COMMAND_CHANGES_DATA = 1 << 0, 1 << 1
FIRMWARE_BYTES = 512
NUM_OPCODES = 256
_CONTROLLERS_OWN = {
    AdminOpcode.ABORT,
    AdminOpcode.SET_FEATURES,
    AdminOpcode.GET_FEATURES,
    AdminOpcode.ASYNC_EVENT_REQUEST,
    AdminOpcode.KEEP_ALIVE,
}


def discovery_log(
    subsystems: Sequence[str], address: str, port: int, queue_entries: int, generation: int
) -> bytes:
    """DISCOVERY_HEADER and a DISCOVERY_ENTRY for each NQN, all at one IP address as text."""
    header, entries = np.zeros(1, DISCOVERY_HEADER), np.zeros(len(subsystems), DISCOVERY_ENTRY)
    header["genctr"], header["numrec"] = generation, len(subsystems)
    entries["trtype"] = TRANSPORT_TCP
    entries["adrfam"] = AddressFamily.IPV6 if ":" in address else AddressFamily.IPV4
    entries["subtype"] = SubsystemType.NVM
    entries["treq"] = TREQ_SECURE_CHANNEL_NOT_REQUIRED
    entries["cntlid"] = CNTLID_DYNAMIC
    entries["asqsz"] = queue_entries
    entries["trsvcid"], entries["traddr"] = str(port).encode(), address.encode()
    entries["sectype"] = SECTYPE_NONE
    for entry, nqn in zip(entries, subsystems, strict=True):
        entry["subnqn"] = np.void(nqn_field(nqn))
    return header.tobytes() + entries.tobytes()


def commands_supported(controller: Controller, writing: set[int]) -> np.ndarray:
    """'<u4' [1024]: effects by opcode, admin and then I/O commands. writing: those that change data"""
    effects = np.zeros((2, NUM_OPCODES), "<u4")
    effects[0, list({*controller.handlers(is_admin=True), *_CONTROLLERS_OWN})] = COMMAND_SUPPORTED
    effects[1, list(controller.handlers(is_admin=False))] = COMMAND_SUPPORTED
    for opcode in writing:
        effects[1, opcode] |= np.where(effects[1, opcode], COMMAND_CHANGES_DATA, 0).astype("<u4")
    return np.concatenate([effects.reshape(-1), np.zeros(1024 - effects.size, "<u4")])


def firmware_slots(revision: bytes) -> np.ndarray:
    page = np.zeros(FIRMWARE_BYTES, np.uint8)
    page[0] = 1  # the active one
    page[8:16] = np.frombuffer(revision.ljust(8)[:8], np.uint8)
    return page


class LogPages:
    """own: pages by identifier; drive: its handler for all others, or None; its_pages: which it has"""

    def __init__(
        self,
        own: dict[int, Callable[[], np.ndarray | bytes]],
        events: Events,
        drive: Handler | None = None,
        its_pages: Sequence[int] = (),
    ):
        self._own = own | {LogPage.SUPPORTED_LOG_PAGES: self._supported}
        self._events = events
        self._drive = drive
        self._its_pages = its_pages

    def _supported(self) -> np.ndarray:
        page = np.zeros(256, "<u4")
        page[[*self._own, *self._its_pages]] = LOG_PAGE_SUPPORTED
        return page

    def get(self, requests: Sequence[Request]) -> None:
        for request in requests:
            which, page = request.cdw10 & 0xFF, self._own.get(request.cdw10 & 0xFF)
            if page is not None:
                self._answer(request, page())
            elif self._drive is not None:
                self._drive([request])
            else:
                request.fail(CommandFailed(Status.INVALID_LOG_PAGE, detail=f"log {which:#x}"))
            if request.status == Status.SUCCESS and not request.cdw10 & RETAIN_EVENT:
                self._events.log_page_read(which)

    @staticmethod
    def _answer(request: Request, page: np.ndarray | bytes) -> None:
        offset, size = request.cdw12 | request.cdw13 << 32, memoryview(page).nbytes
        if offset > size or offset % 4:
            request.fail(CommandFailed(Status.INVALID_FIELD, detail=f"offset {offset}"))
        else:
            fill(request, page, offset)


__all__ = ["DISCOVERY_LOG_PAGE", "LogPages", "commands_supported", "discovery_log", "firmware_slots"]
