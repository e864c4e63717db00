"""One open store for whoever in this process names its path: a drive can be opened once.

Engines make their plug-ins several times in one process: scheduler and worker, adapter and attention.
"""

import atexit
import os
import threading
from typing import Any

import kvfs

_lock = threading.Lock()
_stores: dict[str, list] = {}  # by real path or location: [store, users]


def acquire(path: str | os.PathLike, size: int | str | None = None, **options: Any) -> kvfs.Store:
    """An open store, to be released as often.

    size: make a drive of this size where there is no file. options: of kvfs.open, for the first of its
    users; not given to a mount, which has its own.

    Raises what kvfs.open and kvfs.format raise.
    """
    path = os.fspath(path)
    is_file = ":" not in path
    key = os.path.realpath(path) if is_file else path
    with _lock:
        if key not in _stores:
            if size is not None and is_file and not os.path.lexists(path):
                kvfs.format(path, size=size)
            _stores[key] = [kvfs.open(path) if os.path.isdir(path) else kvfs.open(path, **options), 0]
        _stores[key][1] += 1
        return _stores[key][0]


def release(store: kvfs.Store) -> None:
    """The last one closes it."""
    with _lock:
        for key, entry in list(_stores.items()):
            if entry[0] is store:
                entry[1] -= 1
                if not entry[1]:
                    del _stores[key]
                    store.close()


@atexit.register
def _close_all() -> None:
    """Engines in the user's own process are often never shut down."""
    with _lock:
        while _stores:
            _stores.popitem()[1][0].close()
