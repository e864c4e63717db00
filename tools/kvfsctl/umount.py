"""`kvfsctl umount`: end a mount."""

from typing import Annotated

import typer

from kvfsctl.mount import MountpointArgument


def umount(
    mountpoint: MountpointArgument,
    lazy: Annotated[
        bool, typer.Option("--lazy", "-l", help="Out of sight now; it ends when nobody uses it any more.")
    ] = False,
):
    """Unmount a drive and wait until it is closed: what was written is on it, and it can be opened again.

    Takes away what is left of a mount whose server was killed, too.
    """
    from kvfs.mount.mounting import unmount_drive

    unmount_drive(mountpoint, lazy)
