"""`kvfsctl events`: what has happened since a drive was mounted."""

from datetime import datetime
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json
from kvfsctl.repeating import repeat

LOOK_SECONDS = 1.0


def events(
    drive: StoreArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    json_output: JsonOption = False,
):
    """Show the event log: warnings of all layers, drives lost and found, clients, with request identifiers.

    The newest thousand events of the process that has the drive open; of a drive that is not mounted these are
    what opening it met. With --json each event is a line of JSON.
    """
    after = 0
    with open_store(drive) as store:

        def show() -> None:
            nonlocal after
            for event in store.events(after):
                after = event["number"]
                if json_output:
                    print_json("events", in_a_line=True, drive=str(drive), **event)
                else:
                    print(_line(event))

        repeat(show, LOOK_SECONDS if follow else None, None)


def _line(event: dict) -> str:
    when = datetime.fromtimestamp(event["time_s"]).isoformat(sep=" ", timespec="milliseconds")
    request = f"  [{event['request']}]" if event["request"] else ""
    return f"{when}  {event['level']:7}  {event['text']}{request}"
