"""`kvfsctl format`: make an empty drive."""

from typing import Annotated

import typer

from kvfsctl.output import DriveArgument, JsonOption, print_json


def format_drive(
    drive: DriveArgument,
    size: Annotated[str, typer.Option(help="Flash capacity, such as 500MB or 8GiB.")] = "1GiB",
    page_size: Annotated[str, typer.Option(help="Flash page and logical block: 4KiB to 64KiB.")] = "4KiB",
    json_output: JsonOption = False,
):
    """Make an empty drive in a new file.

    The file is sparse: it takes space as it is written. An existing file is never overwritten.
    """
    import kvfs
    from kvfs.sizes import format_size, parse_size

    try:
        page_bytes = parse_size(page_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--page-size") from error
    kvfs.format(drive, size, page_size=page_bytes)
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        space = store.counters()["space"]
    if json_output:
        print_json("format", drive=str(drive), **space)
    else:
        print(f"{drive}: an empty drive with room for {format_size(space['capacity_bytes'])}")
