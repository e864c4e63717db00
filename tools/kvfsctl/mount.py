"""`kvfsctl mount`: a drive as a file system."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.background import in_background
from kvfsctl.output import EXIT_FAILED, EXIT_USAGE, DriveArgument

MountpointArgument = Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="An empty folder.")]


def mount(
    drive: DriveArgument,
    mountpoint: MountpointArgument,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay until it is unmounted; log to stderr.")
    ] = False,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let users beside yourself in, by the files' permissions.")
    ] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Let nobody write through the mount.")] = False,
    cache_bytes: Annotated[
        str | None, typer.Option(help="The drive's cache in memory, such as 1GiB; 256MiB by default.")
    ] = None,
    options: Annotated[
        str, typer.Option("-o", metavar="OPTIONS", help="As for mount(8), such as ro,noexec,tail_bytes=2GiB.")
    ] = "",
    log_file: Annotated[
        Path, typer.Option("--log", help="Where a server in the background writes its log.")
    ] = Path(os.devnull),
    debug: Annotated[bool, typer.Option("--debug", help="Log more.")] = False,
):
    """Mount a drive: kv/ and .kvfs/ are the KV cache, all else are ordinary files.

    Returns once files can be opened. The server, which owns the drive meanwhile, stays in the background
    until `kvfsctl umount`; SIGTERM ends it as well, with everything written.
    """
    given = [options, *(["allow_other"] if allow_other else []), *(["ro"] if read_only else [])]
    given += [f"cache_bytes={cache_bytes}"] if cache_bytes is not None else []
    code = start(drive, mountpoint, ",".join(given), foreground=foreground, log_file=log_file, debug=debug)
    if code:
        raise typer.Exit(code)


def start(drive: Path, mountpoint: Path, options: str, *, foreground: bool, log_file: Path, debug: bool) -> int:
    """Serve here, or from a process in the background; returns the exit code of a server that did not start.

    options: as of mount -o.
    """
    from kvfs.mount.mountpoints import from_anywhere

    drive = from_anywhere(drive)
    mountpoint, log_file = mountpoint.absolute(), log_file.absolute()

    def serve(ready: Callable[[], None]) -> int:
        from kvfs.errors import ERRNO, InvalidArgument
        from kvfs.mount.mount_options import parse_options
        from kvfs.mount.mounting import mount as mount_drive
        from kvfs.mount.service_manager import log_to_stderr

        log_to_stderr(logging.DEBUG if debug else logging.INFO if foreground else logging.WARNING)
        try:
            mount_drive(drive, mountpoint, ready=ready, **parse_options(options))
        except tuple(ERRNO) as error:
            print(f"kvfsctl: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_USAGE if isinstance(error, InvalidArgument) else EXIT_FAILED
        return 0

    return serve(lambda: None) if foreground else in_background(serve, log_file)
