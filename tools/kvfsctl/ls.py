"""`kvfsctl ls`: the sequences of a drive."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table


def ls(
    drive: StoreArgument,
    model: Annotated[str | None, typer.Option(help="Only this model's sequences.")] = None,
    json_output: JsonOption = False,
):
    """List sequences with their model, tokens, size and time of last change."""
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        models = {known.id: known for known in store.models()}
        if model is not None:
            store.model(model)  # a wrong name is an error, not an empty list
        rows = [row for row in store.catalogue_rows() if model in (None, models[row.model_id].name)]
    sequences = [
        {
            "name": row.name,
            "model": models[row.model_id].name,
            "num_tokens": row.num_tokens,
            "size_bytes": row.num_tokens * models[row.model_id].geometry.token_bytes,
            "changed_ns": row.changed_ns,
        }
        for row in rows
    ]
    if json_output:
        print_json("ls", drive=str(drive), sequences=sequences)
        return
    print_table(
        f"sequences of {drive}",
        ["sequence", "model", "tokens", "size", "changed (UTC)"],
        [
            [
                row["name"],
                row["model"],
                f"{row['num_tokens']:,}",
                format_size(row["size_bytes"]),
                datetime.fromtimestamp(row["changed_ns"] / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            ]
            for row in sequences
        ],
    )
