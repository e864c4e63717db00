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


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class Stack(StrEnum):
    OWN = "own"
    SPDK = "spdk"


def serve(
    drive: DriveArgument,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where hosts reach the drive, by default 127.0.0.1:4420; port 0 takes a free one. SPDK's "
            "stack takes vfio-user:FOLDER and rdma:HOST:PORT, too, and several with commas between.",
        ),
    ] = None,
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
    max_connections: Annotated[
        int | None, typer.Option(min=2, help="Queues of all hosts together; by default 256.")
    ] = None,
    cache_bytes: Annotated[
        str | None, typer.Option(help="The drive's cache in memory, such as 1GiB; 256MiB by default.")
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(help="What computes attention: numba (the default), reference or fpga."),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Compute threads; by default one for each CPU.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Let no host change anything.")] = False,
    spin_us: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Look so long for the next command before sleeping, while they come so soon; by default 200.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="PORT", help="Prometheus metrics and a status page at 127.0.0.1:PORT, by HTTP."),
    ] = None,
    metrics_token: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who shows what is in it sees all; needed off loopback."),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of the log's lines: json has request identifiers as fields.")
    ] = LogFormat.TEXT,
    debug: Annotated[bool, typer.Option("--debug", help="Log more.")] = False,
    json_output: JsonOption = False,
):
    """Let hosts connect to a drive with NVMe/TCP: Linux, SPDK, or kvfs itself.

    It stays until SIGTERM or Ctrl-C, and closes the drive in order. Hosts of other machines must prove who they
    are: see `kvfsctl nvme gen-dhchap-key`. The data are not encrypted on the wire.
    """
    from kvfs.configuration import export, load
    from kvfs.mount.service_manager import log_to_stderr
    from kvfs.serving import SPIN_US
    from kvfs.serving import serve as serve_drive
    from kvfs.serving_spdk import serve_by_spdk

    foreign = {"--max-connections": max_connections, "--spin-us": spin_us} if stack == Stack.SPDK else {}
    if stack == Stack.SPDK:
        foreign |= {"--metrics": metrics, "--metrics-token": metrics_token}
    foreign |= {"--poll": poll or None} if stack == Stack.OWN else {}
    for name, value in foreign.items():
        if value is not None:
            raise typer.BadParameter(f"--stack {stack} has no {name}", param_hint=name)
    configured = load()
    export(configured, "fpga")
    listen = configured["serve.listen"] if listen is None else listen
    worker = configured["serve.worker"] if worker is None else worker
    cache_bytes = configured["open.cache_bytes"] if cache_bytes is None else cache_bytes
    num_workers = configured["open.num_workers"] if num_workers is None else num_workers
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log_to_stderr(logging.DEBUG if debug else logging.INFO, as_json=log_format == LogFormat.JSON)
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
            **({} if max_connections is None else {"max_connections": max_connections}),
            cache_bytes=cache_bytes,
            num_workers=num_workers,
            worker=worker,
            read_only=read_only,
            spin_us=SPIN_US if spin_us is None else spin_us,
            metrics=metrics,
            metrics_token=metrics_token,
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
