"""`kvfsctl prefix`: what prompts can begin with, by tenant and model."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, confirm, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Stored prefixes: which tenant and model can reuse how much.")

TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Only this tenant's; '' is that of users who name none.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Only this model's.")]


@app.command("ls")
def list_prefixes(
    drive: StoreArgument,
    tenant: TenantOption = None,
    model: ModelOption = None,
    json_output: JsonOption = False,
):
    """Show how many token groups can be found, and how many sequences publish, by tenant and model.

    Hits and misses are counters of the process that has the drive open: kvfsctl stats shows them.
    """
    with open_store(drive) as store:
        usages = _chosen(store, tenant, model)
        group_tokens = {known.name: known.group_tokens for known in store.models()}
    rows = [{**asdict(usage), "num_tokens": usage.num_groups * group_tokens[usage.model]} for usage in usages]
    if json_output:
        print_json("prefix ls", drive=str(drive), prefixes=rows)
        return
    print_table(
        f"prefixes on {drive}",
        ["tenant", "model", "settings", "groups", "tokens", "sequences that publish"],
        [
            [row["tenant"], row["model"], row["settings"], *(f"{row[name]:,}" for name in _NUMBERS)]
            for row in rows
        ],
        left=3,
    )


_NUMBERS = ("num_groups", "num_tokens", "num_sequences")


@app.command("drop")
def drop(
    drive: StoreArgument,
    tenant: TenantOption = None,
    model: ModelOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be dropped, drop nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOption = False,
):
    """Let prefixes be found no more: of one tenant, of one model, or all. No sequence is deleted.

    Asks first on a terminal; elsewhere --yes is needed.
    """
    with open_store(drive) as store:
        usages = _chosen(store, tenant, model)
        if not dry_run:
            confirm(f"Drop {sum(usage.num_groups for usage in usages):,} groups?", yes, "dropped")
            store.drop_prefixes(tenant, model)
    if json_output:
        print_json(
            "prefix drop", drive=str(drive), dry_run=dry_run, dropped=[asdict(usage) for usage in usages]
        )
        return
    for usage in usages:
        verb = "would drop" if dry_run else "dropped"
        print(f"{verb} {usage.num_groups:,} groups of tenant {usage.tenant!r}, model {usage.model}")


def _chosen(store, tenant: str | None, model: str | None) -> list:
    return [
        usage
        for usage in store.prefix_usage()
        if tenant in (None, usage.tenant) and model in (None, usage.model)
    ]
