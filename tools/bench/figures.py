"""The schema of every benchmark's figures, and how people see them."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCHEMA = 1


@dataclass
class Figure:
    """One measured value. ratio: value over rival's; limit: what physics allows, in `unit`."""

    name: str
    value: float
    unit: str
    rival: str | None = None
    rival_value: float | None = None
    ratio: float | None = None
    limit: float | None = None
    goal: float | None = None
    goal_is_maximum: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.goal_is_maximum else self.value >= self.goal

    def as_dict(self) -> dict:
        fields = asdict(self)
        del fields["goal_is_maximum"]
        return {**fields, "met": self.met}


def machine() -> dict:
    """The machine that the figures were measured on."""
    model = None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else None
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def report(bench: str, figures: Iterable[Figure]) -> dict:
    return {
        "schema": SCHEMA,
        "bench": bench,
        "machine": machine(),
        "figures": [figure.as_dict() for figure in figures],
    }


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def print_report(result: dict) -> None:
    """A table of a report's figures on stdout."""
    facts = result["machine"]
    memory = facts["memory_bytes"] / 2**30
    title = f"{result['bench']}: {facts['cpu']}, {facts['num_cpus']} CPUs, {memory:.0f} GiB"
    table = Table(title=title, title_justify="left")
    for column in ("figure", "value", "unit", "rival", "rival's", "ratio", "limit", "goal", "met"):
        table.add_column(column, justify="left" if column in ("figure", "unit", "rival") else "right")
    for figure in result["figures"]:
        met = {True: "yes", False: "no", None: ""}[figure["met"]]
        table.add_row(
            figure["name"],
            _number(figure["value"]),
            figure["unit"],
            figure["rival"] or "",
            *(_number(figure[name]) for name in ("rival_value", "ratio", "limit", "goal")),
            met,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or pipe has no width of its own: fold nothing
    console.print(table)
