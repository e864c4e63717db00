"""Asynchronous events of one controller: what happened, who waits for it, and what has been looked at since.

An event type that was reported stays silent until its log page has been read, so that a host is not told the
same thing without end.
"""

from collections import deque
from dataclasses import dataclass
from enum import IntEnum

from spdk_glue.identify import WARNING_READ_ONLY, WARNING_SPARE, LogPage
from spdk_glue.status import CommandFailed, Status


class EventType(IntEnum):
    SMART = 1


@dataclass(frozen=True)
class Event:
    type: EventType
    information: int
    log_page: int

    @property
    def result(self) -> int:
        """CDW0 of the completion."""
        return self.type | self.information << 8 | self.log_page << 16


_RELIABILITY, _SPARE = 0x00, 0x02
WARNINGS = {WARNING_SPARE: _SPARE, WARNING_READ_ONLY: _RELIABILITY}  # of SMART: bit to the event's information


class Events:
    def __init__(self, num_requests_max: int):
        self.configuration = 0  # Asynchronous Event Configuration: bits 7:0 are those of SMART's warnings
        self._max = num_requests_max
        self._requests: deque[int] = deque()  # cids
        self._waiting: deque[Event] = deque()
        self._masked: set[int] = set()  # log pages of reported events
        self._seen_warnings = 0

    def request(self, cid: int) -> None:
        """An Asynchronous Event Request. Raises CommandFailed."""
        if len(self._requests) >= self._max:
            raise CommandFailed(Status.ASYNC_EVENT_LIMIT, detail=f"limit {self._max}")
        self._requests.append(cid)

    def abort(self, cid: int) -> bool:
        """Whether this was an outstanding request; it is none now."""
        if cid not in self._requests:
            return False
        self._requests.remove(cid)
        return True

    def note_warnings(self, warnings: int) -> None:
        """The critical warnings of SMART as they are now; those that are new become events."""
        fresh = warnings & ~self._seen_warnings & self.configuration
        self._seen_warnings = warnings
        for bit, information in WARNINGS.items():
            if fresh & bit:
                self._waiting.append(Event(EventType.SMART, information, LogPage.SMART))

    def log_page_read(self, log_page: int) -> None:
        self._masked.discard(log_page)

    def due(self) -> list[tuple[int, Event]]:
        """(cid, event) of the requests that are answered now."""
        found, kept = [], deque()
        while self._waiting:
            event = self._waiting.popleft()
            if self._requests and event.log_page not in self._masked:
                self._masked.add(event.log_page)
                found.append((self._requests.popleft(), event))
            else:
                kept.append(event)
        self._waiting = kept
        return found

    def reset(self) -> None:
        """The controller was reset: requests end without a completion, as their queue does."""
        self.__init__(self._max)
