"""The names by which mount(8), mkfs(8) and fsck(8) find a file system's programs, with their exit codes."""

import argparse
import os
import sys
from pathlib import Path

from kvfsctl.main import run
from kvfsctl.mount import start
from kvfsctl.output import EXIT_USAGE

FSCK_CLEAN, FSCK_CORRECTED, FSCK_ERRORS_LEFT, FSCK_FAILED = 0, 1, 4, 8
MOUNT_USAGE, MOUNT_FAILED = 1, 32


def mkfs() -> None:
    """mkfs.kvfs: `kvfsctl format`."""
    sys.argv[1:1] = ["format"]
    run()


def mount() -> None:
    """mount.kvfs DRIVE MOUNTPOINT [-sfnv] [-o OPTIONS], as mount(8) calls it."""
    parser = argparse.ArgumentParser("mount.kvfs", description="Mount a kvfs drive; called by mount -t kvfs.")
    parser.add_argument("drive", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("-o", dest="options", action="append", default=[], help="see kvfsctl mount --help")
    parser.add_argument("-f", dest="fake", action="store_true", help="do everything but mount")
    for flag in "snv":
        parser.add_argument(f"-{flag}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", dest="type", help=argparse.SUPPRESS)
    parser.add_argument("-N", dest="mount_namespace", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fake:
        return
    options, nowhere = ",".join(arguments.options), Path(os.devnull)
    code = start(
        arguments.drive, arguments.mountpoint, options, foreground=False, log_file=nowhere, debug=False
    )
    if code:
        sys.exit(MOUNT_USAGE if code == EXIT_USAGE else MOUNT_FAILED)


def fsck() -> None:
    """fsck.kvfs [-n | -p | -y | -a] DRIVE: `kvfsctl check`, with --repair unless -n."""
    from kvfs.errors import ERRNO

    parser = argparse.ArgumentParser("fsck.kvfs", description="Check a kvfs drive that is not mounted.")
    parser.add_argument("drive", type=Path)
    parser.add_argument("-n", dest="read_only", action="store_true", help="change nothing (the default)")
    for flag in "pya":
        parser.add_argument(f"-{flag}", dest="repair", action="store_true", help="mend what is safe to mend")
    for flag in "fMTv":
        parser.add_argument(f"-{flag}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-C", nargs="?", help=argparse.SUPPRESS)  # fsck(8) asks for progress
    arguments = parser.parse_args()
    try:
        sys.exit(_fsck(arguments.drive, arguments.repair and not arguments.read_only))
    except tuple(ERRNO) as error:
        print(f"fsck.kvfs: {error}", file=sys.stderr)
        sys.exit(FSCK_FAILED)


def _fsck(drive: Path, repair: bool) -> int:
    from kvfsctl.check import check_and_mend, print_report

    found, done, report, num_sequences = check_and_mend(drive, repair)
    print_report(drive, found, done, report, num_sequences)
    if report.is_damaged:
        return FSCK_ERRORS_LEFT
    return FSCK_CORRECTED if done else FSCK_CLEAN
