"""`kvfsctl quota`: caps on what models and tenants may take of the flash."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    help="Caps on what sequences of a model, of a tenant, or of both take; what is evicted unasked.",
)

ModelOption = Annotated[str, typer.Option(help="The model's name; all models together by default.")]
TenantOption = Annotated[str, typer.Option(help="The tenant; all tenants together by default.")]


@app.command("ls")
def list_quotas(drive: StoreArgument, json_output: JsonOption = False):
    """Show each cap, what it counts now, and who goes first."""
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        usages = store.quotas()
    if json_output:
        print_json("quota ls", drive=str(drive), quotas=[asdict(usage) for usage in usages])
        return
    rows = [
        [
            usage.model or "(all)",
            usage.tenant or "(all)",
            format_size(usage.used_bytes),
            format_size(usage.capacity_bytes),
            f"{usage.used_bytes / usage.capacity_bytes:.0%}",
            f"{usage.low_percent}%",
            usage.policy,
        ]
        for usage in usages
    ]
    columns = ["model", "tenant", "used", "cap", "use", "evicts to", "policy"]
    print_table(f"caps on {drive}", columns, rows, left=2)


@app.command("set")
def set_quota(
    drive: StoreArgument,
    size: Annotated[str, typer.Argument(help="Such as 8GiB; none: no cap any more.")],
    model: ModelOption = "",
    tenant: TenantOption = "",
    low: Annotated[int, typer.Option(help="How far an eviction goes, in percent of the cap.")] = 100,
    policy: Annotated[str, typer.Option(help="Who goes first: lru or clock (see kvfs/space).")] = "lru",
    json_output: JsonOption = False,
):
    """Set a cap. What is above it is evicted at once, what was used longest ago first, never what is pinned."""
    from kvfs.sizes import parse_size

    try:
        capacity = None if size == "none" else parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with open_store(drive) as store:
        if capacity is None:
            store.remove_quota(model, tenant)
        else:
            store.set_quota(model, tenant, capacity_bytes=capacity, low_percent=low, policy=policy)
        store.flush()
    if json_output:
        print_json("quota set", drive=str(drive), model=model, tenant=tenant, capacity_bytes=capacity)
    else:
        whose = " ".join([*[f"model {model}"] * bool(model), *[f"tenant {tenant}"] * bool(tenant)])
        print(f"cap of {whose or 'all models'}: {'none' if capacity is None else f'{capacity:,} bytes'}")


@app.command("background")
def background(
    drive: StoreArgument,
    expired: Annotated[
        bool, typer.Option("--expired", help="Evict what has outlived its time to live (user.kvfs.ttl).")
    ] = False,
    high: Annotated[
        int | None, typer.Option(help="Evict where more of a drive is in use than so many percent.")
    ] = None,
    low: Annotated[int | None, typer.Option(help="Until no more than so many percent are; high - 10.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Evict nothing unasked.")] = False,
    json_output: JsonOption = False,
):
    """Show what is evicted unasked while a process has the drive open, or set it. Nothing by default."""
    is_given = expired or high is not None or low is not None
    if off and is_given:
        raise typer.BadParameter("--off goes with nothing else")
    with open_store(drive) as store:
        if off or is_given:
            store.set_background_eviction(expired=expired, high_percent=high, low_percent=low)
            store.flush()
        policy = store.background_eviction()
    if json_output:
        print_json("quota background", drive=str(drive), **asdict(policy))
        return
    watermarks = f"from {policy.high_percent}% in use down to {policy.low_percent}%"
    said = ["expired sequences"] * policy.expired + [watermarks] * (policy.high_percent is not None)
    print(f"evicted unasked: {', '.join(said) or 'nothing'}")
