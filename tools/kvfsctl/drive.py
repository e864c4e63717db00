"""`kvfsctl drive`: the drives of a set, while it is in use or not."""

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, fail, print_json, print_table, progress_bar

app = typer.Typer(no_args_is_help=True, help="The drives of a set: which there are, adding and draining them.")

SetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SET|MOUNT", help="The set's file, NAME.kvfs-set, or the folder where it is mounted."
    ),
]
OneArgument = Annotated[str, typer.Argument(metavar="DRIVE", help="By location or id, as list shows them.")]


@contextmanager
def _drives(place: Path):
    """The drives, through the set's mount where it has one."""
    from kvfs.drive_set.remote_drives import drives_of
    from kvfs.mount.mountpoints import mount_of

    mount = mount_of(place) if place.is_file() else None
    with open_store(Path(mount.mountpoint) if mount else place, degraded=True) as store:
        yield drives_of(store)


def _location(text: str) -> str:
    """As the set's owner understands it, who works in another folder."""
    return str(Path(text).absolute()) if Path(text).exists() else text


@app.command("list")
def list_drives(place: SetArgument, json_output: JsonOption = False):
    """Show each drive's state, room, and how long its answers take."""
    with _drives(place) as drives:
        found = drives.states()
    if json_output:
        print_json("drive list", set=str(place), drives=found)
    else:
        print_drives(place, found)


@app.command()
def add(place: SetArgument, drive: OneArgument, json_output: JsonOption = False):
    """Take an empty drive into the set. New sequences use it; those that there are stay where they are."""
    with _drives(place) as drives:
        drives.add(_location(drive))
    if json_output:
        print_json("drive add", set=str(place), added=drive)
    else:
        print(f"{drive} is one of {place}: new sequences use it")


@app.command()
def drain(place: SetArgument, drive: OneArgument, json_output: JsonOption = False):
    """Move everything from a drive to the others, then take it out of the set. Whoever uses the set goes on.

    It can be ended at any time and run again: what has moved stays where it is. `kvfsctl drive stay` calls it
    off.
    """
    moved = 0
    with _drives(place) as drives, progress_bar(f"draining {drive}") as bar:

        def progress(done: int, total: int) -> None:
            nonlocal moved
            moved = done
            bar(done, total)

        drives.drain(_location(drive), progress)
    if json_output:
        print_json("drive drain", set=str(place), drained=drive, moved_bytes=moved)
    else:
        from kvfs.sizes import format_size

        print(f"{drive} has left {place}: {format_size(moved)} moved")


@app.command()
def stay(place: SetArgument, drive: OneArgument, json_output: JsonOption = False):
    """Call a drain off: the drive takes new sequences again."""
    with _drives(place) as drives:
        drives.stay(_location(drive))
    if json_output:
        print_json("drive stay", set=str(place), stays=drive)
    else:
        print(f"{drive} stays in {place}")


@app.command("return")
def bring_back(
    place: SetArgument,
    drive: OneArgument,
    location: Annotated[str | None, typer.Option("--at", help="Where it is now, if it was moved.")] = None,
    json_output: JsonOption = False,
):
    """Open a drive again that was lost while the set was in use: its sequences can be used again."""
    with _drives(place) as drives:
        drives.bring_back(_location(drive), None if location is None else _location(location))
    if json_output:
        print_json("drive return", set=str(place), returned=drive)
    else:
        print(f"{drive} is back in {place}")


@app.command()
def remove(
    place: SetArgument,
    drive: OneArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be lost, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete the sequences with parts on it.")] = False,
    json_output: JsonOption = False,
):
    """Go on without a drive that is lost for good: the sequences with parts on it are deleted."""
    if not yes and not dry_run:
        raise typer.BadParameter("sequences are deleted by this: say --yes")
    with _drives(place) as drives:
        lost = [each for each in drives.states() if _location(drive) in (each["drive"], each["id"])]
        num_heads = sum(each["num_kv_heads"] for each in lost)
        if dry_run and not any(each["is_lost"] for each in lost):
            fail(f"{drive} is no lost drive of {place}: kvfsctl drive list shows which are")
        if not dry_run:
            drives.remove_lost(_location(drive))
    if json_output:
        print_json("drive remove", set=str(place), removed=drive, dry_run=dry_run, num_kv_heads=num_heads)
    elif dry_run:
        print(f"would go on without {drive}: {num_heads} KV heads of sequences are on it")
    else:
        print(f"{place} goes on without {drive}")


def print_drives(place, drives: list[dict]) -> None:
    from kvfs.sizes import format_size

    print_table(
        f"drives of {place}",
        ["drive", "state", "size", "free", "KV heads", "attend", "to the others'"],
        [
            [
                each["drive"] + (" (files)" if each["has_files"] else ""),
                each["state"],
                *("–" if each[n] is None else format_size(each[n]) for n in ("capacity_bytes", "free_bytes")),
                str(each["num_kv_heads"]),
                f"{each['attend_latency_us'] / 1e3:.2f} ms" if each["attend_latency_us"] else "–",
                "–" if each["latency_ratio"] is None else f"{each['latency_ratio']:.2f}",
            ]
            for each in drives
        ],
        left=2,
    )
