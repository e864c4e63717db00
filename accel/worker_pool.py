"""The threads that compute attention, one per CPU, and how they share the units that are ready.

Work arrives as ranges of units. All threads work on the oldest range until its units are taken, one at a
time and without a call in between (see UnitRange), so they end together.

Each thread stays on its CPU. Threads that are woken together are often put on one CPU and parted only after
some 10 ms, longer than a decode command takes: bursts of 4 ms in two free threads got 0.98 of two CPUs.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

from accel.workers import UnitRange
from spdk_glue.probes import Probe
from spdk_glue.request_id import current


@dataclass
class _Work:
    units: UnitRange
    compute: Callable[[UnitRange], None]
    ended: Callable[[], None]
    ready_ns: int
    request: int | None
    num_threads: int = 0  # at work on it


class WorkerPool:
    """A fixed number of threads. `submit` never blocks: whoever submits bounds what is under way."""

    def __init__(self, num_workers: int, waited: Probe | None = None):
        """waited: told how long work was ready before a thread took it."""
        self.num_workers = num_workers
        self._waited = waited or Probe("queue", "worker_wait", is_wait=True)
        self._waiting: deque[_Work] = deque()
        self._closed = False
        self._changed = threading.Condition(threading.Lock())
        cpus = sorted(os.sched_getaffinity(0))
        own_cpu = cpus if num_workers <= len(cpus) else [None] * num_workers
        self._threads = [
            threading.Thread(target=self._run, args=(own_cpu[i],), name=f"kvfs-worker-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, units: UnitRange, compute: Callable[[UnitRange], None], ended: Callable[[], None]) -> None:
        """Have `compute(units)` called by several threads, and `ended` by the last of them.

        compute returns when it finds all units taken. Neither may raise. `ended` of a range without units is
        called at once, by the caller's thread. Raises RuntimeError once the pool is closed.
        """
        if not len(units):
            ended()
            return
        with self._changed:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            self._waiting.append(_Work(units, compute, ended, perf_counter_ns(), current.request))
            self._changed.notify(min(self.num_workers, len(units)))

    def _next(self) -> _Work | None:
        """The oldest range with units left, waited for; None when the pool has closed."""
        while True:
            while self._waiting and not len(self._waiting[0].units):
                self._waiting.popleft()
            if self._waiting:
                return self._waiting[0]
            if self._closed:
                return None
            self._changed.wait()

    def _run(self, cpu: int | None) -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        while True:
            with self._changed:
                work = self._next()
                if work is None:
                    return
                work.num_threads += 1
            current.request = work.request
            self._waited.since(work.ready_ns)
            work.compute(work.units)
            with self._changed:
                work.num_threads -= 1
                is_last = work.num_threads == 0 and not len(work.units)
            if is_last:
                work.ended()
            del work  # or its arrays would stay while this thread waits for the next

    def close(self) -> None:
        """Compute what was submitted, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
