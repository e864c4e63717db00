"""The thread that evicts unasked: what has outlived its time to live, and what makes a drive too full.

Caps hold without it (DESIGN.md). It looks now and then, deletes a few sequences at a time, and between these
the store is everybody's. What it deletes is durable, and its blocks free, before it looks again.
"""

import logging
import threading
from typing import TYPE_CHECKING

from kvfs.errors import KvfsError
from kvfs.space.background_policy import Background
from kvfs.space.caps import Fullness
from kvfs.space.space_catalogue import Candidate
from kvfs.telemetry.events import EVENTS
from spdk_glue.status import NvmeError

if TYPE_CHECKING:
    from kvfs.drive_set.drive_set import DriveSet
    from kvfs.store import Store

log = logging.getLogger(__name__)
EVERY_SECONDS = 10
AT_ONCE = 64  # sequences: for so long other calls wait


class BackgroundEvictor:
    """Of one store or set. Its thread begins once there is something to do, and ends with `close`."""

    def __init__(self, store: "Store | DriveSet", every_seconds: float | None):
        """every_seconds: between two looks; None: only where `look` is called."""
        self._store = store
        self._every_seconds = every_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._in_vain: set[str | None] = set()  # drives that are full of other things, which was said

    def begin(self) -> None:
        """What is evicted unasked has changed."""
        with self._lock:
            is_wanted = self._every_seconds is not None and self._store._space.background.is_on
            if is_wanted and self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="kvfs-evictor", daemon=True)
                self._thread.start()

    def close(self, wait: bool = True) -> None:
        """End within the time of one deletion of some sequences. Not with the store's lock held."""
        self._stop.set()
        thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                self.look()
            except (KvfsError, NvmeError) as error:
                if self._store._closed:
                    return
                log.warning("evicting in the background is put off: %s", error)
            except Exception:
                log.exception("evicting in the background has failed, and is put off")

    def look(self) -> None:
        """One round. Raises KvfsError, NvmeError."""
        background = self._store.background_eviction()
        if background.expired:
            self._expire()
        if background.high_percent is not None:
            self._lower_all(background)

    def _expire(self) -> None:
        while not self._stop.is_set():
            with self._store._lock:
                self._store._check_open()
                victims = self._store._space.evict_expired(limit=AT_ONCE)
                self._store._space.expired += len(victims)
            if not victims:
                return
            self._note("expired", "had outlived their time to live", victims)

    def _lower_all(self, background: Background) -> None:
        for drive in [each.drive for each in self._fullness()]:
            full = self._of(drive)
            if full is None or full.used_lbas * 100 <= full.capacity_lbas * background.high_percent:
                self._in_vain.discard(drive)
            else:
                self._lower(drive, background)

    def _fullness(self) -> list[Fullness]:
        with self._store._lock:
            self._store._check_open()
            return self._store._space.fullness()

    def _of(self, drive: str | None) -> Fullness | None:
        """None: it is lost, or has left."""
        return next((each for each in self._fullness() if each.drive == drive), None)

    def _lower(self, drive: str | None, background: Background) -> None:
        """Down to the low watermark. What is shared frees less than its sequences are charged: look again."""
        while (full := self._of(drive)) is not None and not self._stop.is_set():
            low = full.capacity_lbas * background.low_percent // 100
            if full.used_lbas <= low:
                return
            if full.used_lbas - full.sequence_lbas > low:
                self._say_in_vain(drive, background)
                return
            with self._store._lock:
                self._store._check_open()
                victims = self._store._space.evict_from(drive, full.used_lbas - low, AT_ONCE)
                self._store._space.watermark_evictions += len(victims)
            if not victims:
                return
            where = "" if drive is None else f" on drive {drive}"
            self._note("watermark", f"went{where} for the low watermark of {background.low_percent}%", victims)

    def _note(self, cause: str, why: str, victims: list[Candidate]) -> None:
        with self._store._lock:
            self._store._check_open()
            self._store._space.make_durable()  # and their blocks are free
        EVENTS.note("evicted", f"{len(victims)} sequences {why}", cause=cause, sequences=len(victims))

    def _say_in_vain(self, drive: str | None, background: Background) -> None:
        """Objects and files alone are above the low watermark: all sequences would go, and it would be left."""
        if drive not in self._in_vain:
            self._in_vain.add(drive)
            log.warning(
                "%s: objects and files alone take more than the low watermark of %d%%: no sequence is evicted"
                " for it; give the caches of objects a cap",
                self._store.path,
                background.low_percent,
            )
