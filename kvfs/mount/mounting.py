"""From a drive's path to a mount that serves it, and back."""

import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import kvfs
from kvfs.errors import AlreadyMounted, CannotUnmount, DriveBusy
from kvfs.files.file_system import FileSystem
from kvfs.kv_tree.tree import KvTree
from kvfs.mount.mountpoints import (
    FILE_SYSTEM_TYPE,
    check_fuse,
    check_mountpoint,
    mount_at,
    mount_of,
    source_name,
    unmount,
)
from kvfs.mount.trees import Trees
from kvfs.remote.server import RemoteServer
from spdk_glue.transports.url import is_nvme

RELEASE_SECONDS = 120.0  # what a server may take to write its tails and close the drive


def mount(
    drive: str | os.PathLike,
    mountpoint: str | os.PathLike,
    *,
    allow_other: bool = False,
    read_only: bool = False,
    flags: frozenset[str] = frozenset(),
    metrics: str | None = None,
    metrics_token: str | os.PathLike | None = None,
    ready: Callable[[], None] = lambda: None,
    **open_options,
) -> None:
    """Open a drive and serve it at a mountpoint until it is unmounted; then everything is on the drive.

    flags: of mount(8) for the kernel, such as noexec; metrics: PORT or ADDRESS:PORT of an HTTP endpoint,
    metrics_token: a file, see telemetry.http_server; ready: called once requests are answered; open_options:
    see kvfs.open. Raises CannotMount, and what kvfs.open raises.
    """
    check_fuse()
    check_mountpoint(mountpoint)
    already = mount_of(drive)
    if already is not None and _is_locked(source_name(drive)):  # else its server is gone
        raise AlreadyMounted(drive, already.mountpoint)
    # libfuse is needed to mount, not to unmount
    from kvfs.mount.server import MountOptions, serve
    from kvfs.telemetry.http_server import serving_metrics

    if read_only:
        open_options["evict_every_s"] = None
    options = MountOptions(os.fspath(drive), allow_other, read_only, flags)
    with (
        _name_of(source_name(drive)),
        kvfs.open(drive, **open_options) as store,
        RemoteServer(store, for_everyone=allow_other, read_only=read_only) as remote,
    ):
        kv = KvTree(store, invite=remote.invite, is_shared=allow_other)
        trees = Trees(FileSystem(store._file_store), kv, store._lock, remote)
        with serving_metrics(store, metrics, metrics_token):
            serve(trees, mountpoint, options, ready)


def unmount_drive(mountpoint: str | os.PathLike, lazily: bool = False) -> str:
    """Take a kvfs mount away and wait until its server has let go of the drive; the drive's path.

    lazily: from sight at once, without waiting. Raises CannotUnmount.
    """
    found = mount_at(mountpoint)
    if found is None:
        raise CannotUnmount(mountpoint, "nothing is mounted there")
    if found.file_system_type != FILE_SYSTEM_TYPE:
        raise CannotUnmount(mountpoint, f"{found.source} ({found.file_system_type}) is mounted there, not kvfs")
    unmount(found.mountpoint, lazily)
    if not lazily:
        _wait_for_release(mountpoint, found.source)
    return found.source


def _wait_for_release(mountpoint: str | os.PathLike, drive: str) -> None:
    give_up = time.monotonic() + RELEASE_SECONDS
    while _is_locked(drive):
        if time.monotonic() > give_up:
            raise CannotUnmount(
                mountpoint, f"{drive} is still held by its server after {RELEASE_SECONDS:.0f} s"
            )
        time.sleep(0.02)


def _name_of(drive: str) -> socket.socket:
    """A name of Linux's abstract socket space, held while a drive is mounted: one that is no file has no lock
    that all can see. Raises DriveBusy.
    """
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        name.bind(f"\0kvfs-mount:{hashlib.sha256(drive.encode()).hexdigest()}")
    except OSError as error:
        name.close()
        if error.errno == errno.EADDRINUSE:
            raise DriveBusy(drive, None) from error
        raise
    return name


def _is_locked(drive: str) -> bool:
    """Whether a process has the drive open: it locks the file, or a name where there is none."""
    if is_nvme(drive):
        try:
            _name_of(drive).close()
        except DriveBusy:
            return True
        return False
    try:
        with Path(drive).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or not for this user to see
        return False
    return False
