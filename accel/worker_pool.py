"""The threads that compute attention, one per CPU, and how they share the units that are ready.

Work arrives as ranges of units. Threads take shares of what waits, large at first and smaller towards the
end (guided self-scheduling: Polychronopoulos and Kuck, 1987), so few calls are made and all end together.

Each thread stays on its CPU. Threads that are woken together are often put on one CPU and parted only after
some 10 ms, longer than a decode command takes: bursts of 4 ms in two free threads got 0.98 of two CPUs.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _UnitRange:
    """Units [next_unit, stop_unit) that nobody has taken yet."""

    compute: Callable[[int, int], None]
    next_unit: int
    stop_unit: int


class WorkerPool:
    """A fixed number of threads. `submit` never blocks: whoever submits bounds what is under way."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._waiting: deque[_UnitRange] = deque()
        self._units_waiting = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())
        cpus = sorted(os.sched_getaffinity(0))
        own_cpu = cpus if num_workers <= len(cpus) else [None] * num_workers
        self._threads = [
            threading.Thread(target=self._work, args=(own_cpu[i],), name=f"kvfs-worker-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, compute: Callable[[int, int], None], first_unit: int, stop_unit: int) -> None:
        """Have `compute(first unit, stop unit)` called for shares of the range. It must not raise."""
        with self._changed:
            self._waiting.append(_UnitRange(compute, first_unit, stop_unit))
            self._units_waiting += stop_unit - first_unit
            self._changed.notify(min(self.num_workers, stop_unit - first_unit))

    def _take(self) -> tuple[Callable[[int, int], None], int, int] | None:
        """The next share, of the range that waits longest; None when the pool has closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            units = self._waiting[0]
            first = units.next_unit
            share = max(1, self._units_waiting // (2 * self.num_workers))
            stop = units.next_unit = min(first + share, units.stop_unit)
            self._units_waiting -= stop - first
            if stop == units.stop_unit:
                self._waiting.popleft()
            return units.compute, first, stop

    def _work(self, cpu: int | None) -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        while (share := self._take()) is not None:
            compute, first_unit, stop_unit = share
            compute(first_unit, stop_unit)

    def close(self) -> None:
        """Compute what was submitted, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
