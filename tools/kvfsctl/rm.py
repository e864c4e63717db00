"""`kvfsctl rm`: delete sequences."""

from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, confirm, print_json


def rm(
    drive: StoreArgument,
    sequences: Annotated[list[str], typer.Argument(metavar="SEQUENCE...", help="Names, as ls shows them.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Of a set: also sequences with parts on drives that are missing.")
    ] = False,
    json_output: JsonOption = False,
):
    """Delete sequences and free their space. All names are checked before anything is deleted.

    Asks first on a terminal; elsewhere --yes is needed.
    """
    from kvfs.drive_set.remote_drives import drives_of

    with open_store(drive, degraded=lost) as store:
        num_tokens = {name: store.sequence(name).num_tokens for name in dict.fromkeys(sequences)}
        if not dry_run:
            confirm(f"Delete {', '.join(num_tokens)}?", yes, "deleted")
            if lost:
                for name in num_tokens:
                    drives_of(store).forget(name)
            else:
                store.delete_sequences(num_tokens)
    if json_output:
        print_json("rm", drive=str(drive), dry_run=dry_run, deleted=list(num_tokens))
        return
    for name, count in num_tokens.items():
        print(f"{'would delete' if dry_run else 'deleted'} {name} ({count:,} tokens)")
