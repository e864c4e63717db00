"""Keeping erases behind readers that have resolved addresses but not finished reading.

Each guard notes the epoch it began in; an erase decided in an epoch waits for the guards of that epoch
and before. New readers never see what is about to be erased: the map no longer points there.
"""

import threading
from contextlib import contextmanager


class ReadGuards:
    """`lock` is the translation layer's; `changed` is its condition, notified when a guard ends."""

    def __init__(self, lock: threading.RLock):
        self.changed = threading.Condition(lock)
        self._epoch = 0
        self._active: dict[int, int] = {}
        self._next_guard = 0

    @contextmanager
    def guard(self):
        with self.changed:
            guard = self.begin()
        try:
            yield
        finally:
            self.end(guard)

    def begin(self) -> int:
        """A guard that `end` takes. Called with the lock held."""
        guard = self._next_guard
        self._next_guard += 1
        self._active[guard] = self._epoch
        return guard

    def end(self, guard: int) -> None:
        with self.changed:
            del self._active[guard]
            self.changed.notify_all()

    def next_epoch(self) -> int:
        """The epoch that ends now; readers of later ones cannot see what is unmapped by now."""
        self._epoch += 1
        return self._epoch - 1

    def is_past(self, epoch: int) -> bool:
        """Whether no reader of `epoch` or before is left."""
        return all(active > epoch for active in self._active.values())
