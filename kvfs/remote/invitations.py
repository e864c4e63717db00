"""Who may connect: those whom the mount let open its file `.kvfs/connect`.

Reading it gives a token that is good once, for the user that read it, for a minute. So the permissions of the
mount decide, and knowing the socket's name is of no use.
"""

import secrets
import threading
import time

from kvfs.remote.protocol import TOKEN_BYTES

LIFETIME_SECONDS = 60
MAX_PER_USER = 256  # the oldest go


class Invitations:
    """Safe for several threads."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._of_user: dict[int, dict[bytes, float]] = {}  # uid: {token: when it ends}, oldest first

    def invite(self, uid: int) -> bytes:
        """A new token for a user."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._forget_old()
            tokens = self._of_user.setdefault(uid, {})
            tokens[token] = self._clock() + LIFETIME_SECONDS
            if len(tokens) > MAX_PER_USER:
                del tokens[next(iter(tokens))]
        return token

    def is_expected(self, uid: int) -> bool:
        """Whether a user holds any token: others are turned away before they say a word."""
        with self._lock:
            self._forget_old()
            return uid in self._of_user

    def accept(self, uid: int, token: bytes) -> bool:
        """Whether the user holds this token; it is used up."""
        with self._lock:
            self._forget_old()
            return self._of_user.get(uid, {}).pop(token, None) is not None

    def _forget_old(self) -> None:
        now = self._clock()
        for uid, tokens in list(self._of_user.items()):
            for token, end in list(tokens.items()):
                if end > now:
                    break
                del tokens[token]
            if not tokens:
                del self._of_user[uid]
