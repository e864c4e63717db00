"""`kvfsctl export`: a sequence as a safetensors file."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, SequenceArgument, StoreArgument, fail, print_json, progress_bar


def export(
    drive: StoreArgument,
    sequence: SequenceArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_output: JsonOption = False,
):
    """Write a sequence to a safetensors file: keys, values, token ids, and what its model is.

    The file appears under its name once it is whole.
    """
    from kvfs.kv_tree.transfer import export_sequence
    from kvfs.sizes import format_size

    if file.exists() and not force:
        fail(f"{file} exists: --force replaces it")
    try:
        with (
            open_store(drive) as store,
            tempfile.NamedTemporaryFile(
                dir=file.absolute().parent, prefix=f".{file.name}.", delete=False
            ) as part,
        ):
            try:
                with progress_bar(f"exporting {sequence}") as progress:
                    num_bytes = export_sequence(store.sequence(sequence), part, progress)
                part.flush()
                os.fsync(part.fileno())
                os.chmod(part.name, 0o666 & ~_umask())
                os.replace(part.name, file)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    if json_output:
        print_json("export", drive=str(drive), sequence=sequence, file=str(file), num_bytes=num_bytes)
        return
    print(f"exported {sequence} to {file} ({format_size(num_bytes)})")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
