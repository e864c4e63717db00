"""`kvfsctl status`: is everything as it should be?"""

import errno
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import EXIT_DEGRADED, JsonOption, print_json, print_table
from kvfsctl.repeating import CountArgument, IntervalArgument, repeat

STATISTICS = (".kvfs", "stats.json")
GONE = (errno.ENOTCONN, errno.ECONNABORTED)


def status(
    place: Annotated[
        Path | None,
        typer.Argument(metavar="DRIVE|MOUNT", help="All that is mounted here, if left out."),
    ] = None,
    interval: IntervalArgument = None,
    count: CountArgument = None,
    json_output: JsonOption = False,
):
    """Show what is mounted, how full and how worn it is, and what is not as it should be.

    Exit code 4 when something is not: a drive of a set is lost or slow, pages were lost, spare or life run out,
    or the server of a mount is gone. A drive that is not mounted is opened to be looked at. With --json and an
    interval each look is a line of JSON.
    """
    found: list[dict] = []

    def show() -> None:
        found[:] = _look_at(place)
        if json_output:
            print_json("status", in_a_line=interval is not None, drives=found)
        else:
            _print(found)

    repeat(show, interval, count)
    if any(one["complaints"] for one in found):
        sys.exit(EXIT_DEGRADED)


def _look_at(place: Path | None) -> list[dict]:
    from kvfs.mount.mountpoints import FILE_SYSTEM_TYPE, mount_at, mount_of, mounts

    if place is None:
        return [_of_mount(mount) for mount in mounts() if mount.file_system_type == FILE_SYSTEM_TYPE]
    mount = mount_at(place) or mount_of(place)
    if mount is not None and mount.file_system_type == FILE_SYSTEM_TYPE:
        return [_of_mount(mount)]
    from kvfsctl.opening import open_store

    with open_store(place, degraded=True) as store:
        return [_row(str(place), None, "closed", store.counters())]


def _of_mount(mount) -> dict:
    """By what the mount says of itself: the modules of a client of its socket load longer than this takes."""
    try:
        counters = json.loads(Path(mount.mountpoint, *STATISTICS).read_bytes())
    except PermissionError:
        return _row(mount.source, mount.mountpoint, "another user's", None)
    except OSError as error:
        if error.errno not in GONE:
            raise
        why = f"its server is gone: kvfsctl umount {mount.mountpoint}, then mount it again"
        return _row(mount.source, mount.mountpoint, "server gone", None, [why])
    return _row(mount.source, mount.mountpoint, "mounted", counters)


def _row(drive: str, mountpoint: str | None, state: str, counters: dict | None, why: list[str] | None = None):
    from kvfs.administration.condition import complaints

    row = {"drive": drive, "mountpoint": mountpoint, "state": state, "complaints": why or []}
    row |= dict.fromkeys(("size_bytes", "free_bytes", "life_used_percent", "spare_percent"))
    if counters is None:
        return row
    row["complaints"] = complaints(counters)
    row["size_bytes"], row["free_bytes"] = (counters["space"][f"{n}_bytes"] for n in ("capacity", "free"))
    if "drives" not in counters:
        row["life_used_percent"] = counters["flash"]["percentage_used"]
        row["spare_percent"] = counters["flash"]["available_spare_percent"]
    return row


def _print(rows: list[dict]) -> None:
    from kvfs.sizes import format_size

    if not rows:
        print("no drive is mounted here; kvfsctl status DRIVE looks at one that is not")
        return
    print_table(
        "kvfs drives",
        ["drive", "mounted at", "state", "size", "used", "life used", "spare"],
        [
            [
                row["drive"],
                row["mountpoint"] or "–",
                ("degraded, " if row["complaints"] and row["size_bytes"] else "") + row["state"],
                "–" if row["size_bytes"] is None else format_size(row["size_bytes"]),
                "–" if row["size_bytes"] is None else f"{1 - row['free_bytes'] / row['size_bytes']:.0%}",
                *("–" if row[n] is None else f"{row[n]} %" for n in ("life_used_percent", "spare_percent")),
            ]
            for row in rows
        ],
        left=3,
    )
    for row in rows:
        for complaint in row["complaints"]:
            print(f"{row['drive']}: {complaint}")
