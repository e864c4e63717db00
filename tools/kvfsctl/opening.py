"""Opening a drive for a verb, with a progress bar where that takes long."""

import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

CACHE_BYTES = "8MiB"
PATIENCE_SECONDS = 1.0  # after which a scan shows itself


@contextmanager
def scan_progress():
    """A callback for kvfs.open's `progress`: a bar on the terminal once a scan has gone on for a while."""
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


def open_store(drive, degraded: bool = False):
    """The store of a drive, a set or a mount, for verbs that look or change little. Raises what kvfs.open
    raises.

    degraded: a set also without drives that are missing
    """
    import kvfs

    if drive.is_dir():
        return kvfs.open(drive)
    degraded = degraded and len(drives_of(drive)) > 1
    with scan_progress() as progress:
        return kvfs.open(drive, cache_bytes=CACHE_BYTES, progress=progress, degraded=degraded)


def drives_of(place) -> list[Path]:
    """The drives of a set's file; of a single drive itself."""
    from kvfs.drive_set.opening import is_set, locations_of

    return [Path(location) for location in locations_of(place)] if is_set(place) else [place]


def open_inspection(drive, **options):
    """See kvfs.inspection.Inspection."""
    from kvfs.drive_set.opening import is_set
    from kvfs.errors import InvalidArgument
    from kvfs.inspection import Inspection

    if is_set(drive):
        raise InvalidArgument(f"{drive} is a set of drives: name one of them, kvfsctl drive list shows which")
    with scan_progress() as progress:
        return Inspection(drive, progress=progress, **options)
