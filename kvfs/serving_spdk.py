"""A drive for other hosts by SPDK's own target, with the drive embedded here. See spdk_glue/spdk_target."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvfs.embedded_drive import DriveConfig, close_drive, open_drive
from kvfs.errors import InvalidArgument
from kvfs.sizes import parse_size
from spdk_glue.spdk_target.configuration import Listener, TargetConfig, hosts_of_access_file
from spdk_glue.spdk_target.target import SpdkTarget


@contextmanager
def serve_by_spdk(
    path: str | os.PathLike,
    listen: str,
    *,
    nqn: str | None = None,
    host_access: str | os.PathLike | None = None,
    is_polling: bool = False,
    cpus: tuple[int, ...] | None = None,
    cache_bytes: int | str = DriveConfig.cache_bytes,
    **options,
) -> Iterator[SpdkTarget]:
    """While this holds, hosts can connect to the drive at `path`; a process can do so once.

    listen: HOST:PORT, rdma:HOST:PORT or vfio-user:FOLDER, or several of them with commas between; is_polling,
    cpus: see TargetConfig; options: of DriveConfig; the others as in kvfs.serving

    Raises what open_drive raises, InvalidArgument, OSError, NvmeError: HostAccessError, KeyFileError,
    TargetError, SpdkUnavailable.
    """
    try:
        # what is wrong with these shows before the drive is opened, which may take long
        listeners = tuple(Listener.parse(text.strip()) for text in listen.split(","))
        hosts = () if host_access is None else hosts_of_access_file(host_access)
        config = TargetConfig(listeners, nqn, hosts, is_polling, cpus)
        drive_config = DriveConfig(parse_size(cache_bytes), **options)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    drive = open_drive(path, drive_config)
    try:
        with SpdkTarget(drive, config) as target:
            yield target
    finally:
        close_drive(drive, path)
