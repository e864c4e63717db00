"""`kvfsctl mv`: rename a sequence."""

from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, SequenceArgument, StoreArgument, print_json


def mv(
    drive: StoreArgument,
    sequence: SequenceArgument,
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="Its new name, which no sequence has.")],
    json_output: JsonOption = False,
):
    """Rename a sequence. Whoever has it open keeps it."""
    with open_store(drive) as store:
        store.rename_sequence(sequence, new_name)
        store.flush()
    if json_output:
        print_json("mv", drive=str(drive), sequence=sequence, new_name=new_name)
        return
    print(f"renamed {sequence} to {new_name}")
