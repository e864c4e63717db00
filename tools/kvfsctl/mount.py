"""`kvfsctl mount`: a drive as a file system."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import DriveArgument, fail

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
    from kvfs.mount.mount_options import parse_options

    arguments = parse_options(options)
    arguments["allow_other"] = allow_other or arguments.get("allow_other", False)
    arguments["read_only"] = read_only or arguments.get("read_only", False)
    if cache_bytes is not None:
        arguments["cache_bytes"] = cache_bytes
    start(drive, mountpoint, arguments, foreground=foreground, log_file=log_file, debug=debug)


def start(
    drive: Path, mountpoint: Path, arguments: dict, *, foreground: bool, log_file: Path, debug: bool
) -> None:
    """Serve here, or from a process in the background; exits with the code of a server that did not start."""
    from kvfs.mount.background import in_background

    drive, mountpoint, log_file = drive.absolute(), mountpoint.absolute(), log_file.absolute()

    def serve(ready: Callable[[], None]) -> int:
        from kvfs.errors import ERRNO
        from kvfs.mount.mounting import mount as mount_drive
        from kvfs.mount.service_manager import log_to_stderr

        log_to_stderr((logging.DEBUG if debug else logging.INFO) if foreground or debug else logging.WARNING)
        try:
            mount_drive(drive, mountpoint, ready=ready, **arguments)
        except tuple(ERRNO) as error:
            fail(str(error))
        return 0

    if foreground:
        serve(lambda: None)
        return
    code = in_background(serve, log_file)
    if code:
        raise typer.Exit(code)
