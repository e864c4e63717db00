"""`kvfsctl check`: is everything on the drive whole?"""

import sys
from typing import Annotated

import typer

from kvfsctl.opening import open_inspection
from kvfsctl.output import EXIT_DAMAGED, DriveArgument, JsonOption, print_json, progress_bar


def check(
    drive: DriveArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is safe to mend, and say each thing that was done.")
    ] = False,
    json_output: JsonOption = False,
):
    """Check everything against everything else: the drive's map against its flash, the catalogue, whose each
    block is, and every page against its checksum.

    Changes nothing without --repair. With it: blocks that nothing names are given back, references counted
    anew, pages that only parity could read written anew, and a sequence with lost blocks keeps its tokens up
    to the first page that is lost. Each is said in one line, and what then remains is listed.

    Exit code 3 when something is damaged (and stays so); each problem is one line.
    """
    from kvfs.repair import repair as mend

    with open_inspection(drive, read_only=not repair) as inspection:
        report, done = _examine(inspection), []
        found = report
        if repair and report.problems:
            done = mend(inspection, report)
            report = _examine(inspection) if done else report
        num_sequences = len(inspection.owners.sequences) if inspection.owners else 0
    if json_output:
        print_json(
            "check",
            drive=str(drive),
            num_sequences=num_sequences,
            problems=[vars(problem) for problem in found.problems],
            repaired=done,
            remaining=[problem.text for problem in report.problems] if done else None,
        )
    else:
        for problem in found.problems:
            print(problem.text)
        for line in done:
            print(f"repaired: {line}")
        for problem in report.problems if done else ():
            print(f"remains: {problem.text}")
        if not report.is_damaged:
            print(f"{drive}: no errors; {num_sequences} sequences, every page matches its checksum")
    if report.is_damaged:
        sys.exit(EXIT_DAMAGED)


def _examine(inspection):
    with progress_bar("checking") as progress:
        return inspection.check(progress)
