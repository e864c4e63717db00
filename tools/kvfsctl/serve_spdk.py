"""Exporting a drive by SPDK's own target, for `kvfsctl serve --stack spdk`."""

import signal
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_SECONDS = 0.5
TARGET_OPTIONS = ("is_polling", "cpus", "hugepages")


class TargetEnded(Exception):
    """SPDK's target has ended by itself."""


def serve_spdk(drive: Path, listen: list[str], *, nqn: str | None = None, hosts=(), **options) -> None:
    """Serve a drive until SIGTERM or SIGINT. Call it in the main thread; a process serves once.

    listen: HOST:PORT, rdma:HOST:PORT or vfio-user:FOLDER each; nqn: the drive's own by default; hosts:
    AllowedHost; options: the others of TargetConfig, and those of DriveConfig

    Raises kvfs's errors for the drive, NvmeError, ValueError and OSError for the target.
    """
    from kvfs.embedded_drive import DriveConfig, close_drive, open_drive
    from spdk_glue.spdk_target.configuration import Listener, TargetConfig
    from spdk_glue.spdk_target.target import SpdkTarget

    target_options = {
        name: options.pop(name) for name in ("is_polling", "cpus", "hugepages") if name in options
    }
    listeners = tuple(map(Listener.parse, listen))
    # what is wrong with these shows before the drive is opened, which may take long
    TargetConfig(listeners, nqn or "nqn.2014-08.org.nvmexpress:uuid:0", tuple(hosts), **target_options)
    with ExitStack() as stack:
        ended = stack.enter_context(_end_signals())
        served = open_drive(drive, DriveConfig(**options))
        stack.callback(close_drive, served, drive)
        config = TargetConfig(listeners, nqn or served.nqn, tuple(hosts), **target_options)
        target = stack.enter_context(SpdkTarget(served, config))
        print(f"serving {drive} as {config.nqn} on {', '.join(map(str, listeners))}", flush=True)
        while not ended.wait(LOOK_SECONDS):
            if target.has_ended:
                raise TargetEnded("SPDK's target has ended by itself: see the system log")


@contextmanager
def _end_signals():
    """An event that the first of the signals sets."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in END_SIGNALS}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
