"""A drive for other hosts: NVMe/TCP, with the drive embedded here. See spdk_glue/fabrics."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from accel.workers import check_worker
from kvfs.embedded_drive import AttachedDrive, Drive, DriveConfig, close_drive, open_drive
from kvfs.errors import InvalidArgument
from kvfs.sizes import parse_size
from kvfs.store import DEFAULT_CACHE_BYTES
from spdk_glue.fabrics.records import BadNqn
from spdk_glue.fabrics.target.host_access import HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.reservation_file import SUFFIX
from spdk_glue.fabrics.target.server import Server
from spdk_glue.fabrics.target.subsystem import ServedDrive, Subsystems
from spdk_glue.transports.url import is_nvme

DEFAULT_PORT = 4420
SPIN_US = 200  # twice what it takes to be woken in a virtual machine


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, [IPV6]:PORT or HOST. Raises InvalidArgument."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise InvalidArgument(f"{text}: not an address such as 127.0.0.1:{DEFAULT_PORT}")
    return host, int(port)


def _reservations_of(path: str | os.PathLike) -> str | None:
    """Where those of a drive's hosts are kept: beside its file; those of a namespace end with the target."""
    return None if is_nvme(path) else f"{os.path.realpath(path)}{SUFFIX}"


@contextmanager
def _metrics(path, drive: Drive, at: str | None, token_file: str | os.PathLike | None) -> Iterator[None]:
    """Nothing of it is loaded where nobody asks for it."""
    if at is None and token_file is None:
        yield
        return
    from kvfs.telemetry.http_server import serving_metrics
    from kvfs.telemetry.served_drive import VisibleDrive

    with closing(VisibleDrive(path, drive)) as visible, serving_metrics(visible, at, token_file):
        yield


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
    spin_us: int = SPIN_US,
    metrics: str | None = None,
    metrics_token: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Server, Subsystems]]:
    """While this holds, hosts can connect to the drive at `path`.

    listen: HOST:PORT, port 0 for any that is free; nqn: the drive's name, by default the drive's own;
    host_access: a file that says which hosts may connect (spdk_glue/fabrics/target/host_access.py), None for
    any of this machine; spin_us: how long a connection looks for the next command before it sleeps, where
    the one before it came as soon; metrics, metrics_token: see kvfs.telemetry.http_server.serving_metrics.

    Raises what open_drive raises, InvalidArgument, NvmeError: HostAccessError, UnauthenticatedListener,
    CannotListen, CannotServe.
    """
    host, port = parse_address(listen)
    access = HostAccess.anyone() if host_access is None else HostAccess.read(host_access)
    try:
        limits = Limits(max_connections=max_connections)
        config = DriveConfig(
            parse_size(cache_bytes), num_workers, worker, read_only=read_only, progress=progress
        )
        check_worker(worker)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    except KeyError as error:
        raise InvalidArgument(str(error.args[0])) from error
    drive = open_drive(path, config)
    try:
        if isinstance(drive, AttachedDrive):
            raise InvalidArgument(f"{path}: served already by its target: hosts can reach it there")
        unit = drive.attention_unit
        served = ServedDrive(drive.controller, unit.when_done, unit.attend_small_now)
        try:
            subsystems = Subsystems(served, access, limits, nqn, _reservations_of(path))
        except BadNqn as error:
            raise InvalidArgument(str(error)) from error
        with _metrics(path, drive, metrics, metrics_token):
            server = Server(subsystems, host, port, spin_us=spin_us)
            try:
                yield server, subsystems
            finally:
                server.close()
    finally:
        close_drive(drive, path)
