"""Spans of all layers, for who wants to see where a request's time goes: a ring, filled while a trace is on.

Off, which it is by default, a span costs whoever times it one branch. Times are those of the monotonic clock,
which all processes of a host share.
"""

import threading
from collections import deque
from typing import Any, NamedTuple

from spdk_glue.request_id import current

DEFAULT_SPANS = 1 << 16  # the newest stay: some hundred bytes each


class Span(NamedTuple):
    """layer: host, queue, ftl, media or kernel; is_wait: nothing ran on the thread meanwhile, and other waits
    may overlap it; request: see request_id; note: facts, JSON's types"""

    layer: str
    name: str
    start_ns: int
    stop_ns: int
    thread: str
    is_wait: bool
    request: int | None
    note: dict[str, Any] | None


class Trace:
    """One for a process: its layers are, too. is_on: to be looked at before `add`."""

    def __init__(self):
        self.is_on = False
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=0)

    def start(self, max_spans: int = DEFAULT_SPANS) -> bool:
        """False: one is under way, and goes on as it is."""
        with self._lock:
            if self.is_on:
                return False
            self._spans = deque(maxlen=max_spans)
            self.is_on = True
            return True

    def stop(self) -> list[Span]:
        """What was seen since `start`, as it ended; of too many the newest."""
        with self._lock:
            self.is_on = False
            spans, self._spans = self._spans, deque(maxlen=0)
        return list(spans.copy())

    def add(
        self,
        layer: str,
        name: str,
        start_ns: int,
        stop_ns: int,
        note: dict | None = None,
        is_wait: bool = False,
    ) -> None:
        """Of the calling thread. A deque's append needs no lock."""
        thread = threading.current_thread().name
        self._spans.append(Span(layer, name, start_ns, stop_ns, thread, is_wait, current.request, note))


TRACE = Trace()
