"""From the place that a verb is given to what it works on, with a progress bar where opening takes long.

A drive that is mounted is reached through the process that mounted it, whether the drive is named or the mount.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_BYTES = "8MiB"
PATIENCE_SECONDS = 1.0  # after which a scan shows itself


@contextmanager
def scan_progress():
    """A callback for kvfs.open's `progress`: a bar on the terminal once a scan has gone on for a while."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    started = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = None

        def progress(done: int, total: int) -> None:
            nonlocal task
            if task is None and time.monotonic() - started > PATIENCE_SECONDS:
                task = bars.add_task("scanning the flash", total=total)
            if task is not None:
                bars.update(task, completed=done)

        yield progress


def mount_folder(place: Path) -> Path | None:
    """The folder where a drive is mounted; None for a drive that is not. place: the drive or the folder."""
    from kvfs.mount.mountpoints import mount_at, mount_of

    mount = mount_of(place)
    if mount is not None and _is_served(mount.mountpoint):
        return Path(mount.mountpoint)
    return place if mount_at(place) is not None or _is_folder(place) else None


def _is_served(mountpoint: str) -> bool:
    """Whether a mount's server is there: a drive whose server was killed can be opened."""
    try:
        os.statvfs(mountpoint)  # which is never answered from the kernel's cache
    except PermissionError:  # another user's
        return True
    except OSError:
        return False
    return True


def _is_folder(place: Path) -> bool:
    try:
        return stat.S_ISDIR(place.stat().st_mode)
    except (OSError, ValueError):  # what opens it says why it cannot be
        return False


def open_store(place: Path, degraded: bool = False):
    """The store of a drive, a set or a mount, for verbs that look or change little. Raises what kvfs.open
    raises.

    degraded: a set also without drives that are missing
    """
    folder = mount_folder(place)
    if folder is not None:
        from kvfs.remote.mounted import open_mounted

        mounted = open_mounted(folder)
        if mounted is not None:
            return mounted
        place = folder
    import kvfs
    from kvfs.nvme.discovery import is_address

    degraded = degraded and len(drives_of(place)) > 1
    # one on the wire may be a drive with a cache of its own
    options = {} if is_address(place) else {"cache_bytes": CACHE_BYTES}
    with scan_progress() as progress:
        return kvfs.open(place, progress=progress, degraded=degraded, **options)


def drives_of(place) -> list[Path]:
    """The drives of a set's file; of a single drive itself."""
    from kvfs.drive_set.locations import is_set, locations_of

    return [Path(location) for location in locations_of(place)] if is_set(place) else [place]


def each_drive(place: Path, **options) -> Iterator[tuple[Path, object]]:
    """(drive, its care: kvfs.administration.drive_care) one after another; through the mount if there is one.

    options: see kvfs.inspection.Inspection, of drives that are not mounted
    """
    folder = mount_folder(place)
    if folder is not None:
        from kvfs.administration.remote_care import remote_cares

        with open_store(folder) as store:
            for drive, care in remote_cares(store).items():
                yield Path(drive), care
        return
    from kvfs.administration.drive_care import DriveCare

    for drive in drives_of(place):
        with open_inspection(drive, **options) as inspection:
            yield drive, DriveCare(inspection)


def open_inspection(drive, **options):
    """See kvfs.inspection.Inspection."""
    from kvfs.drive_set.locations import is_set
    from kvfs.errors import InvalidArgument
    from kvfs.inspection import Inspection

    if is_set(drive):
        raise InvalidArgument(f"{drive} is a set of drives: name one of them, kvfsctl drive list shows which")
    with scan_progress() as progress:
        return Inspection(drive, progress=progress, **options)
