"""`kvfsctl pin` and `kvfsctl unpin`: sequences that are never evicted."""

from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json

NamesArgument = Annotated[list[str], typer.Argument(metavar="SEQUENCE...", help="Names, as ls shows them.")]


def pin(drive: StoreArgument, sequences: NamesArgument, json_output: JsonOption = False):
    """Keep sequences whatever caps say, until they are unpinned or deleted."""
    _set(drive, sequences, True, json_output)


def unpin(drive: StoreArgument, sequences: NamesArgument, json_output: JsonOption = False):
    """Let sequences be evicted again."""
    _set(drive, sequences, False, json_output)


def _set(drive, names, is_pinned, json_output) -> None:
    from kvfs.sequence_attributes import PINNED

    names = list(dict.fromkeys(names))
    with open_store(drive) as store:
        found = [store.sequence(name) for name in names]  # all, before any is changed
        for sequence in found:
            sequence.set_attribute(PINNED, b"1" if is_pinned else b"0")
        store.flush()
    if json_output:
        print_json("pin" if is_pinned else "unpin", drive=str(drive), sequences=names)
        return
    for name in names:
        print(f"{'pinned' if is_pinned else 'unpinned'} {name}")
