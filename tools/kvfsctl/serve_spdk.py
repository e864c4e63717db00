"""`kvfsctl serve --stack spdk`: a drive exported by SPDK's own target."""

import threading
from pathlib import Path

from kvfsctl.output import fail, print_json

LOOK_SECONDS = 0.5


def serve_spdk(
    drive: Path,
    listen: str,
    stop: threading.Event,
    *,
    nqn: str | None = None,
    host_access: Path | None = None,
    is_polling: bool = False,
    cpus: tuple[int, ...] | None = None,
    json_output: bool = False,
    **options,
) -> None:
    """Serve a drive until `stop` is set; a process can do so once.

    listen: HOST:PORT, rdma:HOST:PORT or vfio-user:FOLDER, or several of them with commas between; options: of
    DriveConfig

    Raises what open_drive raises, NvmeError, OSError, InvalidArgument.
    """
    from kvfs.embedded_drive import DriveConfig, close_drive, open_drive
    from kvfs.errors import InvalidArgument
    from spdk_glue.spdk_target.configuration import Listener, TargetConfig, hosts_of_access_file
    from spdk_glue.spdk_target.target import SpdkTarget

    try:
        # what is wrong with these shows before the drive is opened, which may take long
        listeners = tuple(Listener.parse(text.strip()) for text in listen.split(","))
        hosts = () if host_access is None else hosts_of_access_file(host_access)
        config = TargetConfig(listeners, nqn, hosts, is_polling, cpus)
        drive_config = DriveConfig(**options)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    served = open_drive(drive, drive_config)
    try:
        with SpdkTarget(served, config) as target:
            if json_output:
                print_json("serve", drive=str(drive), listen=list(map(str, listeners)), nqn=target.nqn)
            else:
                print(f"{drive}: {target.nqn} at {', '.join(map(str, listeners))}")
            print(end="", flush=True)  # a pipe's reader waits for this line
            while not stop.wait(LOOK_SECONDS):
                if target.has_ended:
                    fail("SPDK's target has ended by itself: see the system log")
    finally:
        close_drive(served, drive)
