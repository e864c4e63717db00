"""`kvfsctl info`: what a drive is and how full."""

from dataclasses import asdict

from kvfsctl.drive import print_drives
from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table
from kvfsctl.seal import print_derived

WAF_PARTS = ("host", "garbage_collection", "wear_levelling", "padding", "parity", "metadata")


def info(drive: StoreArgument, json_output: JsonOption = False):
    """Show a drive's geometry, space, flash health, and the models it knows."""
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        counters = store.counters()
        models = [
            {"name": model.name, **vars(model.geometry), "token_bytes": model.geometry.token_bytes}
            for model in store.models()
        ]
        num_sequences = len(store.catalogue_rows())
        derived = [{**asdict(usage), "share": usage.share} for usage in store.derived_usage()]
    if "drives" in counters:
        _info_of_set(drive, counters, models, num_sequences, derived, json_output)
        return
    space, flash = counters["space"], counters["flash"]
    if json_output:
        fields = (
            "num_channels",
            "num_superblocks",
            "free_superblocks",
            "page_size",
            "num_pages",
            "mapped_pages",
        )
        wear = (
            "erase_count_min",
            "erase_count_max",
            "erase_count_mean",
            "rated_cycles",
            "percentage_used",
            "available_spare_percent",
            "num_erase_blocks",
            "bad_erase_blocks",
            "quarantined_superblocks",
            "num_parity_dies",
        )
        print_json(
            "info",
            drive=str(drive),
            num_sequences=num_sequences,
            models=models,
            derived=derived,
            space=space,
            flash={name: flash[name] for name in fields + wear},
            waf=counters["waf"],
        )
        return
    used = space["capacity_bytes"] - space["free_bytes"]
    print_table(
        f"drive {drive}",
        ["", "value"],
        [
            ["room for data", format_size(space["capacity_bytes"])],
            ["used", f"{format_size(used)} ({used / space['capacity_bytes']:.1%})"],
            ["catalogue area", format_size(space["metadata_bytes"])],
            ["flash", format_size(flash["num_pages"] * flash["page_size"])],
            ["page", format_size(flash["page_size"])],
            ["channels", str(flash["num_channels"])],
            ["parity across dies", "yes" if flash["num_parity_dies"] else "no"],
            ["superblocks, free", f"{flash['num_superblocks']}, {flash['free_superblocks']}"],
            ["sequences", str(num_sequences)],
            *_wear_rows(flash),
            *_waf_rows(counters["waf"]),
        ],
    )
    _print_models(models, derived)


def _info_of_set(
    drive, counters: dict, models: list[dict], num_sequences: int, derived: list[dict], json_output: bool
) -> None:
    """Of several drives: what they are together, then each."""
    from kvfs.sizes import format_size

    space = counters["space"]
    if json_output:
        fields = {
            "num_sequences": num_sequences,
            "models": models,
            "derived": derived,
            "space": space,
            "drives": counters["drives"],
        }
        print_json("info", drive=str(drive), **fields)
        return
    used = space["capacity_bytes"] - space["free_bytes"]
    print_table(
        f"set of {len(counters['drives'])} drives {drive}",
        ["", "value"],
        [
            ["room for data", format_size(space["capacity_bytes"])],
            ["used", f"{format_size(used)} ({used / space['capacity_bytes']:.1%})"],
            ["sequences", str(num_sequences)],
        ],
    )
    print_drives(drive, counters["drives"])
    _print_models(models, derived)


def _print_models(models: list[dict], derived: list[dict]) -> None:
    from kvfs.sizes import format_size

    if not models:
        return
    print_table(
        "models",
        ["model", "layers", "query heads", "KV heads", "head_dim", "dtype", "KV per token"],
        [
            [
                model["name"],
                str(model["num_layers"]),
                str(model["num_query_heads"]),
                str(model["num_kv_heads"]),
                str(model["head_dim"]),
                model["dtype"],
                format_size(model["token_bytes"]),
            ]
            for model in models
        ],
    )
    if derived:
        print_derived("derived for sparse attention", derived)


def _wear_rows(flash: dict) -> list[list[str]]:
    counts = f"{flash['erase_count_min']:,}, {flash['erase_count_mean']:,.1f}, {flash['erase_count_max']:,}"
    return [
        ["erases: least, mean, most", f"{counts} of {flash['rated_cycles']:,}"],
        ["bad erase blocks", f"{flash['bad_erase_blocks']:,} of {flash['num_erase_blocks']:,}"],
        ["spare left", f"{flash['available_spare_percent']} %"],
        ["superblocks with lost pages", str(flash["quarantined_superblocks"])],
    ]


def _waf_rows(waf: dict) -> list[list[str]]:
    """Write amplification over the drive's life, and by cause since it was opened if anything was written."""
    rows = []
    if waf["lifetime"] is not None:
        rows.append(["write amplification, lifetime", f"at least {waf['lifetime']:.3f}"])
    if waf["total"] is not None:
        rows.append(["since opening", f"{waf['total']:.3f}"])
        rows += [[f"  {name.replace('_', ' ')}", f"{waf[name]:.3f}"] for name in WAF_PARTS]
    return rows
