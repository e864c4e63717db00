"""`kvfsctl format`: make an empty drive."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import DriveArgument, JsonOption, print_json

SET_SUFFIX = ".kvfs-set"


def format_drive(
    drive: DriveArgument,
    size: Annotated[
        str | None,
        typer.Option(
            help="Flash capacity, such as 500MB or 8GiB: by default 1GiB in a file, all of a namespace."
        ),
    ] = None,
    page_size: Annotated[str, typer.Option(help="Flash page and logical block: 4KiB to 64KiB.")] = "4KiB",
    spare_percent: Annotated[
        int, typer.Option(min=1, max=50, help="Share of the flash kept back: more makes collection cheaper.")
    ] = 7,
    parity: Annotated[
        bool, typer.Option("--parity", help="Keep parity across dies: a lost page or die can be given back.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite what an NVMe namespace holds. It cannot be undone.")
    ] = False,
    drives: Annotated[
        list[Path] | None,
        typer.Option("--drive", help="One drive of a set, each of this size; DRIVE is then NAME.kvfs-set."),
    ] = None,
    json_output: JsonOption = False,
):
    """Make an empty drive in a new file, or on an NVMe namespace; or a set of drives that are one store.

    A namespace is named by /dev/ng0n1 or, with SPDK, "spdk:0000:01:00.0" or "spdk:trtype:TCP traddr:...",
    or by nvme+tcp://HOST:PORT/NQN; a kvfs drive there (kvfsctl serve) gets an empty store.
    A file is sparse: it takes space as it is written. An existing file is never overwritten. Parity takes
    one die's worth of the flash (an eighth), and lets `kvfsctl scrub` repair what it finds damaged.
    """
    import kvfs
    from kvfs.sizes import format_size, parse_size

    try:
        page_bytes = parse_size(page_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--page-size") from error
    options = {"page_size": page_bytes, "spare_percent": spare_percent, "parity": parity, "overwrite": force}
    if drives or drive.name.endswith(SET_SUFFIX):
        _format_set(drive, drives or [], size, options)
    else:
        kvfs.format(drive, size, **options)
    with open_store(drive) as store:
        space = store.counters()["space"]
    if json_output:
        print_json("format", drive=str(drive), **space)
    else:
        what = f"an empty set of {len(drives)} drives" if drives else "an empty drive"
        print(f"{drive}: {what} with room for {format_size(space['capacity_bytes'])}")


def _format_set(file: Path, drives: list[Path], size: str | None, options: dict) -> None:
    import kvfs
    from kvfs.drive_set import set_file
    from kvfs.errors import DriveExists

    if not drives or not set_file.is_set_file(file):
        raise typer.BadParameter(
            f"a set is made as NAME{SET_SUFFIX} with --drive for each of its drives", param_hint="DRIVE"
        )
    if file.exists():
        raise DriveExists(file)
    locations = [os.fspath(drive) for drive in drives]
    kvfs.format(locations, size, **options)
    set_file.write(file, locations)
