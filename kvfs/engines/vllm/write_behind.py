"""Objects on their way to the drive, which nobody waits for.

A step of the engine copies full blocks into staging memory and hands them over; one thread stores them. Staging
memory is limited: where the drive falls behind, a step waits for a small part of its own time at most, and what
then has no room is not stored. A cache may forget.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from kvfs.engines.vllm.cpus import unbind_thread
from kvfs.errors import KvfsError

log = logging.getLogger(__name__)

FLUSH_IDLE_SECONDS = 0.5  # a flush is for the next process, not for this one: it has time
DRAIN_SECONDS = 30


class WriteBehind:
    """cache: a kvfs object cache; flush: makes what it has been given durable; limit_bytes: staging memory."""

    def __init__(self, cache, flush: Callable[[], None], limit_bytes: int):
        self._cache = cache
        self._flush = flush
        self._limit_bytes = limit_bytes
        self._waiting: deque[tuple[list[bytes], list[np.ndarray], int]] = deque()
        self._staged_bytes = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._said: set[str] = set()
        self.objects_stored = 0
        self.objects_refused = 0  # by the drive: full, capped, or offered for the first time
        self.blocks_skipped = 0  # for want of staging memory
        self._thread = threading.Thread(target=self._run, name="kvfs-write-behind", daemon=True)
        self._thread.start()

    def reserve(self, num_bytes: int, patience_seconds: float) -> bool:
        """Staging memory, which `submit` gives back in the end. More than there is waits for all of it."""

        def has_room() -> bool:
            return self._staged_bytes + num_bytes <= self._limit_bytes or not self._staged_bytes

        with self._changed:
            if not self._changed.wait_for(has_room, max(0.0, patience_seconds)):
                return False
            self._staged_bytes += num_bytes
            return True

    def submit(self, keys: list[bytes], objects: list[np.ndarray], num_bytes: int) -> None:
        """num_bytes: as reserved."""
        with self._changed:
            self._waiting.append((keys, objects, num_bytes))
            self._changed.notify_all()

    def skipped(self, num_blocks: int) -> None:
        self.blocks_skipped += num_blocks
        self._say_once("the drive is slower than the engine: some blocks are not stored (more staging_bytes?)")

    def close(self) -> None:
        """Store what is waiting, within half a minute."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(DRAIN_SECONDS)
        if self._thread.is_alive():
            log.warning("kvfs: the drive did not take the last blocks within %d s", DRAIN_SECONDS)

    def _run(self) -> None:
        unbind_thread()
        is_flushed = True
        while True:
            with self._changed:
                idle = FLUSH_IDLE_SECONDS if not is_flushed else None
                self._changed.wait_for(lambda: self._waiting or self._is_closing, idle)
                batch = self._waiting.popleft() if self._waiting else None
                is_closing = self._is_closing
            if batch is None:
                if not is_flushed:
                    self._try(self._flush)
                    is_flushed = True
                if is_closing:
                    return
                continue
            keys, objects, num_bytes = batch
            try:
                self._try(lambda keys=keys, objects=objects: self._store(keys, objects))
            finally:
                del batch, objects
                with self._changed:
                    self._staged_bytes -= num_bytes
                    self._changed.notify_all()
            is_flushed = False

    def _store(self, keys, objects) -> None:
        stored = self._cache.put(keys, objects)
        self.objects_stored += sum(stored)
        self.objects_refused += len(stored) - sum(stored)
        if not all(stored) and self._cache.admission == "all":
            self._say_once("no room: the drive is full, or the cache at its cap; blocks are not stored")

    def _try(self, work: Callable[[], None]) -> None:
        """The engine goes on without its cache, whatever the drive says."""
        try:
            work()
        except KvfsError as error:
            self._say_once(f"blocks are not stored: {error}")
        except Exception:
            log.exception("kvfs: blocks are not stored")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("kvfs: %s", text)
