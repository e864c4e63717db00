"""`kvfsctl serve`: a drive for other hosts, over NVMe/TCP."""

import logging
import signal
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import scan_progress
from kvfsctl.output import DriveArgument, JsonOption, fail, print_json

LOOK_SECONDS = 0.5  # whether SPDK still runs


class Stack(StrEnum):
    OWN = "own"
    SPDK = "spdk"


LOOK_SECONDS = 0.5


def serve(
    drive: DriveArgument,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where hosts reach the drive; port 0 takes a free one. SPDK's stack takes vfio-user:FOLDER "
            "and rdma:HOST:PORT, too, and several with commas between.",
        ),
    ] = "127.0.0.1:4420",
    stack: Annotated[Stack, typer.Option(help="Whose target: kvfs's own, or SPDK's where it is installed.")] = (
        Stack.OWN
    ),
    poll: Annotated[
        bool, typer.Option("--poll", help="SPDK's stack: take a CPU whole rather than sleep when idle.")
    ] = False,
    nqn: Annotated[str | None, typer.Option(help="The drive's name on the fabric; by default its own.")] = None,
    host_access: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Which hosts may connect, and their keys; off loopback it must be there."
        ),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=2, help="Queues of all hosts together.")] = 256,
    cache_bytes: Annotated[str, typer.Option(help="The drive's cache in memory, such as 1GiB.")] = "256MiB",
    worker: Annotated[str, typer.Option(help="What computes attention: numba or reference.")] = "numba",
    num_workers: Annotated[
        int | None, typer.Option(help="Compute threads; by default one for each CPU.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Let no host change anything.")] = False,
    spin_us: Annotated[
        int, typer.Option(min=0, help="Look so long for the next command before sleeping; takes CPU time.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Log more.")] = False,
    json_output: JsonOption = False,
):
    """Let hosts connect to a drive with NVMe/TCP: Linux, SPDK, or kvfs itself.

    It stays until SIGTERM or Ctrl-C, and closes the drive in order. Hosts of other machines must prove who they
    are: see `kvfsctl nvme gen-dhchap-key`. The data are not encrypted on the wire.
    """
    from kvfs.mount.service_manager import log_to_stderr
    from kvfs.serving import serve as serve_drive
    from kvfs.serving_spdk import serve_by_spdk

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log_to_stderr(logging.DEBUG if debug else logging.INFO)
    if stack == Stack.SPDK:
        with (
            scan_progress() as progress,
            serve_by_spdk(
                drive,
                listen,
                nqn=nqn,
                host_access=host_access,
                is_polling=poll,
                cache_bytes=cache_bytes,
                num_workers=num_workers,
                worker=worker,
                read_only=read_only,
                progress=progress,
            ) as target,
        ):
            if json_output:
                print_json("serve", drive=str(drive), listen=target.addresses, nqn=target.nqn)
            else:
                print(f"{drive}: {target.nqn} at {', '.join(target.addresses)}")
            print(end="", flush=True)
            while not stop.wait(LOOK_SECONDS):
                if target.has_ended:
                    fail("SPDK's target has ended by itself: see the log")
        return
    with (
        scan_progress() as progress,
        serve_drive(
            drive,
            listen,
            nqn=nqn,
            host_access=host_access,
            max_connections=max_connections,
            cache_bytes=cache_bytes,
            num_workers=num_workers,
            worker=worker,
            read_only=read_only,
            spin_us=spin_us,
            progress=progress,
        ) as (server, subsystems),
    ):
        host, port = server.address
        if json_output:
            print_json("serve", drive=str(drive), host=host, port=port, nqn=subsystems.nqn)
        else:
            shown = f"[{host}]" if ":" in host else host
            print(f"{drive}: {subsystems.nqn} at {shown}:{port}")
        # a pipe's reader waits for this line
        print(end="", flush=True)
        # Linux may give the signal to another thread, which does not wake this one
        while not stop.wait(LOOK_SECONDS):
            pass
