"""What a process gets for an error in the server, and what the log gets."""

import errno
import logging

from kvfs.errors import ERRNO, errno_of
from kvfs.tree import FileError

log = logging.getLogger("kvfs.mount")
_KNOWN = tuple(ERRNO)


def errno_for(error: Exception) -> int:
    """The errno of whatever a tree raised. What nobody foresaw is EIO and a line in the log, never a crash."""
    if isinstance(error, FileError):
        return error.errno
    if isinstance(error, _KNOWN):
        number = errno_of(error)
        if number == errno.EIO:
            log.error("%s", error)
        return number
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    log.error("unexpected %s: %s", type(error).__name__, error)
    log.debug("it came from", exc_info=error)
    return errno.EIO
