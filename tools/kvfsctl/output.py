"""What all verbs share: tables, JSON with a versioned schema, errors as one line."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DAMAGED = 3
JSON_SCHEMA = 1

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


def fail(message: str) -> None:
    """One line on stderr, then exit."""
    print(f"kvfsctl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def print_json(verb: str, **fields) -> None:
    print(json.dumps({"schema": JSON_SCHEMA, "verb": verb, **fields}, indent=2))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls of (done, of how many); nothing where nobody looks.

    The drive's log is silent meanwhile: who looks for damage reports it in words of his own.
    """
    console = Console(stderr=True)
    logging.disable(logging.ERROR)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        logging.disable(logging.NOTSET)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; the first `left` columns are left aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
