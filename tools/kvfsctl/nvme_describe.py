"""`kvfsctl nvme identify` and `smart-log`: what a drive says of itself, in words and units."""

from typing import Annotated

import typer

from kvfsctl.output import JsonOption, print_json, print_table

LocationArgument = Annotated[
    str,
    typer.Argument(
        metavar="LOCATION",
        help="inproc:FILE or a drive's file, spdk:ADDRESS, nvme+tcp://..., /dev/ng0n1, /dev/nvme0n1.",
    ),
]


def identify(location: LocationArgument, json_output: JsonOption = False):
    """Show Identify Controller and Identify Namespace: names as in the specification, and what they mean."""
    from kvfs.nvme.device import open_device
    from kvfs.nvme.meaning import controller_lines, namespace_lines, plain

    with open_device(location, read_only=True) as device:
        controller, namespace, nsid = device.controller, device.namespace, device.nsid
    if json_output:
        print_json(
            "nvme identify",
            location=location,
            nsid=nsid,
            controller=plain(controller),
            namespace=plain(namespace),
        )
        return
    _print(f"controller of {location}", controller_lines(controller))
    _print(f"namespace {nsid}", namespace_lines(namespace))


def smart_log(location: LocationArgument, json_output: JsonOption = False):
    """Show the SMART / Health log of the controller: every field with its unit."""
    from kvfs.nvme.device import open_device
    from kvfs.nvme.meaning import plain, smart_lines

    with open_device(location, read_only=True) as device:
        smart = device.smart()
    if json_output:
        print_json("nvme smart-log", location=location, smart=plain(smart))
    else:
        _print(f"health of {location}", smart_lines(smart))


def _print(title: str, lines: list) -> None:
    rows = [[line.field, line.value, line.meaning] for line in lines]
    print_table(title, ["field", "value", "meaning"], rows, left=3)
