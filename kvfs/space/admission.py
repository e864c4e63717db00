"""What is worth its flash: an object is stored when it is offered for the second time.

Much of what an engine offers is never asked for again, and flash wears by what is written. So a cache that asks
for it declines what it has not been offered before, and remembers its key for a while, without its bytes: a
ghost. Who looks for the object meanwhile misses, computes it and offers it again, and then it is stored.

Ghosts are not durable: to write them would cost flash for what is to spare it, and to forget them costs one
miss more for each. They are bounded: the oldest goes first, and with it the first sight of its key.
"""

from kvfs.errors import InvalidArgument

ADMISSIONS = ("all", "second-sight")
MOST_GHOSTS = 1 << 16  # of one cache's name: some 10 MB of memory


class SecondSight:
    """Of the keys of one cache, with the number of the identity that each is of."""

    def __init__(self, most: int = MOST_GHOSTS):
        self._most = most
        self._ghosts: dict[tuple[int, bytes], None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._ghosts)

    def admits(self, identity_id: int, key: bytes) -> bool:
        """Whether it was offered before; if not, it is a ghost from now on."""
        ghost = identity_id, key
        if ghost in self._ghosts:
            del self._ghosts[ghost]
            return True
        if len(self._ghosts) >= self._most:
            del self._ghosts[next(iter(self._ghosts))]
        self._ghosts[ghost] = None
        return False


def check_admission(admission: str) -> str:
    """Raises InvalidArgument."""
    if admission not in ADMISSIONS:
        raise InvalidArgument(f"admission is one of {', '.join(ADMISSIONS)}, not {admission!r}")
    return admission
