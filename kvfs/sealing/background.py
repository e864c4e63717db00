"""The thread that seals what its model's policy asks for, as soon as it is on flash and while others leave
time.

It makes one command at a time, and while the store is in use it rests after each for a multiple of what that
took: the drive's thread has a low priority, but flash and caches have none. It knows what to do from three
sides: sequences that spill tell it, what was left when a drive was closed is looked for once after opening, and
whoever finds damage says so.
"""

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from kvfs.errors import KvfsError, NoSuchSequence
from kvfs.sealing.sealing import Outcome, Sealing
from spdk_glue.status import NvmeError, NvmeStatusError, Status

if TYPE_CHECKING:
    from kvfs.sequence import Sequence
    from kvfs.store import Store

log = logging.getLogger(__name__)

QUIET_SECONDS = 0.5  # since the last use of the store: it counts as idle
REST = 4  # times as long as a command took, while the store is in use
SPILL_SECONDS = 0.02  # until looked at again, of what is on its way to flash
FULL_SECONDS, FULL_SECONDS_MAX = (
    5.0,
    320.0,
)  # until it is tried again where there was no room; each time doubled
_UNKNOWN_TO_DRIVE = (Status.INVALID_DESCRIPTOR, Status.INVALID_OPCODE)


class _Stopped(Exception):
    """Raised between two commands: the store closes."""


class _NoRoom(Exception):
    """A segment was not made: it is tried again later."""


class BackgroundSealer:
    """Of one store. Its thread begins with the first thing to do, and ends with `close`."""

    def __init__(self, store: "Store", sealing: Sealing):
        self._store = store
        self._sealing = sealing
        self._lock = threading.Lock()
        self._waiting: dict[Sequence, bool] = {}  # with whether to verify what it has
        self._models: list[int] = []  # of which all sequences are to be looked at
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._command_began = 0.0
        self._pause = FULL_SECONDS

    def close(self, wait: bool = True) -> None:
        """End within a command's time. What is not sealed yet will be when the drive is opened again."""
        self._stop.set()
        self._wake.set()
        thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def notice(self, sequence: "Sequence", verify: bool = False) -> None:
        """A sequence may have groups to be sealed; verify: or derived data that is damaged."""
        with self._lock:
            self._waiting[sequence] = self._waiting.get(sequence, False) or verify
        self._begin()

    def look_at_all(self, model_ids: list[int]) -> None:
        """Sequences of these models may have groups to be sealed."""
        if not model_ids:
            return
        with self._lock:
            self._models += model_ids
        self._begin()

    @property
    def num_waiting(self) -> int:
        """Sequences that are still to be looked at, as far as is known."""
        return len(self._waiting) + len(self._models)

    def _begin(self) -> None:
        if self._thread is None and not self._stop.is_set():
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="kvfs-sealer", daemon=True)
                    self._thread.start()
        self._wake.set()

    # the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            seconds, is_in_vain = None, False
            try:
                seconds = self._work()
            except _NoRoom:
                is_in_vain = True
            except _Stopped:
                break
            except (KvfsError, NvmeError) as error:
                if self._store._closed:
                    break
                if isinstance(error, NvmeStatusError) and error.status in _UNKNOWN_TO_DRIVE:
                    log.warning("this drive does not derive what sparse attention reads: nothing is sealed")
                    break
                log.warning("sealing is put off: %s", error)
                is_in_vain = True
            except Exception:
                log.exception("sealing has failed, and is put off")
                is_in_vain = True
            if is_in_vain:
                self._wait_for_room()
            elif seconds is None:
                self._wake.wait()
            else:
                self._stop.wait(seconds)

    def _work(self) -> float | None:
        """One sequence. Seconds until there is more to do; None: nothing is known of."""
        with self._lock:
            models, self._models = self._models, []
        if models:
            self._find(models)
        with self._lock:
            sequence = next(iter(self._waiting), None)
            verify = self._waiting.pop(sequence, False)
        if sequence is None:
            return None
        try:
            return self._seal(sequence, verify)
        except KvfsError:
            if not sequence.is_deleted:
                self.notice(sequence)
                raise
            return 0

    def _find(self, model_ids: list[int]) -> None:
        """Sequences of these models that lack segments. Others come between any two of them."""
        for model_id in model_ids:
            with self._store._lock:
                self._store._check_open()
                rows = self._sealing.rows_of(model_id)
            for row in rows:
                if self._stop.is_set():
                    return
                with self._store._lock, suppress(NoSuchSequence):
                    if self._sealing.lacks(*row):
                        self.notice(self._store.sequence(row[1]))

    def _seal(self, sequence: "Sequence", verify: bool) -> float:
        if verify:
            sequence._drop_damaged(None)
        for derive in self._sealing.wanted.get(sequence.model.id, ()):
            outcome = Outcome.MADE
            while outcome not in (Outcome.COMPLETE, Outcome.NO_ROOM):
                outcome = self._sealing.seal_next(sequence, derive, False, self._before_command)
                if outcome is Outcome.MADE:
                    self._pause = FULL_SECONDS
                self._rest()
            if outcome is Outcome.NO_ROOM:
                self.notice(sequence)
                raise _NoRoom
        with self._store._lock:
            if sequence._has_spills:
                self.notice(sequence)
                return SPILL_SECONDS
        return 0

    def _wait_for_room(self) -> None:
        """Longer each time, unless more is free than there was: a full drive may stay full for days."""
        free, until = self._free_lbas(), time.monotonic() + self._pause
        self._pause = min(2 * self._pause, FULL_SECONDS_MAX)
        while not self._stop.wait(FULL_SECONDS) and time.monotonic() < until:
            if self._free_lbas() > free:
                self._pause = FULL_SECONDS
                return

    def _free_lbas(self) -> int:
        with self._store._lock:
            return self._store._allocator.free_lbas

    def _before_command(self) -> None:
        self._rest()
        if self._stop.is_set():
            raise _Stopped
        self._command_began = time.monotonic()

    def _rest(self) -> None:
        """After a command, if there was one since the last rest."""
        if not self._command_began:
            return
        now, began = time.monotonic(), self._command_began
        self._command_began = 0.0
        if now - self._store._last_use < QUIET_SECONDS:
            self._stop.wait(REST * (now - began))
