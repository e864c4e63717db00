"""`kvfsctl leftovers`: what processes that were killed have left."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, confirm, print_json


def leftovers(
    drive: Annotated[
        Path | None,
        typer.Argument(metavar="DRIVE|MOUNT", help="Also what was left on it; if left out, this machine only."),
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove it.")] = False,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="With --clean: also what may be in use on another host.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, remove nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: JsonOption = False,
):
    """Show what killed processes have left: temporary sequences, mounts without a server, names of sockets.

    --clean removes it, after asking on a terminal; elsewhere --yes is needed. Most of it goes by itself:
    sequences whose process is gone for certain when the drive is opened, sockets when another server starts.
    """
    from kvfs.administration.leftovers import machine_leftovers

    of_machine, sequences = machine_leftovers(), []
    if drive is None:
        _clean_machine(of_machine, clean, dry_run, yes)
    else:
        with open_store(drive) as store:
            sequences = store.leftovers()
            going = [each for each in sequences if each.is_certain or unknown]
            if clean and not dry_run and (going or of_machine):
                confirm(f"Remove {_what(going, of_machine)}?", yes, "removed")
                for each in going:
                    store.delete_sequence(each.name)
                store.flush()
        _clean_machine(of_machine, clean, dry_run, yes=True)
    if json_output:
        print_json(
            "leftovers",
            drive=None if drive is None else str(drive),
            is_cleaned=clean and not dry_run,
            dry_run=dry_run,
            sequences=[asdict(each) | {"is_going": each.is_certain or unknown} for each in sequences],
            machine=[asdict(each) for each in of_machine],
        )
        return
    _print(
        sequences, of_machine, "removed" if clean and not dry_run else "would remove" if clean else "", unknown
    )


def _clean_machine(of_machine: list, clean: bool, dry_run: bool, yes: bool) -> None:
    if clean and not dry_run and of_machine:
        confirm(f"Remove {_what([], of_machine)}?", yes, "removed")
        for each in of_machine:
            each.remove()


def _what(sequences: list, of_machine: list) -> str:
    counts = {"sequences": len(sequences)}
    for kind in ("mount", "socket"):
        counts[f"{kind}s"] = sum(each.kind == kind for each in of_machine)
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _print(sequences: list, of_machine: list, done: str, unknown: bool) -> None:
    if not sequences and not of_machine:
        print("nothing was left")
    for each in sequences:
        word = done if each.is_certain or unknown else ""
        state = "is gone" if each.is_certain else "cannot be looked for from here"
        line = f"sequence {each.name} of {each.num_tokens:,} tokens: {each.owner} {state}"
        print(f"{word} {line}".strip())
    for each in of_machine:
        where = f" of {each.of}" if each.of else ""
        print(f"{done} {each.kind} {each.path}{where}: its server is gone".strip())
