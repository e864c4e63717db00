"""The event log of a process: what kvfs noted, and every warning of its layers; the newest stay.

An event is a dict: number (ever higher), time_s (Unix), level, source, text, request (see
spdk_glue.request_id; None outside any) and, of those that kvfs notes, kind and facts.
"""

import itertools
import logging
import threading
from collections import deque

from spdk_glue.request_id import current, request_name

MAX_EVENTS = 1000
LOGGERS = ("kvfs", "accel", "ftl", "spdk_glue")
_NOTED = "kvfs_event"  # attribute of a log record that is an event already
log = logging.getLogger("kvfs.events")


class EventLog(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self._events: deque[dict] = deque(maxlen=MAX_EVENTS)
        self._numbers = itertools.count(1)
        self._attaching = threading.Lock()
        self._is_attached = False

    def attach(self) -> None:
        """Hear the layers' warnings from now on. Their levels, and who else hears them, stay as they are."""
        with self._attaching:
            if not self._is_attached:
                for name in LOGGERS:
                    logging.getLogger(name).addHandler(self)
                self._is_attached = True

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _NOTED):
            self._add(record.created, record.levelname.lower(), record.name, record.getMessage())
        # a program that has not set up logging sees warnings on stderr, as if this handler were not there
        if logging.lastResort is not None and not self._is_heard_by_others(record.name):
            logging.lastResort.handle(record)

    def _is_heard_by_others(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False

    def note(self, kind: str, text: str, **facts) -> None:
        """Something that happened and is no trouble. It is in the log as well, at level info."""
        record = logging.LogRecord("kvfs", logging.INFO, "", 0, text, None, None)
        self._add(record.created, "info", "kvfs", text, kind=kind, facts=facts)
        log.info("%s", text, extra={_NOTED: kind, "facts": facts})

    def _add(self, time_s: float, level: str, source: str, text: str, **more) -> None:
        event = {
            "number": next(self._numbers),
            "time_s": time_s,
            "level": level,
            "source": source,
            "text": " ".join(text.split()),
            "request": request_name(current.request),
            **more,
        }
        self._events.append(event)

    def newest(self, after: int = 0) -> list[dict]:
        """Those with a higher number, oldest first."""
        return [event for event in self._events.copy() if event["number"] > after]


EVENTS = EventLog()
