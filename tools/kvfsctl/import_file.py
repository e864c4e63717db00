"""`kvfsctl import`: a sequence from a safetensors file."""

from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, fail, print_json, progress_bar


def import_file(
    drive: StoreArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file, as of export.")],
    name: Annotated[
        str | None,
        typer.Option(help="What to call the sequence; by default as the file, without .safetensors."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of which model it is; by default what the file says.")
    ] = None,
    json_output: JsonOption = False,
):
    """Make a sequence from a safetensors file; a model that the drive does not know is added.

    The sequence is there and durable when this returns; if it fails nothing of it is.
    """
    from kvfs.errors import InvalidArgument
    from kvfs.kv_tree.transfer import import_sequence, model_of_file

    name = name or file.name.removesuffix(".safetensors")
    try:
        with file.open("rb") as source, open_store(drive) as store:
            known = model_of_file(store, source, model)
            with progress_bar(f"importing {name}") as progress:
                num_tokens = import_sequence(store, known, name, source, progress=progress).num_tokens
    except InvalidArgument as error:
        fail(f"{file}: {error}")
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    if json_output:
        print_json(
            "import", drive=str(drive), sequence=name, model=known.name, file=str(file), num_tokens=num_tokens
        )
        return
    print(f"imported {file} as {name} of {known.name} ({num_tokens:,} tokens)")
