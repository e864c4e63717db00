"""`kvfsctl gc`: collect garbage now."""

from typing import Annotated

import typer

from kvfsctl.opening import each_drive, mount_folder
from kvfsctl.output import JsonOption, StoreArgument, print_json


def gc(
    drive: StoreArgument,
    superblocks: Annotated[
        int | None, typer.Option(min=1, help="At most so many; all that gain something by default.")
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            help="How victims are chosen: greedy, cost-benefit or d-choices. A mount has chosen already."
        ),
    ] = None,
    json_output: JsonOption = False,
):
    """Collect garbage now: empty superblocks that hold deleted data, so that later writes need not wait.

    The drive collects by itself as it has to. Collecting ahead costs wear, since what would have died by
    itself is copied: do it before a burst of writes, not by habit.
    """
    from kvfs.errors import InvalidArgument

    if collection is not None and mount_folder(drive) is not None:
        raise typer.BadParameter("chosen when the drive is mounted: -o collection=", param_hint="--collection")
    options = {} if collection is None else {"collection": collection}
    try:
        found = [
            _collect(one, care, superblocks) for one, care in each_drive(drive, read_only=False, **options)
        ]
    except InvalidArgument as error:
        if collection is None:
            raise
        raise typer.BadParameter(str(error), param_hint="--collection") from error
    if json_output:
        print_json("gc", **(found[0] if len(found) == 1 else {"set": str(drive), "drives": found}))
        return
    for one in found:
        print(
            f"{one['drive']}: collected {one['superblocks_collected']} superblocks,"
            f" copied {one['pages_copied']} pages; {one['free_superblocks']} free,"
            f" {one['free_superblocks_before']} before"
        )


def _collect(drive, care, superblocks: int | None) -> dict:
    before = care.health()
    count = care.collect(superblocks or 0)
    after = care.health()
    return {
        "drive": str(drive),
        "superblocks_collected": count,
        "pages_copied": after["gc_pages_written"] - before["gc_pages_written"],
        "free_superblocks_before": before["free_superblocks"],
        "free_superblocks": after["free_superblocks"],
    }
