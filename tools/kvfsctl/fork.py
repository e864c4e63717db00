"""`kvfsctl fork`: another sequence with the same tokens, sharing their blocks."""

from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, SequenceArgument, StoreArgument, print_json


def fork(
    drive: StoreArgument,
    sequence: SequenceArgument,
    child: Annotated[str, typer.Argument(metavar="NEW", help="The fork's name, which no sequence has.")],
    json_output: JsonOption = False,
):
    """Fork a sequence: the new one has its tokens and attributes, and no whole token group is copied.

    How long to keep it (user.kvfs.pinned, user.kvfs.ttl) is not taken over.
    """
    with open_store(drive) as store:
        forked = store.sequence(sequence).fork(child)
        forked.flush()
        num_tokens = forked.num_tokens
    if json_output:
        print_json("fork", drive=str(drive), sequence=sequence, child=child, num_tokens=num_tokens)
        return
    print(f"forked {sequence} as {child} ({num_tokens:,} tokens)")
