"""Many small changes of the catalogue in one transaction: a commit of its own costs thirty times a change.

The files' names, inodes and extents change in batches. A batch ends by itself before it grows too large for the
log, before any other transaction, and before the catalogue is made durable. So it is invisible to the rest, but
for one thing: a batch that the drive refuses takes all its changes with it. That it be not refused for want of
room, each change says beforehand how much it will take, and a few pages are kept for batches alone.
"""

import errno
import logging
from collections.abc import Callable
from typing import Protocol

import apsw

from kvfs.catalogue_connection import CatalogueConnection
from kvfs.errors import CatalogueDamaged, CatalogueFull
from kvfs.tree import FileError
from spdk_glue.status import NvmeError

RESERVED_PAGES = 64  # for what has to succeed when all is full: deleting
PAGES_PER_CHANGE = 4  # that a change writes: of names, positions and inodes one each, seldom more
FILL = 2  # pages of a table are at least half full

log = logging.getLogger(__name__)


class PendingRows(Protocol):
    """What is still to be written when a batch ends."""

    def num_pending(self) -> int: ...

    def write_pending(self) -> None:
        """Write the rows, in the transaction under way."""

    def pending_committed(self) -> None: ...


class Batch:
    """Used under the store's lock. `pending` is set by whoever has rows to write."""

    def __init__(
        self,
        db: CatalogueConnection,
        page_bytes: int,
        database_pages: int,
        log_pages: int,
        before_begin: Callable[[], None],
    ):
        self._db = db
        self._before_begin = before_begin
        self._page_bytes = page_bytes
        self._max_pages = database_pages
        self._reserved_pages = min(RESERVED_PAGES, database_pages // 16)
        self._max_changes = max(8, log_pages // 2 // PAGES_PER_CHANGE)  # a checkpoint begins at a quarter
        self.pending: PendingRows | None = None
        self.is_open = False
        self._is_lost = False
        self._num_changes = 0
        self._free_bytes = 0  # when it began
        self._taken_bytes = 0  # since
        self._limit(self._max_pages - self._reserved_pages)

    def _limit(self, num_pages: int) -> None:
        """Of the database; or the log takes what no checkpoint can bring home."""
        self._db.pragma("max_page_count", num_pages)

    @property
    def max_changes(self) -> int:
        """That one transaction may have, or the log overflows."""
        return self._max_changes

    @property
    def has_changes(self) -> bool:
        return not self._is_lost and (
            self.is_open or (self.pending is not None and self.pending.num_pending() > 0)
        )

    @property
    def free_bytes(self) -> int:
        """What rows may still take, roughly."""
        used = self._db.pragma("page_count") - self._db.pragma("freelist_count")
        return max(0, self._max_pages - self._reserved_pages - used) * self._page_bytes // FILL

    def check(self) -> None:
        """Raises FileError EIO once a batch was lost: what callers were told no longer is."""
        if self.is_open and not self._db.in_transaction:  # a statement failed, and SQLite took all back
            self._lose("a statement failed")
        if self._is_lost:
            raise FileError(errno.EIO, "changes to files were lost when the catalogue failed: mount again")

    def join(self, new_bytes: int = 0) -> None:
        """Begin the batch unless it is under way, and count one change. Its statements must not be refused.

        new_bytes: of rows to be added, now or when the batch ends. Raises CatalogueFull, with nothing
        changed, when they do not fit.
        """
        self.check()
        if self.is_open and self._num_changes + self.pending.num_pending() >= self._max_changes:
            self.end()
        if not self.is_open:
            self._begin()
        if new_bytes:
            wanted = FILL * new_bytes
            if self._taken_bytes + wanted > self._free_bytes:
                self.end()
                self._begin()  # to see how much was really taken
                if wanted > self._free_bytes:
                    raise CatalogueFull(self._max_pages * self._page_bytes)
            self._taken_bytes += wanted
        self._num_changes += 1

    def _begin(self) -> None:
        self._before_begin()
        self._db.execute("BEGIN")
        self._limit(self._max_pages)
        used = self._db.pragma("page_count") - self._db.pragma("freelist_count")
        self._free_bytes = (self._max_pages - self._reserved_pages - used) * self._page_bytes
        self._taken_bytes = self._num_changes = 0
        self.is_open = True

    def end(self) -> None:
        """Write what is pending and commit; does nothing inside another transaction, which began with this."""
        if not self.has_changes or (self._db.in_transaction and not self.is_open):
            return
        self.check()
        if not self.is_open:
            self._begin()
        try:
            self.pending.write_pending()
            self._db.execute("COMMIT")
        except (apsw.Error, NvmeError, CatalogueDamaged) as error:
            self._lose(error)
            self.check()
        self._close()
        self.pending.pending_committed()

    def _lose(self, why) -> None:
        log.error("the catalogue failed, and changes to files were lost: %s", why)
        self._is_lost = True
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._close()

    def _close(self) -> None:
        self.is_open = False
        self._limit(self._max_pages - self._reserved_pages)
