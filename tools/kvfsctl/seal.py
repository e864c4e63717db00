"""`kvfsctl seal`: what the drive derives of complete token groups for sparse attention."""

import time
from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Derived data for sparse attention: what there is, and making it.")

ModelOption = Annotated[str | None, typer.Option("--model", help="Only this model's.")]
LayoutOption = Annotated[
    str | None, typer.Option("--layout", help="sketch, or channel_major_keys; all there are, if left out.")
]


@app.command("ls")
def list_derived(drive: StoreArgument, model: ModelOption = None, json_output: JsonOption = False):
    """Show what each layout takes beside the tokens' own pages, by model."""
    with open_store(drive) as store:
        rows = _rows(store, model)
    if json_output:
        print_json("seal ls", drive=str(drive), derived=rows)
        return
    print_derived(f"derived data on {drive}", rows)


def print_derived(title: str, rows: list[dict]) -> None:
    from kvfs.sizes import format_size

    print_table(
        title,
        ["model", "layout", "made of new groups", "segments", "tokens", "takes", "of the tokens' own pages"],
        [
            [
                row["model"],
                row["derive"],
                "yes" if row["is_wanted"] else "no",
                f"{row['num_segments']:,}",
                f"{row['num_tokens']:,}",
                format_size(row["num_bytes"]),
                f"{row['share']:.1%}",
            ]
            for row in rows
        ],
        left=3,
    )


def _rows(store, model: str | None = None) -> list[dict]:
    return [
        {**asdict(usage), "share": usage.share}
        for usage in store.derived_usage()
        if model in (None, usage.model)
    ]


@app.command("set")
def set_policy(
    drive: StoreArgument,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    layouts: Annotated[list[str] | None, typer.Argument(help="sketch, channel_major_keys; none: stop.")] = None,
    json_output: JsonOption = False,
):
    """Choose what is made of a model's complete groups in the background, from now on, whoever has the drive
    open."""
    with open_store(drive) as store:
        store.set_sealing(store.model(model), layouts or ())
        store.flush()
        chosen = store.sealing(store.model(model))
    if json_output:
        print_json("seal set", drive=str(drive), model=model, seal=list(chosen))
        return
    print(f"model {model}: {', '.join(chosen) or 'nothing'} is made of complete groups")


@app.command("run")
def run(
    drive: StoreArgument,
    sequences: Annotated[
        list[str] | None, typer.Argument(help="Sequences; all of the chosen model, or of all, if left out.")
    ] = None,
    model: ModelOption = None,
    layout: Annotated[str, typer.Option("--layout", help="sketch or channel_major_keys.")] = "sketch",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there, and make anew what is damaged.")
    ] = False,
    json_output: JsonOption = False,
):
    """Seal all complete groups now, and wait. What is there already stays as it is."""
    done = []
    with open_store(drive) as store:
        known = {found.id: found.name for found in store.models()}
        if model is not None:
            store.model(model)
        names = sequences or [
            row.name for row in store.catalogue_rows() if model in (None, known.get(row.model_id))
        ]
        start = time.perf_counter()
        for name in names:
            sequence = store.sequence(name)
            damaged = sequence.reseal(layout) if verify else 0
            done.append(
                {"sequence": name, "num_tokens": sequence.num_tokens, "sealed": sequence.seal(layout)}
                | ({"damaged": damaged} if verify else {})
            )
        store.flush()
        seconds = time.perf_counter() - start
        rows = _rows(store, model)
    if json_output:
        print_json("seal run", drive=str(drive), layout=layout, seconds=seconds, sequences=done, derived=rows)
        return
    for row in done:
        damaged = f", {row['damaged']} segments were damaged" if row.get("damaged") else ""
        print(f"{row['sequence']}: {row['sealed']:,} of {row['num_tokens']:,} tokens have a {layout}{damaged}")
    print_derived(f"derived data on {drive}", rows)


@app.command("drop")
def drop(
    drive: StoreArgument,
    model: ModelOption = None,
    layout: LayoutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be dropped, drop nothing.")
    ] = False,
    json_output: JsonOption = False,
):
    """Give derived data up: tokens stay, and attention reads their own pages.

    Set what is made of a model's groups to none before, or it is made again.
    """
    with open_store(drive) as store:
        if dry_run:
            count = sum(row["num_segments"] for row in _rows(store, model) if layout in (None, row["derive"]))
        else:
            count = store.drop_derived(model, layout)
            store.flush()
    if json_output:
        print_json("seal drop", drive=str(drive), dry_run=dry_run, num_segments=count)
        return
    print(f"{'would drop' if dry_run else 'dropped'} {count:,} segments")
