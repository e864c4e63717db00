"""Options of verbs that list sequences by the page, and going through the pages."""

from collections.abc import Iterator
from typing import Annotated

import typer

PAGE_ROWS = 10_000  # that are in memory at once

LimitOption = Annotated[
    int | None, typer.Option(min=1, max=100_000, help="So many sequences at most; all, if left out.")
]
AfterOption = Annotated[
    str, typer.Option(metavar="NAME", help="Only those behind this name: where a page before has ended.")
]


def pages(store, after: str, limit: int | None, model: str | None = None) -> Iterator[list]:
    """Rows of the catalogue in order of names, by the page."""
    while True:
        size = PAGE_ROWS if limit is None else min(limit, PAGE_ROWS)
        rows = list(store.sequence_rows(after, size, model=model))
        if rows:
            yield rows
        if limit is not None:
            limit -= len(rows)
        if len(rows) < size or limit == 0:
            return
        after = rows[-1].name


def say_more(num_rows: int, limit: int | None, last: str) -> None:
    """That there may be more behind a page."""
    if num_rows == limit:
        typer.echo(f"there may be more: --after {last}", err=True)
