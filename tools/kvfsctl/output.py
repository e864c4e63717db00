"""What all verbs share: tables, JSON with a versioned schema, errors as one line."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DAMAGED = 3
EXIT_DEGRADED = 4
EXIT_INTERRUPTED = 130
EXIT_CODES = {  # the one table: --help and the man pages print it
    EXIT_DONE: ("done", "Done, and nothing is wrong."),
    EXIT_FAILED: ("failed", "Failed. One line on standard error says why, and nothing is half done."),
    EXIT_USAGE: ("wrong usage", "An option, an argument or the configuration is wrong; nothing was done."),
    EXIT_DAMAGED: ("the drive has errors", "Done, and data are lost or contradict themselves."),
    EXIT_DEGRADED: (
        "degraded",
        "Done, and something is not as it should be: a drive of a set is missing, spare flash runs out,"
        " the server of a mount is gone.",
    ),
    EXIT_INTERRUPTED: ("interrupted", "Ended by Ctrl-C."),
}
UNFOLDED = 10_000  # columns, of a table that nobody's terminal folds
JSON_SCHEMA = 1  # raised when a field of any verb's JSON goes, or changes its meaning

DriveArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DRIVE", help="The drive: a file, /dev/ng0n1, spdk:... or nvme+tcp://... (see format)."
    ),
]
StoreArgument = Annotated[
    Path,
    typer.Argument(metavar="DRIVE|MOUNT", help="The drive, or the folder where it is mounted."),
]
SequenceArgument = Annotated[str, typer.Argument(metavar="SEQUENCE", help="A name, as ls shows it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with plain integers instead of a table.")]


def fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """One line on stderr, then exit."""
    print(f"kvfsctl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def confirm(question: str, yes: bool, done: str) -> None:
    """Ask before what cannot be undone, unless --yes was given. done: "nothing is ... without --yes".

    Asks on a terminal only: a script that forgot --yes ends, and does not wait for ever.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"nothing is {done} without --yes when nobody can be asked")
    typer.confirm(question, abort=True)


def print_json(verb: str, *, in_a_line: bool = False, **fields) -> None:
    """in_a_line: for what is shown again and again: JSON Lines."""
    print(json.dumps({"schema": JSON_SCHEMA, "verb": verb, **fields}, indent=None if in_a_line else 2))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls of (done, of how many); nothing where nobody looks.

    The drive's log is silent meanwhile: who looks for damage reports it in words of his own.
    """
    from rich.console import Console  # only now: rich takes as long to load as many a verb to run
    from rich.progress import Progress

    console = Console(stderr=True)
    logging.disable(logging.ERROR)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        logging.disable(logging.NOTSET)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; the first `left` columns are left aligned, the others right.

    On a terminal cells are folded to its width; in a file or a pipe every row is one line.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        longest_word = max(map(len, column.split()), default=0)
        justify = "left" if number < left else "right"
        table.add_column(column, justify=justify, overflow="fold", min_width=longest_word)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNFOLDED)
    console.print(table)
