"""One host's controller: its registers, features, events, tickets and queues, for as long as its admin queue.

Several connections (threads) share it; what changes is guarded by its lock. It does no I/O: it says with
`ended` that it is over, and wakes its connections to see that.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from spdk_glue import command
from spdk_glue.command import AdminOpcode, IoOpcode, Maintenance
from spdk_glue.controller import ADMIN_QUEUE, REQUEST_FIELDS, Controller, Handler, Request
from spdk_glue.fabrics.records import (
    CC_ENABLE,
    CC_SHUTDOWN,
    CSTS_READY,
    CSTS_SHUTDOWN_COMPLETE,
    VERSION_2_0,
    Property,
    capabilities,
)
from spdk_glue.fabrics.target.events import Events
from spdk_glue.fabrics.target.features import Features
from spdk_glue.fabrics.target.identity import KEEP_ALIVE_GRANULARITY_MS, KEEP_ALIVE_UNITS
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.tickets import Tickets
from spdk_glue.identify import SMART_LOG, LogPage
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)

READY_TIMEOUT_MS = 5000  # of CAP; ours is ready at once
HEALTH_SECONDS = 5.0  # between two looks at the drive's warnings
# A host sends Keep Alive at half the timeout or later; a network and a busy machine may delay it this much.
KEEP_ALIVE_GRACE_MS = 1000
WRITING = {IoOpcode.WRITE, IoOpcode.DATASET_MANAGEMENT, IoOpcode.SEAL_GROUPS}
_LOOKING = {Maintenance.CHECK, Maintenance.DROP_CACHE}


class Queue(Protocol):
    """A connection, as the controller knows it."""

    def wake(self) -> None:
        """Have it look at its controller soon. From any thread."""


class Association:
    """handlers: given by the subsystem, which makes (I/O, admin) handlers for an association

    Attributes that never change: cntlid, subnqn, hostnqn, host_id, limits, is_discovery.
    """

    def __init__(
        self,
        cntlid: int,
        subnqn: str,
        hostnqn: str,
        host_id: bytes,
        limits: Limits,
        *,
        keep_alive_ms: int,
        now: float,
        is_discovery: bool = False,
        is_read_only: bool = False,
    ):
        self.cntlid, self.subnqn, self.hostnqn, self.host_id = cntlid, subnqn, hostnqn, host_id
        self.limits = limits
        self.is_discovery, self.is_read_only = is_discovery, is_read_only
        self.lock = threading.RLock()
        self.events = Events(limits.num_events)
        self._keep_alive_ms = self._round(keep_alive_ms)
        self.features = self._new_features()
        self.controller: Controller | None = None
        self.tickets: Tickets | None = None
        self.queues: dict[int, Queue] = {}
        self.ended: str | None = None  # why
        self._configuration = self._status = 0  # CC, CSTS
        self._last_seen = self._health_seen = now

    def serve(self, controller: Controller, tickets: Tickets | None = None) -> None:
        """What the host's commands go to."""
        self.controller, self.tickets = controller, tickets

    def _new_features(self) -> Features:
        return Features(
            self.limits.max_io_queues,
            self.host_id,
            self._keep_alive_ms,
            self._set_keep_alive,
            self._configure_events,
        )

    def _configure_events(self, value: int) -> None:
        self.events.configuration = value

    # Time.

    @staticmethod
    def _round(timeout_ms: int) -> int:
        """Up to the granularity that KAS says."""
        unit = KEEP_ALIVE_UNITS * KEEP_ALIVE_GRANULARITY_MS
        return -(-timeout_ms // unit) * unit

    def _set_keep_alive(self, timeout_ms: int) -> int:
        self._keep_alive_ms = self._round(timeout_ms)
        return self._keep_alive_ms

    def saw_host(self, now: float) -> None:
        """A command came, on any queue."""
        self._last_seen = now

    def check_time(self, now: float) -> None:
        """Called by the admin connection now and then: ends a silent host's controller, looks at warnings."""
        silent = now - self._last_seen
        if self._keep_alive_ms and silent * 1000 > self._keep_alive_ms + KEEP_ALIVE_GRACE_MS:
            self.end(f"keep alive: nothing for {silent:.1f} s")
        elif self.is_discovery and not self._keep_alive_ms and silent > self.limits.discovery_idle_seconds:
            self.end(f"idle for {silent:.0f} s")
        if not self.is_discovery and now - self._health_seen > HEALTH_SECONDS:
            self._health_seen = now
            self._look_at_health()

    def _look_at_health(self) -> None:
        page = np.zeros(1, SMART_LOG)
        entry = command.get_log_page(LogPage.SMART, page.nbytes)
        entry["cdw10"] |= 1 << 15  # the host has not read it
        handler = self.controller.handlers(is_admin=True).get(AdminOpcode.GET_LOG_PAGE)
        if handler is None:
            return
        fields = [int(entry[name][0]) for name in REQUEST_FIELDS]
        request = Request(*fields, page.view(np.uint8))
        handler([request])
        if request.failure is None:
            with self.lock:
                self.events.note_warnings(int(page["critical_warning"][0]))

    # Registers.

    @property
    def is_enabled(self) -> bool:
        return bool(self._status & CSTS_READY)

    def get_property(self, offset: int, is_8_bytes: bool) -> int:
        """Raises CommandFailed."""
        values = {
            (Property.CAP, True): lambda: capabilities(self.limits.queue_entries, READY_TIMEOUT_MS),
            (Property.VS, False): lambda: VERSION_2_0,
            (Property.CC, False): lambda: self._configuration,
            (Property.CSTS, False): lambda: self._status,
            (Property.NSSR, False): lambda: 0,
        }
        value = values.get((offset, is_8_bytes))
        if value is None:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"property {offset:#x}")
        return value()

    def set_property(self, offset: int, is_8_bytes: bool, value: int) -> None:
        """Raises CommandFailed."""
        if offset != Property.CC or is_8_bytes:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"property {offset:#x}")
        with self.lock:
            was_enabled = self.is_enabled
            self._configuration = value & 0xFFFFFFFF
            if value & CC_SHUTDOWN:
                self._status |= CSTS_SHUTDOWN_COMPLETE
                self._flush()
            if was_enabled and not value & CC_ENABLE:
                self._reset()
            elif not was_enabled and value & CC_ENABLE:
                self._status = CSTS_READY

    def _flush(self) -> None:
        """An orderly shutdown makes durable what the host wrote."""
        handler = None if self.is_discovery else self.controller.handlers(is_admin=False).get(IoOpcode.FLUSH)
        if handler is not None and not self.is_read_only:
            request = Request(IoOpcode.FLUSH, command.NSID, 0, 0, 0, 0, None)
            handler([request])
            if request.failure is not None:
                log.error("host %s: flush at its shutdown: %s", self.hostnqn, request.failure)

    def _reset(self) -> None:
        """The host disabled its controller: I/O queues, tickets, events and features are as at the start."""
        self._status &= ~CSTS_READY & ~CSTS_SHUTDOWN_COMPLETE
        queues = [self.queues.pop(qid) for qid in list(self.queues) if qid != ADMIN_QUEUE]
        self.events.reset()
        self.features = self._new_features()
        for queue in queues:
            queue.wake()
        if self.tickets is not None:
            self.tickets.cancel_all()

    # Queues.

    def add_queue(self, qid: int, queue: Queue) -> None:
        """Raises CommandFailed."""
        with self.lock:
            if self.ended is not None:
                raise CommandFailed(Status.CONNECT_INVALID_PARAMETERS, detail="controller is gone")
            if qid != ADMIN_QUEUE and not self.is_enabled:
                raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail="not enabled")
            if qid != ADMIN_QUEUE and (self.is_discovery or qid > self.features.num_io_queues):
                raise CommandFailed(Status.INVALID_QUEUE, detail=f"queue {qid}")
            if qid in self.queues:
                raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail=f"queue {qid} exists")
            self.queues[qid] = queue

    def has_queue(self, qid: int, queue: Queue) -> bool:
        return self.queues.get(qid) is queue

    def drop_queue(self, qid: int, queue: Queue) -> None:
        """Its connection is over. The admin queue takes the controller with it."""
        with self.lock:
            if self.queues.get(qid) is queue:
                del self.queues[qid]
        if qid == ADMIN_QUEUE:
            self.end("the admin connection is over")

    def end(self, why: str) -> None:
        """For good. Every connection sees it and closes."""
        with self.lock:
            if self.ended is not None:
                return
            self.ended = why
            queues = list(self.queues.values())
            self.queues.clear()
        log.info("host %s, controller %d ends: %s", self.hostnqn, self.cntlid, why)
        for queue in queues:
            queue.wake()
        if self.tickets is not None:
            self.tickets.cancel_all()

    # Commands.

    def execute(self, qid: int, entries: np.ndarray, buffers: Sequence[np.ndarray | None]) -> np.ndarray:
        return self.controller.execute(qid, entries, buffers)


def _refuse_writing(requests: Sequence[Request]) -> None:
    for request in requests:
        request.fail(CommandFailed(Status.NAMESPACE_WRITE_PROTECTED, detail="host may only read"))


def protected_io(handlers: dict[int, Handler]) -> dict[int, Handler]:
    """For a host that may only read: handlers in place of those that change something."""
    return {opcode: _refuse_writing for opcode in WRITING if opcode in handlers}


def protected_admin(handlers: dict[int, Handler]) -> dict[int, Handler]:
    """As protected_io. Looking at the flash is no change."""
    maintain = handlers.get(AdminOpcode.FLASH_MAINTENANCE)
    if maintain is None:
        return {}

    def look_only(requests: Sequence[Request]) -> None:
        for request in requests:
            (maintain if request.cdw10 in _LOOKING else _refuse_writing)([request])

    return {AdminOpcode.FLASH_MAINTENANCE: look_only}
