"""`kvfsctl objects`: caches of keyed objects, and how much of the drive each may take."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, confirm, print_json, print_table

app = typer.Typer(
    no_args_is_help=True, help="Caches of keyed objects: what engines keep here, and the cap of each."
)

NameArgument = Annotated[str, typer.Argument(help="The cache's name.")]


@app.command("ls")
def list_caches(drive: StoreArgument, json_output: JsonOption = False):
    """Show each cache: its objects, their bytes in whole blocks, its cap.

    Hits and misses are counters of the process that has the drive open: kvfsctl stats shows them.
    """
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        usages = store.object_usage()
    if json_output:
        print_json("objects ls", drive=str(drive), caches=[asdict(usage) for usage in usages])
        return
    rows = [
        [
            usage.name,
            f"{usage.objects:,}",
            f"{usage.identities:,}",
            format_size(usage.bytes),
            "none" if usage.capacity_bytes is None else format_size(usage.capacity_bytes),
        ]
        for usage in usages
    ]
    print_table(f"caches on {drive}", ["cache", "objects", "identities", "size", "cap"], rows, left=1)


@app.command("drop")
def drop(
    drive: StoreArgument,
    name: Annotated[str | None, typer.Argument(help="The cache's name; all caches by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be dropped, drop nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOption = False,
):
    """Forget the objects of a cache, or of all. Names and caps stay.

    Asks first on a terminal; elsewhere --yes is needed.
    """
    with open_store(drive) as store:
        usages = [usage for usage in store.object_usage() if name in (None, usage.name)]
        _check_known(name, usages)
        count = sum(usage.objects for usage in usages)
        if not dry_run:
            confirm(f"Drop {count:,} objects?", yes, "dropped")
            count = store.drop_objects(name)
            store.flush()
    if json_output:
        print_json("objects drop", drive=str(drive), name=name, dry_run=dry_run, num_objects=count)
    else:
        print(f"{'would drop' if dry_run else 'dropped'} {count:,} objects")


@app.command("cap")
def cap(
    drive: StoreArgument,
    name: NameArgument,
    size: Annotated[str, typer.Argument(help="Such as 8GiB; none: what the drive has.")],
    json_output: JsonOption = False,
):
    """Set how much a cache may take. What is too much is evicted at once, what was not used longest first."""
    from kvfs.objects.object_cache import check_capacity

    capacity = None if size == "none" else check_capacity(size)
    with open_store(drive) as store:
        _check_known(name, [usage for usage in store.object_usage() if usage.name == name])
        cache = store.object_cache(name)
        cache.set_capacity(capacity)
        store.flush()
        usage = cache.usage()
    if json_output:
        print_json("objects cap", drive=str(drive), name=name, capacity_bytes=capacity, num_bytes=usage.bytes)
    else:
        print(f"{name}: {usage.objects:,} objects, {usage.bytes:,} bytes of {capacity or 'what the drive has'}")


def _check_known(name: str | None, usages: list) -> None:
    if name is not None and not usages:
        raise typer.BadParameter(f"no cache named {name!r}: kvfsctl objects ls shows them")
