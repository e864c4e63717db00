"""Where kvfs is mounted, where it may be, and taking a mount away."""

import errno
import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvfs.errors import CannotMount, CannotUnmount
from spdk_glue.transports.url import is_path

FILE_SYSTEM_TYPE = "fuse.kvfs"
FUSE_DEVICE = Path("/dev/fuse")


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    mountpoint: str
    file_system_type: str
    source: str  # of kvfs: the drive's path, see `source_name`
    device: str  # "major:minor"


def from_anywhere(drive: Path) -> Path:
    """A drive's location for a process that works in another folder."""
    return drive.absolute() if is_path(drive) else drive


def source_name(drive: str | os.PathLike) -> str:
    """A drive's path as mounts show it. libfuse's options, as pyfuse3 passes them, are ASCII."""
    name = os.path.realpath(drive) if is_path(drive) else os.fspath(drive)
    return name.encode("ascii", "backslashreplace").decode()


def mounts() -> list[Mount]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        separator = fields.index("-")
        kind, source = fields[separator + 1 : separator + 3]
        found.append(Mount(_unescaped(fields[4]), kind, _unescaped(source), fields[2]))
    return found


def _unescaped(field: str) -> str:
    """The kernel writes white space and backslashes as octal numbers."""
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def mount_at(path: str | os.PathLike) -> Mount | None:
    """The uppermost mount at a path. Asks nothing of the mount itself, whose server may be gone."""
    parent, name = os.path.split(os.path.abspath(path))
    resolved = os.path.join(os.path.realpath(parent), name)
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == resolved), None)


def mount_of(drive: str | os.PathLike) -> Mount | None:
    """Where a drive is mounted."""
    source = source_name(drive)
    kvfs_mounts = (mount for mount in mounts() if mount.file_system_type == FILE_SYSTEM_TYPE)
    return next((mount for mount in kvfs_mounts if mount.source == source), None)


def check_mountpoint(path: str | os.PathLike) -> None:
    """Raises CannotMount if nothing can be mounted at a path, and says why."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            why = f"the server of the mount there is gone; take it away with: kvfsctl umount {path}"
        elif error.errno == errno.ENOENT:
            why = "no such folder; make one first"
        else:
            why = error.strerror
        raise CannotMount(path, why) from error
    if not stat.S_ISDIR(found.st_mode):
        raise CannotMount(path, "not a folder")
    mount = mount_at(path)
    if mount is not None:
        raise CannotMount(path, f"{mount.source} is mounted there already")
    try:
        if os.listdir(path):
            raise CannotMount(path, "the folder is not empty; what is in it would be hidden")
    except PermissionError as error:
        raise CannotMount(path, error.strerror) from error


def check_fuse() -> None:
    """Raises CannotMount if this machine, or this user, has no FUSE."""
    if not FUSE_DEVICE.exists():
        raise CannotMount(FUSE_DEVICE, "not there; load the kernel's module with: modprobe fuse")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise CannotMount(FUSE_DEVICE, "no permission to use it")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise CannotMount("fusermount3", "not installed, and only root mounts without it; install fuse3")


def unmount(mountpoint: str | os.PathLike, lazily: bool = False) -> None:
    """Take a mount away. lazily: from sight now, and in truth when nobody uses it. Raises CannotUnmount."""
    if os.geteuid() == 0:
        command = ["umount", *(["--lazy"] if lazily else []), "--", os.fspath(mountpoint)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazily else []), "--", os.fspath(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotUnmount(mountpoint, f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise CannotUnmount(mountpoint, last_line(done.stderr) or f"{command[0]} failed")


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
