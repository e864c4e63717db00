"""Reading the next layer's sketches while flash would have nothing to do.

A command by sketches asks for its chosen pages once it has scored all sketches, and between one layer's answer
and the next layer's question there is no command. Decoding goes from layer to layer over the same segments, so
after two of them the next one's index pages are known. They are read behind all that commands ask for, into
the cache, with the priority that they would have anyway.

A wrong guess costs at most one layer's index pages. A window is read as a command would read it, in a guard of
its own, if the cache has room for it at once; what cannot be read is left to the command, which says so.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from accel.page_cache import PageCache
from accel.sparse_plan import SparsePlan
from ftl.errors import FlashError

log = logging.getLogger(__name__)

SHARE_OF_CACHE = 10  # that may be read ahead: with a ninth, what the command under way needs twice was evicted
KEPT_SHARE = 8  # one page in so many: more are kept, see `read`
SHARE_OF_LINES = 8  # of the cache, that a window may pin
MAX_FOLLOWED = 4  # plans: as many as are kept, see attention_work


class Window:
    """LBAs that are read together. num_read: how many of them were missing and are in the cache now."""

    def __init__(self, lbas: np.ndarray):
        self.lbas = lbas
        self.num_read = 0
        self.is_done = False
        self.num_awaited = 0  # by commands, which count them as theirs
        self.waiting: list[Callable[[], None]] = []


@dataclass
class _Followed:
    """A plan, and how its commands go through the layers. step: to the next; 0: not known yet"""

    plan: weakref.ref
    layer: int
    step: int = 0

    def layer_after(self, layer: int) -> int | None:
        """Of a command over this layer; a token's first one takes the step of the token before."""
        if layer > self.layer:
            self.step = layer - self.layer
        self.layer = layer
        return layer + self.step if self.step else None


class ReadAhead:
    """Of one attention unit. Safe to use from several threads.

    max_pages: that `read` may be asked for
    readers: threads that take work in order, num_readers of them; count: told how many pages were read that no
    command has asked for yet
    """

    def __init__(
        self,
        ftl,
        cache: PageCache,
        readers: Executor,
        num_readers: int,
        count: Callable[[int], None],
    ):
        self._ftl = ftl
        self._cache = cache
        self._readers = readers
        self._num_readers = num_readers
        self.max_pages = cache.capacity_bytes // cache.page_size // SHARE_OF_CACHE
        self._max_lines = max(1, cache.num_lines // SHARE_OF_LINES)
        self._count = count
        self._lock = threading.Lock()
        self._followed: deque[_Followed] = deque(maxlen=MAX_FOLLOWED)
        self._guess: tuple[SparsePlan, int] | None = None  # whose windows these are
        self._waiting: deque[Window] = deque()
        self._reading: list[Window] = []
        self._num_steps = 0  # handed to the readers, each for one window
        self._is_closed = False

    def begin_command(self, plan: SparsePlan, layer: int) -> tuple[int | None, list[Window]]:
        """(the layer that is likely to be next, if any; windows that are being read).

        What of this command's own layer was not begun is left to it.
        """
        with self._lock:
            if self._guess is not None and self._guess[0] is plan and self._guess[1] == layer:
                self._waiting.clear()
            followed = next((each for each in self._followed if each.plan() is plan), None)
            if followed is None:
                followed = _Followed(weakref.ref(plan), layer)
                self._followed.append(followed)
            return followed.layer_after(layer), self._reading.copy()

    def read(self, plan: SparsePlan, layer: int, windows: list[np.ndarray]) -> None:
        """Read these LBAs, int64 each, once the readers have nothing else to do, in place of older guesses.

        Nothing, where the cache keeps some of them from token to token: others of their kind would make room.
        """
        pages = self._ftl.resolve(np.concatenate(windows))
        if pages.min() < 0 or self._cache.has(pages).sum() * KEPT_SHARE > len(pages):
            return
        with self._lock:
            if self._is_closed:
                return
            self._guess = plan, layer
            self._waiting = deque(map(Window, windows))
            num_steps = self._num_readers - self._num_steps
            self._num_steps = self._num_readers
        for _ in range(num_steps):
            self._go_on()

    def when_done(self, window: Window, num_pages: int, call: Callable[[], None]) -> None:
        """Call, on a reader, once a window was read, of which a command has counted so many pages."""
        with self._lock:
            if not window.is_done:
                window.num_awaited += num_pages
                window.waiting.append(call)
                return
        if window.num_read:
            self._count(-num_pages)
        self._readers.submit(call)

    def close(self) -> None:
        """Begin nothing more. Windows that are being read end as long as the readers do."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()

    def _go_on(self) -> None:
        """A step goes behind what commands have asked for."""
        try:
            self._readers.submit(self._step)
        except RuntimeError:  # they are being shut down
            with self._lock:
                self._num_steps -= 1

    def _step(self) -> None:
        with self._lock:
            if not self._waiting:
                self._guess = None  # plans go when nobody needs them
                self._num_steps -= 1
                return
            window = self._waiting.popleft()
            self._reading.append(window)
        try:
            window.num_read = self._read(window)
        except FlashError as error:
            log.debug("not read ahead: %s", error)
        except Exception:
            log.exception("reading ahead failed")
        with self._lock:
            self._reading.remove(window)
            window.is_done = True
        if window.num_read:
            self._count(window.num_read - window.num_awaited)
        for call in window.waiting:
            call()
        self._go_on()

    def _read(self, window: Window) -> int:
        """How many pages were missing. Raises FlashError."""
        with self._ftl.read_guard():
            pages = self._ftl.resolve(window.lbas)
            if pages.min() < 0 or self._cache.has(pages).all():
                return 0
            try:
                found = self._cache.acquire_now(pages, self._max_lines, has_priority=True)
            except MemoryError:
                found = None
            if found is None:
                with self._lock:
                    self._waiting.clear()
                return 0
            addresses, missing = found
            try:
                places = missing[np.unique(pages[missing], return_index=True)[1]]  # in physical order
                self._ftl.read_physical(pages[places], window.lbas[places], addresses[places])
                self._cache.mark_valid(pages[places])
            finally:
                self._cache.release(pages)
            return len(missing)
