"""`kvfsctl check`: is everything on the drive whole?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import drives_of, mount_folder, open_inspection, open_store
from kvfsctl.output import EXIT_DAMAGED, JsonOption, StoreArgument, fail, print_json, progress_bar


def check(
    drive: StoreArgument,
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

    A mounted drive stays in use while it is checked, and is unmounted to be repaired. Exit code 3 when
    something is damaged (and stays so); each problem is one line.
    """
    folder = mount_folder(drive)
    if folder is not None:
        if repair:
            fail(f"{drive} is in use: kvfsctl umount {folder}, then repair it")
        _check_mounted(drive, folder, json_output)
        return
    drives = drives_of(drive)
    if len(drives) > 1:
        _check_set(drive, drives, repair, json_output)
        return
    found, done, report, num_sequences = check_and_mend(drives[0], repair)
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
        print_report(drive, found, done, report, num_sequences)
    if report.is_damaged:
        sys.exit(EXIT_DAMAGED)


def _check_mounted(place: Path, folder: Path, json_output: bool) -> None:
    """As _check_set and check_and_mend, through the process that has the drives open."""
    import kvfs
    from kvfs.administration.remote_care import remote_cares

    results = []
    with kvfs.open(folder) as store:
        num_sequences = len(store.catalogue_rows())
        for drive, care in remote_cares(store).items():
            results.append({"drive": drive, "problems": _problems_of(care)})
    found = [problem for result in results for problem in result["problems"]]
    if json_output:
        fields = {"problems": found} if len(results) == 1 else {"drives": results}
        print_json(
            "check", drive=str(place), num_sequences=num_sequences, **fields, repaired=[], remaining=None
        )
    else:
        for problem in found:
            print(problem["text"])
    if any(problem["is_damage"] for problem in found):
        sys.exit(EXIT_DAMAGED)
    if not json_output:
        print(_all_is_well(place, num_sequences))


def _problems_of(care) -> list[dict]:
    from kvfs.administration.scrubbing import read_all

    with progress_bar("checking") as progress:
        found = care.check_rows()
        _, lost = read_all(care, progress)
    return found + [
        {
            "kind": "lost",
            "text": f"LBA {block['lba']} is lost: {block['text']}",
            "is_damage": block["area"] != "nothing",
        }
        for block in lost
    ]


def _all_is_well(place, num_sequences: int) -> str:
    return f"{place}: no errors; {num_sequences} sequences, every page matches its checksum"


def _check_set(place: Path, drives: list[Path], repair: bool, json_output: bool) -> None:
    """Each drive by itself; then that they belong together, which opening them tells."""
    damaged, results = False, []
    for drive in drives:
        found, done, report, num_parts = check_and_mend(drive, repair)
        damaged = damaged or report.is_damaged
        results.append(
            {
                "drive": str(drive),
                "num_parts": num_parts,
                "problems": [vars(problem) for problem in found.problems],
                "repaired": done,
                "remaining": [problem.text for problem in report.problems] if done else None,
            }
        )
        if not json_output:
            print_report(drive, found, done, report, num_parts)
    with open_store(place) as store:  # parts that a repair has made shorter are brought to one length here
        num_sequences = len(store.catalogue_rows())
    if json_output:
        print_json("check", drive=str(place), num_sequences=num_sequences, drives=results)
    elif not damaged:
        print(f"{place}: {len(drives)} drives belong together; {num_sequences} sequences")
    if damaged:
        sys.exit(EXIT_DAMAGED)


def check_and_mend(drive: Path, repair: bool):
    """(what was found, lines on what was mended, what then remains, number of sequences)."""
    from kvfs.repair import repair as mend

    with open_inspection(drive, read_only=not repair) as inspection:
        report, done = _examine(inspection), []
        found = report
        if repair and report.problems:
            done = mend(inspection, report)
            report = _examine(inspection) if done else report
        num_sequences = len(inspection.owners.sequences) if inspection.owners else 0
    return found, done, report, num_sequences


def print_report(drive: Path, found, done: list[str], report, num_sequences: int) -> None:
    for problem in found.problems:
        print(problem.text)
    for line in done:
        print(f"repaired: {line}")
    for problem in report.problems if done else ():
        print(f"remains: {problem.text}")
    if not report.is_damaged:
        print(_all_is_well(drive, num_sequences))


def _examine(inspection):
    with progress_bar("checking") as progress:
        return inspection.check(progress)
