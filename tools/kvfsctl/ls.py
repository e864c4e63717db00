"""`kvfsctl ls`: the sequences of a drive."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table
from kvfsctl.paging import AfterOption, LimitOption, pages, say_more


def ls(
    drive: StoreArgument,
    model: Annotated[str | None, typer.Option(help="Only this model's sequences.")] = None,
    limit: LimitOption = None,
    after: AfterOption = "",
    json_output: JsonOption = False,
):
    """List sequences by name with their model, tokens, size and time of last change."""
    shown = 0
    with open_store(drive) as store:
        models = {known.id: known for known in store.models()}
        found = (
            [_facts(row, models[row.model_id]) for row in rows] for rows in pages(store, after, limit, model)
        )
        if json_output:
            print_json("ls", drive=str(drive), sequences=[facts for page in found for facts in page])
            return
        last = ""
        for page in found:  # a table for each: what is shown is not kept
            _print(drive, page)
            shown, last = shown + len(page), page[-1]["name"]
    if shown:
        say_more(shown, limit, last)
    else:
        _print(drive, [])


def _facts(row, model) -> dict:
    return {
        "name": row.name,
        "model": model.name,
        "num_tokens": row.num_tokens,
        "size_bytes": row.num_tokens * model.geometry.token_bytes,
        "changed_ns": row.changed_ns,
    }


def _print(drive, sequences: list[dict]) -> None:
    from kvfs.sizes import format_size

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
