"""`kvfsctl evict`: delete sequences that have outlived their time to live, or the oldest that a cap counts."""

from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, confirm, print_json
from kvfsctl.quota import ModelOption, TenantOption


def evict(
    drive: StoreArgument,
    to: Annotated[
        str | None, typer.Option(help="Until the cap counts no more than this, such as 8GiB; 0: all unpinned.")
    ] = None,
    model: ModelOption = "",
    tenant: TenantOption = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOption = False,
):
    """Delete sequences whose time to live is over (1,024 a call), or with --to those used longest ago of a cap.

    Never what is pinned. Asks first on a terminal; elsewhere --yes is needed.
    """
    from kvfs.sizes import parse_size

    try:
        to_bytes = None if to is None else parse_size(to)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if to_bytes is None and (model or tenant):
        raise typer.BadParameter("--model and --tenant name a cap, which is evicted --to a size")
    with open_store(drive) as store:
        victims = store.evict(model, tenant, to_bytes=to_bytes, dry_run=True)
        if victims and not dry_run:
            confirm(f"Delete {len(victims):,} sequences?", yes, "deleted")
            victims = store.evict(model, tenant, to_bytes=to_bytes)
            store.flush()
    if json_output:
        print_json("evict", drive=str(drive), dry_run=dry_run, deleted=[each.name for each in victims])
        return
    if not victims:
        print("nothing to delete")
    for each in victims:
        print(f"{'would delete' if dry_run else 'deleted'} {each.name} ({each.num_tokens:,} tokens)")
