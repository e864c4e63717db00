"""`kvfsctl df`: how full drives are, and what with."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, fail, print_json, print_table

BLOCKS = {
    "groups": "KV of sequences, in whole groups",
    "tails": "records of tokens that fill no group yet",
    "derived": "made of groups for sparse attention; given up when space is short",
    "objects": "keyed objects of engines",
    "files": "ordinary files",
    "catalogue": "header, catalogue and its log, used or not",
    "given_up": "deleted; free after the next flush",
    "free": "to be written",
    "reserved": "beyond the logical blocks: parity, map, spare",
}
PAGES = {
    "live": "hold what blocks above do",
    "garbage": "overwritten or deleted; waits for collection",
    "open": "in superblocks being written: room and garbage",
    "erased": "ready to be written",
    "map": "the translation layer's own",
    "parity": "to give back lost pages",
    "bad": "worn out or broken",
}


def df(
    place: Annotated[
        Path | None, typer.Argument(metavar="MOUNTPOINT|DRIVE", help="All that is mounted, if left out.")
    ] = None,
    json_output: JsonOption = False,
):
    """Show size, use and room of a drive, mounted or not; of one that is named also what takes its flash.

    Blocks are what is stored, and flash is what state its pages are in: each comes to all flash of the drive.
    """
    from kvfs.sizes import format_size

    rows = [row for mount in _mounts_at(place) for row in _of_mount(mount)] or _of_drive(place)
    kinds = [] if place is None else _kinds(place)
    if json_output:
        print_json("df", drives=rows, kinds=kinds)
        return
    print_table(
        "kvfs drives",
        ["drive", "size", "used", "free", "use", "mounted at"],
        [
            [
                row["drive"],
                *(format_size(row[f"{what}_bytes"]) for what in ("size", "used", "free")),
                f"{row['used_bytes'] / row['size_bytes']:.0%}",
                row["mountpoint"] or "–",
            ]
            for row in rows
        ],
    )
    for usage in kinds:
        for what, meanings in (("blocks", BLOCKS), ("pages", PAGES)):
            print_table(
                f"{usage['drive']}: {format_size(usage['media_bytes'])} of flash, by {what}",
                [what, "meaning", "size", "share"],
                [
                    [kind, meanings[kind], format_size(size), f"{size / usage['media_bytes']:.1%}"]
                    for kind, size in usage[what].items()
                ],
                left=2,
            )


def _kinds(place: Path) -> list[dict]:
    from dataclasses import asdict

    with open_store(place) as store:
        return [asdict(usage) for usage in store.space_usage()]


def _mounts_at(place: Path | None) -> list:
    """The mounts asked for; none where `place` is a drive that is not mounted."""
    from kvfs.mount.mountpoints import FILE_SYSTEM_TYPE, mount_at, mount_of, mounts

    if place is None:
        found = [mount for mount in mounts() if mount.file_system_type == FILE_SYSTEM_TYPE]
        if not found:
            fail("no drive is mounted; name one that is not: kvfsctl df DRIVE")
        return found
    mount = mount_at(place) or mount_of(place)
    if mount is None:
        return []
    if mount.file_system_type != FILE_SYSTEM_TYPE:
        fail(f"{place}: {mount.source} ({mount.file_system_type}) is mounted there, not kvfs")
    return [mount]


def _of_mount(mount) -> list[dict]:
    from kvfs.drive_set.locations import is_set

    if is_set(mount.source):
        return _of_drive(Path(mount.mountpoint), mount.mountpoint)
    try:
        usage = os.statvfs(mount.mountpoint)
    except OSError as error:
        fail(f"{mount.mountpoint}: {error.strerror}; if its server is gone: kvfsctl umount {mount.mountpoint}")
    size, free = usage.f_blocks * usage.f_frsize, usage.f_bfree * usage.f_frsize
    return [_row(mount.source, mount.mountpoint, size, free)]


def _of_drive(drive: Path, mountpoint: str | None = None) -> list[dict]:
    """Of a set a row for each of its drives that is there."""
    with open_store(drive) as store:
        counters = store.counters()
    if "drives" in counters:
        there = [each for each in counters["drives"] if each["capacity_bytes"] is not None]
        return [_row(e["drive"], mountpoint, e["capacity_bytes"], e["free_bytes"]) for e in there]
    space = counters["space"]
    return [_row(str(drive), mountpoint, space["capacity_bytes"], space["free_bytes"])]


def _row(drive: str, mountpoint: str | None, size_bytes: int, free_bytes: int) -> dict:
    return {
        "drive": drive,
        "mountpoint": mountpoint,
        "size_bytes": size_bytes,
        "used_bytes": size_bytes - free_bytes,
        "free_bytes": free_bytes,
    }
