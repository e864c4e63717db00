"""Which request a thread works for: the same identifier in its spans, its log lines and its error.

A number in the thread, made text only where somebody reads it. Work that goes to another thread takes its
request along: `carried`. Attention commands take it to a drive on the wire, see command.vendor: it is then the
host's, which a drive does not check.
"""

import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
NUMBER_BITS = 32  # the number's within its process; the process is above it


class _Current(threading.local):
    request: int | None = None


current = _Current()


def _of_a_new_process() -> Iterator[int]:
    return itertools.count((secrets.randbelow((1 << 32) - 1) + 1 << NUMBER_BITS) + 1)


_requests = _of_a_new_process()


def _renew() -> None:
    """A forked child's requests are not its parent's."""
    global _requests
    _requests = _of_a_new_process()


os.register_at_fork(after_in_child=_renew)


def new_request() -> int:
    """Its process, which is not zero, and its number there."""
    return next(_requests)


def request_name(request: int | None) -> str | None:
    """As logs, traces and errors have it: of one process and no other, such as 3f9a12c4-17."""
    return None if request is None else f"{request >> NUMBER_BITS:08x}-{request & (1 << NUMBER_BITS) - 1}"


@contextmanager
def working_for(request: int | None) -> Iterator[None]:
    """What this thread does meanwhile belongs to a request of somebody else; None: to whose it does already."""
    outer = current.request
    if request is not None:
        current.request = request
    try:
        yield
    finally:
        current.request = outer


def carried(work: Callable[..., Result]) -> Callable[..., Result]:
    """The same work, for another thread to do for the caller's request."""
    request = current.request
    if request is None:
        return work

    def run(*arguments):
        outer, current.request = current.request, request
        try:
            return work(*arguments)
        finally:
            current.request = outer

    return run
