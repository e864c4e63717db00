"""`kvfsctl nvme discover`: which drives a target has."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvfsctl.output import JsonOption, print_json, print_table


def discover(
    target: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Or nvme+tcp://HOST:PORT with options, such as hostnqn=.")
    ],
    json_output: JsonOption = False,
):
    """Ask an NVMe/TCP target which subsystems this host may connect to."""
    from kvfs.nvme.discovery import discover as ask

    found = ask(target)
    if json_output:
        print_json("nvme discover", target=target, subsystems=[asdict(each) for each in found])
    elif found:
        rows = [
            [one.location or one.subnqn, one.kind, f"{one.transport} {one.host}:{one.port}"] for one in found
        ]
        print_table(f"subsystems of {target}", ["location", "kind", "at"], rows, left=3)
    else:
        print(f"{target}: no subsystem for this host")
