"""`kvfsctl gc`: collect garbage now."""

from typing import Annotated

import typer

from kvfsctl.opening import open_inspection
from kvfsctl.output import DriveArgument, JsonOption, print_json


def gc(
    drive: DriveArgument,
    superblocks: Annotated[
        int | None, typer.Option(min=1, help="At most so many; all that gain something by default.")
    ] = None,
    collection: Annotated[
        str, typer.Option(help="How victims are chosen: greedy, cost-benefit or d-choices.")
    ] = "greedy",
    json_output: JsonOption = False,
):
    """Collect garbage now: empty superblocks that hold deleted data, so that later writes need not wait.

    The drive collects by itself as it has to. Collecting ahead costs wear, since what would have died by
    itself is copied: do it before a burst of writes, not by habit.
    """
    from kvfs.errors import InvalidArgument

    try:
        inspection = open_inspection(drive, read_only=False, collection=collection)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error), param_hint="--collection") from error
    with inspection:
        before = int(inspection.flash.health()["free_superblocks"])
        count = inspection.flash.collect(superblocks or 0)
        health = inspection.flash.health()
        inspection.namespace.flush()
    after, copied = int(health["free_superblocks"]), int(health["gc_pages_written"])
    if json_output:
        print_json(
            "gc",
            drive=str(drive),
            superblocks_collected=count,
            pages_copied=copied,
            free_superblocks_before=before,
            free_superblocks=after,
        )
    else:
        print(f"{drive}: collected {count} superblocks, copied {copied} pages; {after} free, {before} before")
