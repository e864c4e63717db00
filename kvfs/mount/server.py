"""Serving two trees at a mountpoint, from the mount to the last request."""

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from kvfs.errors import CannotMount, CannotUnmount
from kvfs.mount import service_manager
from kvfs.mount.file_requests import FileRequests
from kvfs.mount.fuse_glue import lib, pyfuse3
from kvfs.mount.mountpoints import check_fuse, check_mountpoint, last_line, mount_at, source_name, unmount
from kvfs.mount.operations import MountOperations
from kvfs.mount.trees import Trees
from kvfs.telemetry.events import EVENTS

READ_AHEAD_KIB = 4096  # four requests of the largest size; the kernel's 128 KiB leave the drive waiting
DRAIN_SECONDS = 60.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MountOptions:
    """source: the drive's path, as mounts show it; allow_other: for users beside the one who mounts; flags:
    further ones of mount(8)."""

    source: str
    allow_other: bool = False
    read_only: bool = False
    flags: frozenset[str] = frozenset()

    def for_libfuse(self) -> set[str]:
        source = source_name(self.source).replace("\\", "\\\\").replace(",", "\\,")
        options = {"default_permissions", "subtype=kvfs", f"fsname={source}"}
        if self.allow_other:
            options.add("allow_other")
        if self.read_only:
            options.add("ro")
        if os.geteuid() == 0:  # libfuse's default is nodev and nosuid
            options |= {"dev", "suid"} - {flag.removeprefix("no") for flag in self.flags}
        return options | self.flags


def serve(
    trees: Trees, mountpoint: str | os.PathLike, options: MountOptions, ready: Callable[[], None]
) -> None:
    """Mount, call `ready`, and serve until the mount is taken away or a signal asks for the end.

    When this returns everything that was written has reached the trees. Raises CannotMount.
    """
    check_fuse()
    check_mountpoint(mountpoint)
    mountpoint = os.path.realpath(mountpoint)
    requests = FileRequests(trees)
    try:
        _mount(MountOperations(trees), mountpoint, options)
    except BaseException:
        requests.close()
        raise
    try:
        trio.run(_serve_until_unmounted, mountpoint, ready)
    finally:
        requests.close()  # before the session that they answer to
        pyfuse3.close(unmount=True)


def _mount(operations: MountOperations, mountpoint: str, options: MountOptions) -> None:
    with _stderr_kept() as stderr:
        try:
            pyfuse3.init(operations, mountpoint, options.for_libfuse())
        except RuntimeError as error:  # which says no more than that it failed
            raise CannotMount(mountpoint, last_line(stderr()) or str(error)) from error


@contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """Keep what libfuse and fusermount3 print; yields a function that returns it."""
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def text() -> str:
            return os.pread(kept.fileno(), 1 << 16, 0).decode(errors="replace")

        try:
            yield text
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


async def _serve_until_unmounted(mountpoint: str, ready: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_end_on_signal, mountpoint)
        nursery.start_soon(_announce, mountpoint, ready)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    log.info("%s is unmounted", mountpoint)


async def _announce(mountpoint: str, ready: Callable[[], None]) -> None:
    """Call `ready` once the kernel has been answered for the first time."""
    with suppress(OSError):  # unmounted meanwhile
        await trio.to_thread.run_sync(os.stat, mountpoint)
        _read_far_ahead(mountpoint)
    EVENTS.note("mounted", f"serving {mountpoint}", mountpoint=mountpoint)
    ready()
    service_manager.notify("READY=1")


def _read_far_ahead(mountpoint: str) -> None:
    mount = mount_at(mountpoint)
    if mount is not None:
        with suppress(OSError):  # root's to change
            Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))


async def _end_on_signal(mountpoint: str, task_status=trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: unmounting %s", signal.Signals(number).name, mountpoint)
            service_manager.notify("STOPPING=1")
            try:
                await trio.to_thread.run_sync(unmount, mountpoint)  # the kernel writes its pages back first
            except CannotUnmount as error:
                log.warning("%s; what is open there ends with the server", error)
                await trio.to_thread.run_sync(_write_back, mountpoint)
                pyfuse3.terminate()
            return


def _write_back(mountpoint: str) -> None:
    """Have the kernel send what was written through this mount, and wait until it has been answered."""
    mount = mount_at(mountpoint)
    if mount is None:
        return
    descriptor = os.open(mountpoint, os.O_RDONLY)
    try:
        lib.syncfs(descriptor)
    finally:
        os.close(descriptor)
    waiting = Path(f"/sys/fs/fuse/connections/{mount.device.partition(':')[2]}/waiting")
    give_up = time.monotonic() + DRAIN_SECONDS
    with suppress(OSError):
        while int(waiting.read_text()) > 0 and time.monotonic() < give_up:
            time.sleep(0.01)
