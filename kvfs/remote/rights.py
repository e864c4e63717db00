"""What a client may do with a sequence."""

import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from kvfs.errors import KvfsError, NotPermitted
from kvfs.sequence_attributes import GID, MODE, UID

_SO_PEERGROUPS = 59  # Linux; the socket module has no name for it
_MAX_GROUPS = 256  # what getsockopt returns from Python
READ, WRITE = 4, 2  # bits of a mode


@dataclass(frozen=True)
class Client:
    """The process at the other end of a connection, as the kernel knows it."""

    uid: int
    gid: int
    pid: int
    groups: frozenset[int] = frozenset()

    @classmethod
    def of(cls, connection: socket.socket) -> "Client":
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("iII", credentials)
        groups = b""
        with suppress(OSError):  # of more groups than that, none: rights are lost, never won
            groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
        return cls(uid, gid, pid, frozenset(struct.unpack(f"{len(groups) // 4}I", groups)) | {gid})

    @property
    def is_administrator(self) -> bool:
        """root, or whoever runs the mount."""
        return self.uid in (0, os.geteuid())

    def check_sees_others(self) -> None:
        """Raises NotPermitted for who may not see what other users have and do."""
        if not self.is_administrator:
            raise NotPermitted("what other users do is for the drive's owner to see")

    def own_name(self, name: str) -> str:
        """What the store calls something whose names count within a user: other users' never meet."""
        return name if self.is_administrator else f"{self._prefix}{name}"

    def known_name(self, own_name: str) -> str | None:
        """What the client calls it; None where it is another user's."""
        if self.is_administrator:
            return own_name
        return own_name.removeprefix(self._prefix) if own_name.startswith(self._prefix) else None

    @property
    def _prefix(self) -> str:
        return f"user {self.uid}: "


def may(client: Client, sequence, write: bool) -> bool:
    """Whether a client may read, or change, a sequence: by the mode of its folder in the mount.

    Where none is set, all may whom the mount admits.
    """
    if client.is_administrator:
        return True
    attributes = sequence.attributes()
    if MODE not in attributes:
        return True
    try:
        mode, uid, gid = (int(attributes.get(name, b"0")) for name in (MODE, UID, GID))
    except ValueError as error:
        raise KvfsError(f"sequence {sequence.name!r} has a damaged owner or mode") from error
    shift = 6 if client.uid == uid else 3 if gid in client.groups else 0
    return bool(mode >> shift & (WRITE if write else READ))
