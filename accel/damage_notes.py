"""Which derived data the drive has found damaged, so that the log is told once of each."""

import logging
import threading

log = logging.getLogger(__name__)

MAX_NOTED = 1 << 16


class DamageNotes:
    """Which segments' damage the log has been told of. Of one drive; safe to use from several threads."""

    def __init__(self):
        self._noted: dict[int, None] = {}
        self._lock = threading.Lock()

    def note(self, base_lba: int, why: str) -> None:
        with self._lock:
            if base_lba in self._noted:
                return
            if len(self._noted) >= MAX_NOTED:
                self._noted.clear()
            self._noted[base_lba] = None
        log.warning(
            "derived data at LBA %d is damaged (%s): its tokens are read from their own pages", base_lba, why
        )
