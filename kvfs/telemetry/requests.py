"""Requests of a store: how long they take, how many fail, and an identifier for each.

What a request does in other layers carries its identifier, see spdk_glue.request_id.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import wraps
from time import perf_counter_ns
from typing import TypeVar

from kvfs.errors import KvfsError
from spdk_glue.probes import Probe, Probes
from spdk_glue.request_id import current, new_request, request_name
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)
OPERATIONS = (
    "attend",
    "append",
    "read",
    "flush",
    "find_prefix",
    "restore_prefix",
    "put_objects",
    "get_objects",
)
Method = TypeVar("Method", bound=Callable)


class Requests:
    """Of one store. layer: host, or client where another process has the store."""

    def __init__(self, layer: str = "host"):
        self.probes = {name: Probe(layer, name) for name in OPERATIONS}
        self._all = Probes(*self.probes.values())
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def latencies(self) -> list[dict]:
        """See Probes.as_dicts."""
        return self._all.as_dicts()

    def failures(self) -> dict[str, int]:
        """By operation, of all of them."""
        with self._lock:
            return {name: self._failures[name] for name in OPERATIONS}

    def failed(self, operation: str, error: Exception) -> None:
        """Count and log it, and give it its `request_id`."""
        if isinstance(error, KvfsError | NvmeError) and not hasattr(error, "request_id"):
            error.request_id = request_name(current.request)
        with self._lock:
            self._failures[operation] += 1
        log.info("%s failed: %s", operation, error)


def request(operation: str, of: str | None = None) -> Callable[[Method], Method]:
    """Of a method of a store, or of what has its store as `of`: it is a request, unless it is a part of one."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def timed(self, *arguments, **options):
            if current.request is not None:
                return method(self, *arguments, **options)
            requests: Requests = (self if of is None else getattr(self, of))._requests
            current.request = new_request()
            started = perf_counter_ns()
            try:
                return method(self, *arguments, **options)
            except Exception as error:
                requests.failed(operation, error)
                raise
            finally:
                requests.probes[operation].since(started)
                current.request = None

        return timed

    return decorate
