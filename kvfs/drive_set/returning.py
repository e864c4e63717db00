"""Lost drives on the wire that come back by themselves, once their target answers again.

A network that was away, or a target that was started anew, needs no administrator: the drive is opened again as
`kvfsctl drive return` would do it. A file or a disk that failed is not tried again.
"""

import logging
import socket
import threading

from kvfs.drive_set.member import Member
from kvfs.errors import KvfsError
from spdk_glue.fabrics.initiator.address import Address, is_address
from spdk_glue.status import BadLocation, NvmeError

log = logging.getLogger(__name__)
FIRST_SECONDS, MOST_SECONDS = 0.5, 10.0  # between two tries
PROBE_SECONDS = 2.0


class Returning:
    """Of a DriveSet, which is given. Its thread lives while a drive on the wire is lost."""

    def __init__(self, drive_set):
        self._set = drive_set
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def begin(self) -> None:
        """A drive is lost."""
        with self._lock:
            if self._thread is None and not self._over.is_set() and self._lost():
                self._thread = threading.Thread(target=self._run, name="kvfs-set-returning", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """No drive is brought back any more; not to be called with the set's lock held."""
        with self._lock:
            self._over.set()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _lost(self) -> list[Member]:
        members = list(self._set._members.values())
        return [member for member in members if member.lost is not None and is_address(member.location)]

    def _run(self) -> None:
        seconds = FIRST_SECONDS
        while not self._over.wait(seconds):
            for member in self._lost():
                self._try(member)
            seconds = min(2 * seconds, MOST_SECONDS)
            with self._lock:
                if not self._lost():
                    self._thread = None
                    return

    def _try(self, member: Member) -> None:
        if not _answers(member.location):
            return  # everybody would wait while it is tried
        try:
            self._set.drives.bring_back(member.drive_id)
            log.warning("drive %s is back", member.location)
        except (KvfsError, NvmeError) as error:
            log.info("drive %s does not come back: %s", member.location, error)


def _answers(location: str) -> bool:
    """Whether somebody listens there."""
    try:
        where = Address.parse(location)
        socket.create_connection((where.host, where.port), PROBE_SECONDS).close()
    except (OSError, BadLocation):
        return False
    return True
