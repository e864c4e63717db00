"""Attention tickets of one host: its numbers, and the drive's.

Each host chooses its tickets as if it were alone. In the drive every ticket of every host has a number of its
own, which no host learns; so what is not in its table a host can neither fetch nor cancel.
"""

import itertools
import threading
from collections.abc import Callable, Sequence

from spdk_glue.command import NSID, IoOpcode
from spdk_glue.controller import Handler, Request
from spdk_glue.status import CommandFailed, Status

_NUMBERS = itertools.count(1)  # of this process's tickets in the drive
_ANSWER_IS_KEPT = {Status.SGL_LENGTH_INVALID}  # a fetch that fails so may be done again


class Tickets:
    """handlers: the drive's, by opcode."""

    def __init__(self, handlers: dict[int, Handler], max_tickets: int):
        self._inner = handlers
        self._max_tickets = max_tickets
        # The host's number to the drive's, which is negative until the command that starts it is done.
        self._drives: dict[int, int] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[int, Handler]:
        """Those that a host's commands go to; only what the drive has."""
        ours = {
            IoOpcode.ATTENTION_SUBMIT: self._submit,
            IoOpcode.ATTENTION_FETCH: self._fetch,
            IoOpcode.ATTENTION_CANCEL: self._cancel,
        }
        return {opcode: _each(handler) for opcode, handler in ours.items() if opcode in self._inner}

    def drives_ticket(self, ticket: int) -> int | None:
        """The drive's number of a host's ticket; None where there is nothing to wait for."""
        with self._lock:
            found = self._drives.get(ticket, 0)
            return found if found > 0 else None

    def may_start(self, ticket: int) -> bool:
        """Whether the host has not got it, and may have one more."""
        with self._lock:
            return ticket not in self._drives and len(self._drives) < self._max_tickets

    def _call(self, opcode: int, request: Request, ticket: int) -> None:
        """The drive's handler, for its own number. Raises CommandFailed."""
        its, request.cdw10 = request.cdw10, ticket
        try:
            self._inner[opcode]([request])
        finally:
            request.cdw10 = its
        if request.failure is not None:
            detail = request.failure.detail.replace(f"ticket {ticket}", f"ticket {its}")
            raise CommandFailed(
                request.failure.status,
                lba=request.failure.lba,
                detail=detail,
                do_not_retry=request.failure.do_not_retry,
            )

    def _submit(self, request: Request) -> None:
        with self._lock:
            if request.cdw10 in self._drives:
                raise CommandFailed(Status.TICKET_IN_USE, detail=f"ticket {request.cdw10}")
            if len(self._drives) >= self._max_tickets:
                raise CommandFailed(
                    Status.TOO_MANY_TICKETS, detail=f"limit {self._max_tickets}", do_not_retry=False
                )
            ticket = next(_NUMBERS) & 0xFFFFFFFF or next(_NUMBERS) & 0xFFFFFFFF
            self._drives[request.cdw10] = -ticket
        try:
            self._call(IoOpcode.ATTENTION_SUBMIT, request, ticket)
        except CommandFailed:
            self._forget(request.cdw10, -ticket)
            raise
        with self._lock:
            is_wanted = self._drives.get(request.cdw10) == -ticket
            if is_wanted:
                self._drives[request.cdw10] = ticket
        if not is_wanted:  # the controller was reset meanwhile
            self._cancel_in_drive(ticket)

    def _fetch(self, request: Request) -> None:
        ticket = self._existing(request)
        try:
            self._call(IoOpcode.ATTENTION_FETCH, request, ticket)
        except CommandFailed as failure:
            if failure.status not in _ANSWER_IS_KEPT:
                self._forget(request.cdw10, ticket)
            raise
        self._forget(request.cdw10, ticket)

    def _cancel(self, request: Request) -> None:
        ticket = self._existing(request)
        self._forget(request.cdw10, ticket)
        self._call(IoOpcode.ATTENTION_CANCEL, request, ticket)

    def _existing(self, request: Request) -> int:
        ticket = self.drives_ticket(request.cdw10)
        if ticket is None:
            raise CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {request.cdw10}")
        return ticket

    def _forget(self, number: int, ticket: int) -> None:
        with self._lock:
            if self._drives.get(number) == ticket:
                del self._drives[number]

    def cancel_all(self) -> None:
        """The host is gone, or reset its controller: nobody fetches these."""
        with self._lock:
            left = [ticket for ticket in self._drives.values() if ticket > 0]
            self._drives.clear()
        for ticket in left:
            self._cancel_in_drive(ticket)

    def _cancel_in_drive(self, ticket: int) -> None:
        """One that is gone already is as good."""
        self._inner[IoOpcode.ATTENTION_CANCEL](
            [Request(IoOpcode.ATTENTION_CANCEL, NSID, ticket, 0, 0, 0, None)]
        )


def _each(handler: Callable[[Request], None]) -> Handler:
    def run(requests: Sequence[Request]) -> None:
        for request in requests:
            request.status, request.failure = Status.SUCCESS, None
            try:
                handler(request)
            except CommandFailed as failure:
                request.fail(failure)

    return run
