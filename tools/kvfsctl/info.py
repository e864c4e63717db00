"""`kvfsctl info`: what a drive is and how full."""

from kvfsctl.output import DriveArgument, JsonOption, print_json, print_table


def info(drive: DriveArgument, json_output: JsonOption = False):
    """Show a drive's geometry, space, flash health, and the models it knows."""
    import kvfs
    from kvfs.sizes import format_size

    with kvfs.open(drive, cache_bytes="8MiB") as store:
        counters = store.counters()
        models = [
            {"name": model.name, **vars(model.geometry), "token_bytes": model.geometry.token_bytes}
            for model in store.models()
        ]
        num_sequences = len(store.catalogue_rows())
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
        wear = ("erase_count_min", "erase_count_max", "erase_count_mean")
        print_json(
            "info",
            drive=str(drive),
            num_sequences=num_sequences,
            models=models,
            space=space,
            flash={name: flash[name] for name in fields + wear},
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
            ["superblocks, free", f"{flash['num_superblocks']}, {flash['free_superblocks']}"],
            ["erases per superblock, most", str(flash["erase_count_max"])],
            ["sequences", str(num_sequences)],
        ],
    )
    if models:
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
