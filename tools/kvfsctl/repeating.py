"""`VERB ... [INTERVAL [COUNT]]`, as iostat(1) has it: the one loop of all verbs that look more than once."""

import math
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

SHORTEST, LONGEST = 0.1, 86400.0  # seconds


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not SHORTEST <= number <= LONGEST:  # nan neither
        raise typer.BadParameter(f"{text!r} is no number of seconds from {SHORTEST:g} to {LONGEST:g}")
    return number


IntervalArgument = Annotated[
    float | None,
    typer.Argument(metavar="INTERVAL", parser=_seconds, help="Show it again every so many seconds."),
]
CountArgument = Annotated[
    int | None, typer.Argument(metavar="COUNT", min=1, help="End after so many times; with Ctrl-C by default.")
]


def repeat(
    show: Callable[[], None], interval: float | None, count: int | None, *, at_once: bool = True
) -> None:
    """Call `show` once; with an interval again and again, on time whatever a call takes.

    at_once: the first time now, and not after an interval: what shows changes has none yet
    """
    shown, start = 0, time.monotonic() - (interval if at_once and interval else 0)
    while count is None or shown < count:
        if interval is not None:
            time.sleep(max(0.0, start + (shown + 1) * interval - time.monotonic()))
        show()
        sys.stdout.flush()
        shown += 1
        if interval is None:
            return
