"""`kvfsctl mount`: a drive as a file system."""

import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.background import in_background
from kvfsctl.output import EXIT_FAILED, EXIT_USAGE, DriveArgument


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


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
    degraded: Annotated[
        bool, typer.Option("--degraded", help="Mount a set of drives also without those that are missing.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="PORT", help="Prometheus metrics and a status page at 127.0.0.1:PORT, by HTTP."),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of the log's lines: json has request identifiers as fields.")
    ] = LogFormat.TEXT,
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
    given += ["degraded"] if degraded else []
    given += [f"cache_bytes={cache_bytes}"] if cache_bytes is not None else []
    given += [f"metrics={metrics}"] if metrics is not None else []
    log = {"log_file": log_file, "debug": debug, "log_format": log_format}
    code = start(drive, mountpoint, ",".join(given), foreground=foreground, **log)
    if code:
        raise typer.Exit(code)


def _configured(configuration) -> list[str]:
    """As options of mount -o."""
    flags = configuration.given("mount")
    return [
        *(f"{name}={value}" for name, value in configuration.given("open").items()),
        *(["allow_other"] if flags.get("allow_other") else []),
        *(["ro"] if flags.get("read_only") else []),
        *([f"metrics={flags['metrics']}"] if "metrics" in flags else []),
    ]


def start(
    drive: Path,
    mountpoint: Path,
    options: str,
    *,
    foreground: bool,
    log_file: Path,
    debug: bool,
    log_format: LogFormat = LogFormat.TEXT,
) -> int:
    """Serve here, or from a process in the background; returns the exit code of a server that did not start.

    options: as of mount -o; what they leave open the configuration says.
    """
    from kvfs.configuration import load
    from kvfs.mount.mountpoints import from_anywhere

    options = ",".join(filter(None, [*_configured(load()), options]))

    drive = from_anywhere(drive)
    mountpoint, log_file = mountpoint.absolute(), log_file.absolute()

    def serve(ready: Callable[[], None]) -> int:
        from kvfs.errors import ERRNO, InvalidArgument
        from kvfs.mount.mount_options import parse_options
        from kvfs.mount.mounting import mount as mount_drive
        from kvfs.mount.service_manager import log_to_stderr

        level = logging.DEBUG if debug else logging.INFO if foreground else logging.WARNING
        log_to_stderr(level, as_json=log_format == LogFormat.JSON)
        try:
            mount_drive(drive, mountpoint, ready=ready, **parse_options(options))
        except tuple(ERRNO) as error:
            print(f"kvfsctl: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_USAGE if isinstance(error, InvalidArgument) else EXIT_FAILED
        return 0

    return serve(lambda: None) if foreground else in_background(serve, log_file)
