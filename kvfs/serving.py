"""A drive for other hosts: NVMe/TCP, with the drive embedded here. See spdk_glue/fabrics."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvfs.embedded_drive import AttachedDrive, DriveConfig, close_drive, open_drive
from kvfs.errors import InvalidArgument
from kvfs.sizes import parse_size
from kvfs.store import DEFAULT_CACHE_BYTES
from spdk_glue.fabrics.records import BadNqn
from spdk_glue.fabrics.target.host_access import HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.server import Server
from spdk_glue.fabrics.target.subsystem import ServedDrive, Subsystems

DEFAULT_PORT = 4420


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, [IPV6]:PORT or HOST. Raises InvalidArgument."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise InvalidArgument(f"{text}: not an address such as 127.0.0.1:{DEFAULT_PORT}")
    return host, int(port)


@contextmanager
def serve(
    path: str | os.PathLike,
    listen: str,
    *,
    nqn: str | None = None,
    host_access: str | os.PathLike | None = None,
    max_connections: int = Limits.max_connections,
    cache_bytes: int | str = DEFAULT_CACHE_BYTES,
    num_workers: int | None = None,
    worker: str = "numba",
    read_only: bool = False,
    spin_us: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Server, Subsystems]]:
    """While this holds, hosts can connect to the drive at `path`.

    listen: HOST:PORT, port 0 for any that is free; nqn: the drive's name, by default the drive's own;
    host_access: a file that says which hosts may connect (spdk_glue/fabrics/target/host_access.py), None for
    any of this machine; spin_us: how long a connection looks for the next command before it sleeps.

    Raises what open_drive raises, InvalidArgument, NvmeError: HostAccessError, UnauthenticatedListener,
    CannotListen.
    """
    host, port = parse_address(listen)
    access = HostAccess.anyone() if host_access is None else HostAccess.read(host_access)
    try:
        limits = Limits(max_connections=max_connections)
        config = DriveConfig(
            parse_size(cache_bytes), num_workers, worker, read_only=read_only, progress=progress
        )
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    drive = open_drive(path, config)
    try:
        if isinstance(drive, AttachedDrive):
            raise InvalidArgument(f"{path}: served already by its target: hosts can reach it there")
        served = ServedDrive(drive.controller, drive.attention_unit.when_done)
        try:
            subsystems = Subsystems(served, access, limits, nqn)
        except BadNqn as error:
            raise InvalidArgument(str(error)) from error
        server = Server(subsystems, host, port, spin_us=spin_us)
        try:
            yield server, subsystems
        finally:
            server.close()
    finally:
        close_drive(drive, path)
