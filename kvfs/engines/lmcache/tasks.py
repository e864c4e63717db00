"""Calls on their way on threads of their own, and what came of them until LMCache asks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lmcache.logging import init_logger
from lmcache.v1.platform import create_event_notifier

from kvfs.errors import KvfsError, NvmeError

logger = init_logger(__name__)


class Tasks:
    """One kind of call: an event fd says that there are results, each of which is given once."""

    def __init__(self, kind: str, num_threads: int):
        self._kind = kind
        self._threads = ThreadPoolExecutor(num_threads, f"kvfs-{kind}")
        self._notifier = create_event_notifier()
        self._lock = threading.Lock()
        self._results: dict[int, object] = {}

    def fileno(self) -> int:
        return self._notifier.fileno()

    def submit(self, number: int, call: Callable, failed: object) -> None:
        """failed: the result of a call that raised; that it did, and why, is logged."""
        self._threads.submit(self._run, number, call, failed)

    def _run(self, number: int, call: Callable, failed: object) -> None:
        result = failed
        try:
            result = call()
        except (KvfsError, NvmeError) as error:
            logger.warning("kvfs: %s failed: %s", self._kind, error)
        except Exception:
            logger.exception("kvfs: %s failed", self._kind)
        finally:
            with self._lock:
                self._results[number] = result
            self._notifier.notify()

    def pop(self, number: int):
        """A result, None as long as there is none."""
        with self._lock:
            return self._results.pop(number, None)

    def pop_all(self) -> dict[int, object]:
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        """Waits for what was submitted."""
        self._threads.shutdown()
        self._notifier.close()
