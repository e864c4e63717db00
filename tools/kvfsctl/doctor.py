"""`kvfsctl doctor`: what this machine has of what kvfs can use, and what to do about the rest."""

from collections.abc import Iterator
from dataclasses import asdict

import typer

from kvfsctl import doctor_hardware, doctor_software
from kvfsctl.doctor_check import MISSING, OPTIONAL, Finding, Machine
from kvfsctl.output import EXIT_FAILED, JsonOption, print_json, print_table

CHECKS = [*doctor_software.CHECKS, *doctor_hardware.CHECKS]


def doctor(json_output: JsonOption = False):
    """Look at Python, SPDK, FUSE, io_uring, CPU, memory, NVMe devices and limits; say what would help.

    What is missing keeps kvfs from working, what is optional only parts of it. Nothing is changed. Exit code 1
    where something is missing.
    """
    code = show(list(examine(Machine())), json_output)
    if code:
        raise typer.Exit(code)


def examine(machine: Machine, checks=CHECKS) -> Iterator[Finding]:
    for check in checks:
        try:
            yield from check(machine)
        except ImportError as error:  # native_code says that kvfs does not load; this must not hide the rest
            name = check.__name__.replace("_", " ")
            yield Finding(name, OPTIONAL, f"not looked at: {error}", "make kvfs load first")


def show(findings: list[Finding], json_output: bool) -> int:
    """Print them; the exit code."""
    num_missing = sum(finding.mark == MISSING for finding in findings)
    if json_output:
        print_json("doctor", num_missing=num_missing, findings=[asdict(finding) for finding in findings])
    else:
        rows = [[one.name, one.mark, one.found, one.todo] for one in findings]
        print_table("this machine", ["", "", "found", "what to do"], rows, left=4)
        if num_missing:
            print(f"kvfs will not work here: {num_missing} missing")
    return EXIT_FAILED if num_missing else 0
