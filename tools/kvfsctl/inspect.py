"""`kvfsctl inspect`: one sequence, or one block, in all its facts."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import each_drive, open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table


def inspect(
    drive: StoreArgument,
    sequence: Annotated[str | None, typer.Argument(metavar="SEQUENCE", help="A name, as ls shows it.")] = None,
    lba: Annotated[
        int | None, typer.Option("--lba", min=0, help="Whose this logical block is, as a message names it.")
    ] = None,
    json_output: JsonOption = False,
):
    """Show all that is known of a sequence, or whose a block is."""
    if (sequence is None) == (lba is None):
        raise typer.BadParameter("name a sequence, or a block with --lba")
    if sequence is not None:
        facts = _sequence(drive, sequence)
        if json_output:
            print_json("inspect", drive=str(drive), **facts)
        else:
            _print(facts)
        return
    owners = [{"drive": str(one), "lba": lba, **care.owner(lba)} for one, care in each_drive(drive)]
    if json_output:
        print_json("inspect", drive=str(drive), blocks=owners)
        return
    for owner in owners:
        print(f"{owner['drive']}: LBA {lba}: {owner['text']}")


def _sequence(place: Path, name: str) -> dict:
    with open_store(place) as store:
        sequence = store.sequence(name)
        geometry = sequence.model.geometry
        return {
            "sequence": sequence.name,
            "model": sequence.model.name,
            **asdict(geometry),
            "num_tokens": sequence.num_tokens,
            "num_token_ids": sequence.num_token_ids,
            "size_bytes": sequence.num_tokens * geometry.token_bytes,
            "num_groups": -(-sequence.num_tokens // geometry.group_tokens),
            "created_ns": sequence.created_ns,
            "changed_ns": sequence.changed_ns,
            "attributes": {
                attribute: value.decode("utf-8", "backslashreplace")
                for attribute, value in sequence.attributes().items()
            },
        }


def _print(facts: dict) -> None:
    from kvfs.sizes import format_size

    def day(time_ns: int) -> str:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

    heads = f"{facts['num_query_heads']} query heads, {facts['num_kv_heads']} KV heads of {facts['head_dim']}"
    print_table(
        f"sequence {facts['sequence']}",
        ["", "value"],
        [
            ["model", facts["model"]],
            ["shape", f"{facts['num_layers']} layers, {heads}, {facts['dtype']}"],
            ["tokens", f"{facts['num_tokens']:,}"],
            ["token ids known", f"{facts['num_token_ids']:,}"],
            ["keys and values", format_size(facts["size_bytes"])],
            ["token groups", f"{facts['num_groups']:,} of {facts['group_tokens']:,} tokens"],
            ["created", day(facts["created_ns"])],
            ["changed", day(facts["changed_ns"])],
            *([name, value] for name, value in sorted(facts["attributes"].items())),
        ],
        left=2,
    )
