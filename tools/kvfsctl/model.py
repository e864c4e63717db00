"""`kvfsctl model`: the models whose KV a drive keeps."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, confirm, print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    help="Models: which the drive knows, adding one, deleting one. What a machine would give for one: kvfsctl"
    " machine.",
)

NameArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]


def _facts(model) -> dict:
    return {"name": model.name, **asdict(model.geometry), "token_bytes": model.geometry.token_bytes}


@app.command("ls")
def list_models(drive: StoreArgument, json_output: JsonOption = False):
    """Show each model: its shape, and how much KV a token of it takes."""
    with open_store(drive) as store:
        models = [_facts(model) for model in store.models()]
        counts = store.sequence_counts()
    models = [{**model, "num_sequences": counts[model["name"]]} for model in models]
    if json_output:
        print_json("model ls", drive=str(drive), models=models)
    else:
        print_models(models)


def print_models(models: list[dict]) -> None:
    from kvfs.sizes import format_size

    print_table(
        "models",
        ["model", "layers", "query heads", "KV heads", "head_dim", "dtype", "KV per token", "sequences"],
        [
            [
                model["name"],
                *(str(model[name]) for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_dim")),
                model["dtype"],
                format_size(model["token_bytes"]),
                f"{model['num_sequences']:,}",
            ]
            for model in models
        ],
    )


@app.command()
def add(
    drive: StoreArgument,
    name: NameArgument,
    num_layers: Annotated[int, typer.Option("--layers", help="Layers with KV of their own.")],
    num_query_heads: Annotated[int, typer.Option("--query-heads", help="Query heads of a layer.")],
    num_kv_heads: Annotated[int, typer.Option("--kv-heads", help="KV heads of a layer.")],
    head_dim: Annotated[int, typer.Option("--head-dim", help="Channels of a head.")],
    dtype: Annotated[
        str, typer.Option(help="How KV is kept: float16, bfloat16, float32, float8_e4m3, int8 or int4.")
    ] = "float16",
    json_output: JsonOption = False,
):
    """Make a model known, as engines do with their first sequence. One that is known with this shape stays."""
    with open_store(drive) as store:
        model = store.add_model(
            name,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        store.flush()
        facts = _facts(model)
    if json_output:
        print_json("model add", drive=str(drive), model=facts)
    else:
        print(f"model {name}: {facts['token_bytes']:,} bytes of KV per token")


@app.command()
def rm(
    drive: StoreArgument,
    name: NameArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOption = False,
):
    """Delete a model that has no sequences, with its caps.

    Asks first on a terminal; elsewhere --yes is needed.
    """
    from kvfs.errors import ModelInUse

    with open_store(drive) as store:
        store.model(name)
        num_sequences = store.sequence_counts()[name]
        if num_sequences:
            raise ModelInUse(name, num_sequences)
        if not dry_run:
            confirm(f"Delete model {name}?", yes, "deleted")
            store.delete_model(name)
            store.flush()
    if json_output:
        print_json("model rm", drive=str(drive), dry_run=dry_run, deleted=[name])
    else:
        print(f"{'would delete' if dry_run else 'deleted'} model {name}")
