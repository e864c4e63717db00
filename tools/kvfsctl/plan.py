"""`kvfsctl plan`: what to choose for a model, a context and this machine, and what it gives."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfsctl.output import JsonOption, print_json, print_table


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A Hugging Face folder or config.json, a model known to a --drive, or a geometry:"
            " layers=32,heads=32,kv_heads=8,head_dim=128[,hidden=4096,intermediate=14336,vocab=...,dtype=...]."
        ),
    ],
    memory: Annotated[
        str, typer.Option(help="For the KV cache, as 8GiB: caches, newest tokens, kvfs itself; no weights.")
    ],
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")],
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 1,
    drive: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a drive would be: a folder, or a drive's file. By default the current folder."
        ),
    ] = None,
    drives: Annotated[
        int | None, typer.Option(help="Try up to so many drives as a set, dealt out to the places in turn.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype of K and V; by default the model's.")] = None,
    x_in_memory: Annotated[
        bool, typer.Option("--x-in-memory", help="Plan X-cache with X in host memory, not on the drive.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Run it, dense and with the chosen compression: show the prediction beside what is measured.",
        ),
    ] = False,
    verify_all: Annotated[
        bool, typer.Option("--verify-all", help="As --verify, for every number of drives and workers tried.")
    ] = False,
    json_output: JsonOption = False,
):
    """Measure this machine, choose the settings, explain them, and predict tokens/s.

    Takes some seconds to half a minute, and some hundred MiB in each place; --verify as much as the KV cache
    twice, and longer. Drives made for it are temporary. Other load on the machine is measured, too.
    """
    from kvfs.errors import InvalidArgument
    from kvfs.sizes import parse_size
    from kvfs_bench.planner import run
    from kvfs_bench.planner.model_shape import read_model
    from kvfs_bench.planner.planning import Request, as_dict

    try:
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise InvalidArgument(f"memory: {error}") from error
    named = drive or ["."]
    places = [_place(text) for text in named]
    shape = read_model(model, named, dtype)
    request = Request(
        shape, memory_bytes, context, batch, len(places) if drives is None else drives, x_in_memory
    )
    status = Console(stderr=True).status("begins")
    with status:

        def say(text: str) -> None:
            status.update(text)

        made = run.plan(request, places, say)
        found = run.verify(made, places, verify_all, say) if verify or verify_all else []
    if json_output:
        print_json("plan", **as_dict(made), verification=[one.as_dict() for one in found])
    else:
        _print(made, found)


def _place(text: str) -> Path:
    """The folder where a temporary drive is made for a place that the user names."""
    from kvfs.errors import InvalidArgument
    from kvfs.nvme.discovery import is_address

    if is_address(text):
        raise InvalidArgument(f"drive: {text}: only places of files can be planned for")
    path = Path(text)
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise InvalidArgument(f"drive: {folder} is no folder")
    return folder


def _print(made, found) -> None:
    from kvfs.sizes import format_size
    from kvfs_bench.planner import words

    request, geometry = made.request, made.request.shape.geometry
    title = (
        f"{request.shape.name}: {geometry.num_layers} layers, {geometry.num_query_heads} query and"
        f" {geometry.num_kv_heads} KV heads of {geometry.head_dim}, {geometry.dtype}; {request.batch} x"
        f" {request.context:,} tokens, {format_size(request.memory_bytes)} of memory"
    )
    print(title)
    print_table("measured here", ["", "value"], words.measured_rows(made))
    print_table("a predicted step", words.step_columns(made), words.step_rows(made))
    if made.compressions:
        print_table(
            "compressions: predicted speed, and quality where somebody has measured it",
            ["compression", "page bytes, of dense", "from flash", "tokens/s", "quality"],
            words.compression_rows(made),
        )
    print_table(
        "flash that the context takes, by storage dtype; --dtype plans for another",
        ["dtype", "K and V", "+ sketches", "+ channels (SparF)", "reading K and V, a step"],
        words.storage_rows(made),
    )
    for sentence in words.explanation(made):
        print(sentence)
    how = "dense" if made.compression is None else f"with compression {made.compression}"
    print(f"Predicted: {made.tokens_per_second:,.2f} tokens/s, {how}.")
    for one in found:
        print_table(
            words.verification_title(one),
            ["", "predicted", "by rates between the steps", "measured"],
            words.verification_rows(one),
        )
