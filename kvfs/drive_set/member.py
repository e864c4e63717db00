"""One drive of an open set: its store while it can be used, and why it cannot any more."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvfs.drive_set.latency import Latency
from kvfs.errors import DriveLost, KvfsError, MediaFailure, OutOfSpace, StoreClosed
from kvfs.store import Store
from spdk_glue.status import (
    CommandFailed,
    NvmeError,
    NvmeStatusError,
    QueueFull,
    QueuePairInUse,
    Status,
)

log = logging.getLogger(__name__)

_GONE_STATUS = (Status.ABORTED_SQ_DELETION, Status.INVALID_NAMESPACE)  # of a connection, of what it led to
_OUR_FAULT = (QueueFull, QueuePairInUse, CommandFailed)


def _is_gone(error: Exception) -> bool:
    """Whether an error says that the drive as a whole cannot be used."""
    if isinstance(error, NvmeStatusError):
        return error.status in _GONE_STATUS
    if isinstance(error, NvmeError):
        return not isinstance(error, _OUR_FAULT)
    return isinstance(error, (MediaFailure, StoreClosed))


class Member:
    """lost: why it cannot be used, None while it can. num_heads: KV heads of all sequences that it holds.
    on_lost: called once it is.
    """

    def __init__(self, drive_id: str, location: str, store: Store | None, lost: str | None = None):
        self.drive_id = drive_id
        self.location = location
        self._store = store
        self.lost = lost
        self.num_heads = 0
        self.on_lost: Callable[[], None] = lambda: None
        self.latency = Latency()

    @property
    def store(self) -> Store:
        """Raises DriveLost."""
        if self.lost is not None:
            raise DriveLost(self.location, f"{self.num_heads} KV heads of sequences", self.lost)
        return self._store

    @contextmanager
    def in_use(self, what: str) -> Iterator[Store]:
        """The store, to do something with `what` it holds. Errors say on which drive, or that it is lost."""
        if self.lost is not None:
            raise DriveLost(self.location, what, self.lost)
        try:
            yield self._store
        except (KvfsError, NvmeError) as error:
            if _is_gone(error):
                self.lose(error)
                raise DriveLost(self.location, what, self.lost) from error
            if isinstance(error, OutOfSpace) and not str(error).startswith(self.location):
                error.args = (f"{self.location}: {error}",)
            elif isinstance(error, NvmeStatusError):
                self._tell(error)
            raise

    def _tell(self, error: NvmeStatusError) -> None:
        """On which drive it was; what could not be read is no prefix for anybody."""
        if self.location not in error.detail:
            error.detail = "; ".join(filter(None, [error.detail, f"drive {self.location}"]))
        if error.lba is not None:
            with self._store._lock:
                self._store._prefixes.suspect(error.lba)

    def lose(self, error: Exception) -> None:
        """Nothing more is asked of the drive until it is brought back."""
        if self.lost is None:
            said = " ".join(str(error).split()) or type(error).__name__
            self.lost = said.removeprefix(f"{self.location.partition('?')[0]}: ")
            log.error("drive %s is lost: %s; sequences without parts on it go on", self.location, self.lost)
            self.on_lost()

    def let_go(self) -> None:
        """Let go of what a lost drive holds in memory."""
        if self._store is not None:
            with suppress(KvfsError, NvmeError):
                self._store._abandon()
            self._store = None

    def come_back(self, store: Store) -> None:
        self._store, self.lost, self.latency = store, None, Latency()
