"""Reservations of the namespace: the state table of the target's side. See spdk_glue/reservation.py.

A registrant is a host, by its identifier, with a key. At most one holds the namespace, and keeps it when
its connections end: others see that it is gone, and may pre-empt it. With a file they survive the target: its
hosts then have RETURN_SECONDS to come back, in which they count as present.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from spdk_glue.command import IoOpcode
from spdk_glue.controller import BatchHandler, Handler, Request
from spdk_glue.fabrics.target.reservation_file import ReservationFile, ReservationState
from spdk_glue.reservation import (
    ACQUIRE_DATA,
    EXTENDED_DATA,
    HOLDS,
    IGNORE_EXISTING_KEY,
    REGISTER_DATA,
    REGISTRANT,
    REGISTRANT_GONE,
    REGISTRANT_PRESENT,
    RELEASE_DATA,
    REPORT_HEADER,
    Acquire,
    Register,
    Release,
    ReservationType,
)
from spdk_glue.status import CommandFailed, Status

MAX_REGISTRANTS = 64
RETURN_SECONDS = 20.0  # a host tries so long, and some, to connect again
RESCAP = (
    1 << ReservationType.WRITE_EXCLUSIVE | 1 << ReservationType.EXCLUSIVE_ACCESS | 1 << 7
)  # key rules of 1.3
OPCODES = {
    IoOpcode.RESERVATION_REGISTER,
    IoOpcode.RESERVATION_REPORT,
    IoOpcode.RESERVATION_ACQUIRE,
    IoOpcode.RESERVATION_RELEASE,
}
# what others may do with a namespace that is held against writing
READING = {
    IoOpcode.READ,
    IoOpcode.COMPARE,
    IoOpcode.VERIFY,
    IoOpcode.ATTENTION_SUBMIT,
    IoOpcode.ATTENTION_FETCH,
}


@dataclass
class Reservations:
    """is_present: whether a host, by its identifier, has a controller now. From any thread.
    file: where they are kept; None: nowhere
    """

    is_present: Callable[[bytes], bool]
    file: ReservationFile | None = None
    _keys: dict[bytes, int] = field(default_factory=dict)
    _holder: bytes | None = None
    _type: int = 0
    _generation: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        found = self.file.read() if self.file is not None else None
        self._returning: frozenset[bytes] = frozenset()
        if found is not None:
            self._keys, self._holder = dict(found.keys), found.holder
            self._type, self._generation = found.kind, found.generation
            self._returning, self._returning_until = frozenset(self._keys), time.monotonic() + RETURN_SECONDS

    def _is_there(self, host_id: bytes) -> bool:
        """Whether a host uses the namespace, as far as can be known."""
        is_returning = host_id in self._returning and time.monotonic() < self._returning_until
        return is_returning or self.is_present(host_id)

    def _keep(self) -> None:
        """Raises CommandFailed."""
        if self.file is None:
            return
        try:
            self.file.write(ReservationState(self._keys, self._holder, self._type, self._generation))
        except OSError as error:
            raise CommandFailed(Status.INTERNAL_ERROR, detail=f"reservations not kept: {error}") from error

    def refuses(self, host_id: bytes, opcode: int) -> bool:
        """Whether an I/O command of a host meets another's reservation."""
        holder = self._holder
        if holder is None or holder == host_id or opcode in OPCODES:
            return False
        return self._type == ReservationType.EXCLUSIVE_ACCESS or opcode not in READING

    def guarded(self, host_id: bytes, handlers: dict[int, Handler]) -> dict[int, Handler]:
        """A host's I/O handlers that refuse what meets another's reservation."""

        def guarded_one(opcode: int, handler: Handler) -> Handler:
            def handle(requests: Sequence[Request]) -> None:
                if self.refuses(host_id, opcode):
                    raise _conflict("another host holds the namespace")
                handler(requests)

            return handle

        return {opcode: guarded_one(opcode, handler) for opcode, handler in handlers.items()}

    def guarded_batches(self, host_id: bytes, handlers: dict[int, BatchHandler]) -> dict[int, BatchHandler]:
        """The same for handlers of whole batches, which leave refusals to those of single commands."""

        def guarded_one(opcode: int, handler: BatchHandler) -> BatchHandler:
            return lambda entries, buffers: not self.refuses(host_id, opcode) and handler(entries, buffers)

        return {opcode: guarded_one(opcode, handler) for opcode, handler in handlers.items()}

    def handlers(self, host_id: bytes) -> dict[int, Handler]:
        actions = {
            IoOpcode.RESERVATION_REGISTER: self._register,
            IoOpcode.RESERVATION_ACQUIRE: self._acquire,
            IoOpcode.RESERVATION_RELEASE: self._release,
            IoOpcode.RESERVATION_REPORT: self._report,
        }

        def handler_of(action) -> Handler:
            def handle(requests: Sequence[Request]) -> None:
                for request in requests:
                    try:
                        with self._lock:
                            action(host_id, request)
                            if action != self._report:
                                self._keep()
                    except CommandFailed as failure:
                        request.fail(failure)

            return handle

        return {opcode: handler_of(action) for opcode, action in actions.items()}

    # one command, with the lock held

    def _register(self, host_id: bytes, request: Request) -> None:
        data, action = _data_of(request, REGISTER_DATA), request.cdw10 & 7
        key, ignores = self._keys.get(host_id), bool(request.cdw10 & IGNORE_EXISTING_KEY)
        if action == Register.UNREGISTER:
            self._check_key(host_id, int(data["current_key"]), ignores)
            del self._keys[host_id]
            if self._holder == host_id:
                self._holder = None
        elif action in (Register.REGISTER, Register.REPLACE):
            new_key = int(data["new_key"])
            fits = key in (None, new_key) if action == Register.REGISTER else key == int(data["current_key"])
            if not (fits or ignores):
                raise _conflict("not registered, or with another key")
            if key is None and len(self._keys) >= MAX_REGISTRANTS:
                self._forget_one_that_is_gone()
            self._keys[host_id] = new_key
        else:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"reservation register {action}")
        self._generation += 1

    def _forget_one_that_is_gone(self) -> None:
        for host_id in self._keys:
            if host_id != self._holder and not self._is_there(host_id):
                del self._keys[host_id]
                return
        raise CommandFailed(Status.INTERNAL_ERROR, detail=f"{MAX_REGISTRANTS} hosts are registered")

    def _acquire(self, host_id: bytes, request: Request) -> None:
        data, action, kind = _data_of(request, ACQUIRE_DATA), request.cdw10 & 7, request.cdw10 >> 8 & 0xFF
        self._check_key(host_id, int(data["current_key"]))
        if kind not in list(ReservationType) or action not in list(Acquire):
            raise CommandFailed(Status.INVALID_FIELD, detail=f"reservation type {kind}, action {action}")
        if action == Acquire.PREEMPT:
            preempted = [one for one, key in self._keys.items() if key == int(data["preempted_key"])]
            if not preempted:
                raise _conflict("no registrant has the key that is to be pre-empted")
            had_holder = self._holder in preempted
            for one in preempted:
                if one != host_id:
                    del self._keys[one]
            self._generation += 1
            if had_holder:
                self._holder, self._type = host_id, kind
            return
        if self._holder is not None and (self._holder != host_id or self._type != kind):
            raise _conflict("another host holds it")
        self._holder, self._type = host_id, kind

    def _release(self, host_id: bytes, request: Request) -> None:
        data, action = _data_of(request, RELEASE_DATA), request.cdw10 & 7
        self._check_key(host_id, int(data["current_key"]))
        if action == Release.CLEAR:
            self._keys.clear()
            self._holder = None
            self._generation += 1
        elif action != Release.RELEASE:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"reservation release {action}")
        elif self._holder == host_id:
            if request.cdw10 >> 8 & 0xFF != self._type:
                raise CommandFailed(Status.INVALID_FIELD, detail="another type of reservation is held")
            self._holder = None

    def _report(self, host_id: bytes, request: Request) -> None:
        if not request.cdw11 & EXTENDED_DATA:
            raise CommandFailed(Status.HOST_IDENTIFIER_INCONSISTENT, detail="hosts have 128-bit identifiers")
        if request.data is None or request.data.nbytes < (request.cdw10 + 1) * 4:
            raise CommandFailed(Status.DATA_TRANSFER_ERROR, detail="no room for the report")
        header, registrants = np.zeros(1, REPORT_HEADER), np.zeros(len(self._keys), REGISTRANT)
        header["generation"], header["num_registrants"] = self._generation, len(self._keys)
        header["type"] = self._type if self._holder is not None else 0
        for record, (one, key) in zip(registrants, self._keys.items(), strict=True):
            record["cntlid"] = REGISTRANT_PRESENT if self._is_there(one) else REGISTRANT_GONE
            record["status"] = HOLDS if one == self._holder else 0
            record["key"], record["host_id"] = key, np.void(one)
        page = np.frombuffer(header.tobytes() + registrants.tobytes(), np.uint8)[: request.data.nbytes]
        request.data[: len(page)] = page
        request.data[len(page) :] = 0

    def _check_key(self, host_id: bytes, key: int, ignores: bool = False) -> None:
        known = self._keys.get(host_id)
        if known is None or (known != key and not ignores):
            raise _conflict("not registered, or with another key")


def _conflict(detail: str) -> CommandFailed:
    return CommandFailed(Status.RESERVATION_CONFLICT, detail=detail)


def _data_of(request: Request, form: np.dtype) -> np.void:
    if request.data is None or request.data.nbytes < form.itemsize:
        raise CommandFailed(Status.DATA_TRANSFER_ERROR, detail="a reservation's data are not there")
    return request.data[: form.itemsize].view(form)[0]
