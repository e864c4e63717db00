"""A mounted drive as a store, without what opens a drive: that takes numba, and a second to import."""

import errno
import os
import stat

from kvfs.errors import NotPermitted
from kvfs.remote.remote_store import RemoteStore


def open_mounted(path: str | os.PathLike) -> RemoteStore | None:
    """None for what is no folder. Raises NotPermitted, and as RemoteStore does."""
    return RemoteStore(path) if is_folder(path) else None


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a drive is mounted here, or was. Raises NotPermitted."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:  # also of a mount that is another user's alone
        raise NotPermitted(f"{os.fspath(path)}: this user may not use it") from error
    except OSError as error:
        return error.errno == errno.ENOTCONN  # a mount whose server is gone
