"""What servers that were killed have left on this machine: mounts that nobody serves, and names of sockets."""

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from kvfs.mount.mountpoints import FILE_SYSTEM_TYPE, mounts, unmount
from kvfs.remote.socket_folder import socket_folders


@dataclass(frozen=True)
class MachineLeftover:
    """kind: "mount" or "socket"; of: the drive that was mounted there, empty of a socket."""

    kind: str
    path: str
    of: str

    def remove(self) -> None:
        """Raises CannotUnmount, OSError."""
        if self.kind == "mount":
            unmount(self.path, lazily=True)
        elif is_dead_socket(Path(self.path)):  # and nobody listens there by now
            Path(self.path).unlink(missing_ok=True)


def machine_leftovers() -> list[MachineLeftover]:
    dead = [
        each for each in mounts() if each.file_system_type == FILE_SYSTEM_TYPE and _is_dead(each.mountpoint)
    ]
    found = [MachineLeftover("mount", each.mountpoint, each.source) for each in dead]
    for folder in socket_folders():
        if os.access(folder, os.W_OK | os.X_OK):
            names = sorted([*folder.glob("*.sock"), *folder.glob("*.sock.new")])
            found += [MachineLeftover("socket", str(path), "") for path in names if is_dead_socket(path)]
    return found


def _is_dead(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)  # which is never answered from the kernel's cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def is_dead_socket(path: Path) -> bool:
    """Whether a name is a socket's that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # it is busy, another user's, or gone by now
            return False
    return False
