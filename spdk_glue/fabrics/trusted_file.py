"""Reading files that decide about access: only regular ones of this user or root, and closed to others."""

import os
import stat
from collections.abc import Callable

READABLE_BY_OWNER_ALONE = 0o077
WRITABLE_BY_OWNER_ALONE = 0o022


def read_trusted_file(
    path: str | os.PathLike, forbidden_mode: int, num_bytes_max: int, error: Callable[..., Exception]
) -> bytes:
    """Its content. forbidden_mode: one of the above; raises error(path, why) on whatever is wrong.

    Checks and reading use one open descriptor, so the file cannot be exchanged between them.
    """
    try:
        # not blocking: a pipe in the file's place must not hold up who opens it
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise error(path, "there is no such file") from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error(path, f"cannot be opened: {getattr(reason, 'strerror', reason)}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(path, "not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise error(path, "belongs to another user")
        if status.st_mode & forbidden_mode:
            what = "read" if forbidden_mode == READABLE_BY_OWNER_ALONE else "change"
            mode = stat.S_IMODE(status.st_mode)
            raise error(path, f"others than its owner can {what} it (mode {mode:04o}); chmod it to 0600")
        content = b""
        while len(content) <= num_bytes_max and (piece := os.read(descriptor, num_bytes_max + 1)):
            content += piece
    except OSError as reason:
        raise error(path, f"cannot be read: {reason.strerror}") from None
    finally:
        os.close(descriptor)
    if len(content) > num_bytes_max:
        raise error(path, f"longer than {num_bytes_max} bytes")
    return content
