"""Attributes of a sequence: names and values that users give it, and what kvfs makes of some of them.

Names are those of extended attributes: `user.kvfs.` ones mean something to kvfs and are checked, other `user.`
ones are the user's. Names without `user.` are kvfs's own and not shown.
"""

from collections.abc import Callable, Iterable

from kvfs.errors import InvalidArgument
from kvfs.owner_process import is_owner

KVFS = "user.kvfs."
PINNED, TTL, TENANT = KVFS + "pinned", KVFS + "ttl", KVFS + "tenant"
OWNER = KVFS + "owner"  # the process that a temporary sequence goes with: owner_process.py
MODE, UID, GID = "mode", "uid", "gid"  # of the sequence's folder in a mount
IMPORTING = "importing"  # not yet complete: gone if the drive is opened again with it
SET_PART, SET_STATE = "set.part", "set.state"  # of a sequence that is part of one: drive_set/part_record.py
# how long a sequence is to be kept says nothing of its forks; which part it is they say themselves
NOT_INHERITED = (PINNED, TTL, OWNER, IMPORTING, SET_PART, SET_STATE)
MAX_NAME_BYTES = 255
MAX_VALUE_BYTES = 65536
MAX_NAMES_BYTES = 65536  # of all names of a sequence with a NUL each: what listxattr(2) can return


def _check_pinned(value: bytes) -> bool:
    return value in (b"0", b"1")


def _check_ttl(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 10 and 0 < int(value) < 1 << 32


def _check_number(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 10


def is_tenant(value: bytes) -> bool:
    try:
        return 0 < len(value) <= 255 and value.decode().isprintable()
    except UnicodeDecodeError:
        return False


_KNOWN: dict[str, tuple[Callable[[bytes], bool], str]] = {
    PINNED: (_check_pinned, "0 or 1"),
    TTL: (_check_ttl, "a number of seconds from 1 to 2**32 - 1"),
    TENANT: (is_tenant, "1 to 255 bytes of printable UTF-8"),
    OWNER: (is_owner, "of a process, as kvfs.owner_process.this_process has it"),
    MODE: (_check_number, "a number"),
    UID: (_check_number, "a number"),
    GID: (_check_number, "a number"),
    IMPORTING: (lambda value: value == b"", "empty"),
    SET_PART: (lambda value: value.startswith(b"{"), "of a set of drives"),
    SET_STATE: (lambda value: value.startswith(b"{"), "of a set of drives"),
}


def check_attribute(name: str, value: bytes) -> None:
    """Raises InvalidArgument for a name or value that cannot be kept."""
    try:
        is_name = "\0" not in name and 0 < len(name.encode()) <= MAX_NAME_BYTES
    except (TypeError, AttributeError, UnicodeEncodeError):
        is_name = False
    if not is_name:
        raise InvalidArgument(f"an attribute's name is 1 to {MAX_NAME_BYTES} bytes without NUL, not {name!r}")
    if not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
        given = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise InvalidArgument(f"the value of {name} is at most {MAX_VALUE_BYTES} bytes, as bytes, not {given}")
    if name not in _KNOWN:
        if name.startswith("user.") and not name.startswith(KVFS):
            return
        known = ", ".join(known for known in _KNOWN if known.startswith(KVFS))
        raise InvalidArgument(f"no attribute {name}: there are {known}, and user.* for what you like")
    is_good, wanted = _KNOWN[name]
    if not is_good(value):
        raise InvalidArgument(f"{name} is {wanted}, not {value!r}")


def check_names(names: Iterable[str]) -> None:
    """Raises InvalidArgument for more names than one sequence can have."""
    if sum(len(name.encode()) + 1 for name in names) > MAX_NAMES_BYTES:
        raise InvalidArgument(f"the names of a sequence's attributes take at most {MAX_NAMES_BYTES} bytes")
