"""The controller side: from submission entries to handlers, from outcomes to completion entries.

A handler takes a run of requests of one opcode, so that sixteen Writes of one doorbell become one
batch for the flash. A failure of a handler is a status code in the completion and an entry in the error
log page, never an exception across the seam.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from spdk_glue import status as nvme_status
from spdk_glue.command import (
    COMPLETION_ENTRY,
    MAY_MOVE_NOTHING,
    NSID,
    NSID_ALL,
    Direction,
    direction,
)
from spdk_glue.identify import ERROR_LOG_ENTRIES, ERROR_LOG_ENTRY, LBA_UNKNOWN
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)

ADMIN_QUEUE = 0


@dataclass(slots=True)
class Request:
    """One command as a handler sees it. `data` is uint8, None where the command moves nothing."""

    opcode: int
    nsid: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    data: np.ndarray | None
    status: int = Status.SUCCESS
    result: int = 0  # completion CDW0
    failure: CommandFailed | None = None

    @property
    def first_lba(self) -> int:
        return self.cdw10 | self.cdw11 << 32

    @property
    def num_lbas(self) -> int:
        return (self.cdw12 & 0xFFFF) + 1

    def fail(self, failure: CommandFailed) -> None:
        self.status = failure.status
        self.failure = failure


Handler = Callable[[Sequence[Request]], None]
BatchHandler = Callable[[np.ndarray, Sequence[np.ndarray | None]], bool]
REQUEST_FIELDS = ["opcode", "nsid", "cdw10", "cdw11", "cdw12", "cdw13"]


@dataclass
class ErrorLog:
    """The newest failures, for the error information log page."""

    count: int = 0
    entries: deque = field(default_factory=lambda: deque(maxlen=ERROR_LOG_ENTRIES))

    def add(self, queue_id: int, cid: int, request: Request) -> None:
        self.count += 1
        entry = np.zeros(1, ERROR_LOG_ENTRY)
        entry["error_count"] = self.count
        entry["sqid"] = queue_id
        entry["cid"] = cid
        entry["status"] = nvme_status.encode(request.status)
        failure = request.failure
        entry["lba"] = LBA_UNKNOWN if failure is None or failure.lba is None else failure.lba
        entry["nsid"] = request.nsid
        entry["opcode"] = request.opcode
        if failure is not None:
            entry["detail"] = failure.detail.encode("ascii", "replace")  # cut to its field
        self.entries.appendleft(entry)

    def page(self) -> np.ndarray:
        """uint8: ERROR_LOG_ENTRY records, newest first, then zeros."""
        page = np.zeros(ERROR_LOG_ENTRIES, ERROR_LOG_ENTRY)
        for index, entry in enumerate(self.entries):
            page[index] = entry[0]
        return page.view(np.uint8)


class Controller:
    """Opcode dispatch of one drive.

    io_handlers, admin_handlers: opcode to handler. They may be called from several threads at once.
    batch_handlers: opcode to what first tries a doorbell's I/O commands, all of this opcode, as arrays: their
        SUBMISSION_ENTRY records and buffers. False, or an error, where not all of them are done and right; then
        each becomes a request.
    """

    def __init__(
        self,
        io_handlers: dict[int, Handler],
        admin_handlers: dict[int, Handler],
        batch_handlers: dict[int, BatchHandler] | None = None,
    ):
        self._batch_handlers = batch_handlers or {}
        self._handlers = {False: dict(admin_handlers), True: dict(io_handlers)}
        self.error_log = ErrorLog()
        self._error_lock = threading.Lock()

    def handlers(self, is_admin: bool) -> dict[int, Handler]:
        return dict(self._handlers[not is_admin])

    @property
    def batch_handlers(self) -> dict[int, BatchHandler]:
        return dict(self._batch_handlers)

    def with_handlers(
        self,
        io_handlers: dict[int, Handler],
        admin_handlers: dict[int, Handler],
        batch_handlers: dict[int, BatchHandler] | None = None,
    ) -> "Controller":
        """Another of the same drive: other handlers for some opcodes, and an error log of its own."""
        return Controller(
            self._handlers[True] | io_handlers,
            self._handlers[False] | admin_handlers,
            self._batch_handlers | (batch_handlers or {}),
        )

    def execute(self, queue_id: int, entries: np.ndarray, buffers: Sequence[np.ndarray | None]) -> np.ndarray:
        """Run a batch of SUBMISSION_ENTRY records; COMPLETION_ENTRY [n] in the same order."""
        completions = np.zeros(len(entries), COMPLETION_ENTRY)
        completions["cid"] = entries["cid"]
        completions["sqid"] = queue_id
        if queue_id != ADMIN_QUEUE and self._is_done_at_once(entries, buffers):
            return completions
        requests = [
            Request(*values, data)
            for values, data in zip(entries[REQUEST_FIELDS].tolist(), buffers, strict=True)
        ]
        handlers = self._handlers[queue_id != ADMIN_QUEUE]
        for opcode, run in groupby(requests, key=lambda request: request.opcode):
            self._dispatch(handlers.get(opcode), [r for r in run if self._accept(queue_id, r)])
        for position, request in enumerate(requests):
            if request.result:
                completions["cdw0"][position] = request.result & 0xFFFFFFFF
            if request.status != Status.SUCCESS:
                completion = completions[position]
                completion["status"] = self._log_failure(queue_id, int(completion["cid"]), request)
        return completions

    def execute_one(self, queue_id: int, cid: int, request: Request) -> tuple[int, int]:
        """Run one command, without arrays: (status field, CDW0) of its completion."""
        if self._accept(queue_id, request):
            self._dispatch(self._handlers[queue_id != ADMIN_QUEUE].get(request.opcode), [request])
        status = 0
        if request.status != Status.SUCCESS:
            status = self._log_failure(queue_id, cid, request)
        return status, request.result & 0xFFFFFFFF

    def _log_failure(self, queue_id: int, cid: int, request: Request) -> int:
        """The status field of its completion."""
        with self._error_lock:
            self.error_log.add(queue_id, cid, request)
        do_not_retry = request.failure is None or request.failure.do_not_retry
        return nvme_status.encode(request.status, more=True, do_not_retry=do_not_retry)

    def note_failure(self, queue_id: int, cid: int, opcode: int, failure: CommandFailed) -> None:
        """Of a command that came to no handler."""
        request = Request(opcode, 0, 0, 0, 0, 0, None, failure.status, failure=failure)
        with self._error_lock:
            self.error_log.add(queue_id, cid, request)

    def _is_done_at_once(self, entries: np.ndarray, buffers: Sequence[np.ndarray | None]) -> bool:
        handler = self._batch_handlers.get(int(entries["opcode"][0])) if len(entries) > 1 else None
        if handler is None or (entries["opcode"] != entries["opcode"][0]).any():
            return False
        try:
            return bool((entries["nsid"] == NSID).all()) and handler(entries, buffers)
        except Exception:
            return False  # what it is, and whose, is found out command by command

    @staticmethod
    def _accept(queue_id: int, request: Request) -> bool:
        """Checks that hold for every command; a refused one gets its status here."""
        if direction(request.opcode) == 3:
            request.fail(CommandFailed(Status.INVALID_OPCODE, detail="bidirectional"))
        elif (
            direction(request.opcode) != Direction.NONE
            and request.data is None
            and request.opcode not in MAY_MOVE_NOTHING
        ):
            request.fail(CommandFailed(Status.DATA_TRANSFER_ERROR, detail="no data buffer"))
        elif queue_id != ADMIN_QUEUE and request.nsid not in (NSID, NSID_ALL):
            request.fail(CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid}"))
        return request.status == Status.SUCCESS

    @staticmethod
    def _dispatch(handler: Handler | None, requests: list[Request]) -> None:
        if not requests:
            return
        if handler is None:
            failure = CommandFailed(Status.INVALID_OPCODE, detail=f"opcode {requests[0].opcode:#04x}")
            for request in requests:
                request.fail(failure)
            return
        try:
            handler(requests)
        except CommandFailed as failure:
            for request in requests:
                request.fail(failure)
        except Exception:
            # A bug of ours must not take the host down; it is an error status with a traceback in the log.
            log.exception("handler of opcode %#04x failed", requests[0].opcode)
            failure = CommandFailed(Status.INTERNAL_ERROR, detail="see the drive's log")
            for request in requests:
                request.fail(failure)
