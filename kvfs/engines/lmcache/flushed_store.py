"""A store in which what is stored becomes durable soon, by a thread: a killed engine loses seconds of it."""

import threading

from lmcache.logging import init_logger

from kvfs.engines import shared_store
from kvfs.engines.lmcache.settings import Settings
from kvfs.errors import KvfsError, NvmeError

logger = init_logger(__name__)


class FlushedStore:
    """Shared with all of this process that name the same path. Raises as kvfs.open and kvfs.format do."""

    def __init__(self, settings: Settings):
        self.store = shared_store.acquire(settings.path, settings.size, cache_bytes=settings.drive_cache_bytes)
        self._flush_seconds = settings.flush_seconds
        self._is_written = threading.Event()
        self._is_ending = threading.Event()
        self._flusher = threading.Thread(target=self._flush_soon, name="kvfs-flush", daemon=True)
        self._flusher.start()

    def written(self) -> None:
        """Something was stored or deleted that is not durable yet."""
        self._is_written.set()

    def _flush_soon(self) -> None:
        while True:
            self._is_written.wait()
            is_ending = self._is_ending.wait(self._flush_seconds)
            self._is_written.clear()
            try:
                self.store.flush()
            except (KvfsError, NvmeError) as error:
                logger.warning("kvfs: what was stored is not durable yet: %s", error)
            if is_ending:
                return

    def release(self) -> None:
        """Flush; the last one closes the store."""
        self._is_ending.set()
        self._is_written.set()
        self._flusher.join()
        shared_store.release(self.store)
