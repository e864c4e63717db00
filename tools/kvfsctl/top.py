"""`kvfsctl top`: a mounted drive at work, as it changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, fail, print_json
from kvfsctl.repeating import CountArgument, IntervalArgument, repeat
from kvfsctl.stats import RATES, rate_text

SHOWN_OPERATIONS = 12


def top(
    drive: StoreArgument,
    interval: IntervalArgument = 1.0,
    count: CountArgument = None,
    json_output: JsonOption = False,
):
    """Show what a mounted drive does: rates, latencies by layer, drives of a set.

    On a terminal the picture is drawn over; elsewhere one follows the other. With --json each look is a line of
    JSON.
    """
    if not drive.is_dir():
        fail(f"{drive} is not mounted, so nothing happens on it: give the folder of a mount")
    with open_store(drive) as store, _screen() as draw:
        before = store.telemetry()

        def show() -> None:
            nonlocal before
            now = store.telemetry()
            if json_output:
                print_json("top", in_a_line=True, drive=str(drive), **_facts(before, now))
            else:
                draw(_picture(before, now))
            before = now

        repeat(show, interval, count, at_once=False)


@contextmanager
def _screen() -> Iterator[Callable]:
    """What draws a picture: on a terminal over the one before."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        yield console.print
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda picture: live.update(picture, refresh=True)


def _facts(before: dict, now: dict) -> dict:
    from kvfs.telemetry.rates import rates

    return {
        "time_s": now["time_s"],
        "rates": rates(before, now),
        "work": _work(before, now),
        "drives": _of_drives(now),
    }


def _picture(before: dict, now: dict):
    from rich.console import Group

    facts = _facts(before, now)
    return Group(_rates(now["store"], facts["rates"]), _layers(facts["work"]), _drives(facts["drives"]))


def _table(title: str, *columns: str, left: int = 1):
    from rich.table import Table

    table = Table(title=title, title_justify="left", expand=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def _rates(store: str, found: dict):
    table = _table(store, *RATES)
    table.add_row(*(rate_text(name, value) for name, value in found.items()))
    return table


def _work(before: dict, now: dict) -> list[dict]:
    """What took the most time since the last look, first."""
    from kvfs.telemetry.rates import quantile_ns

    known = {(row["layer"], row["name"], of): row for of, row in _rows(before)}
    found = []
    for of, row in _rows(now):
        then = known.get((row["layer"], row["name"], of), {"counts": [0] * len(row["counts"]), "sum_ns": 0})
        counts = [b - a for a, b in zip(then["counts"], row["counts"], strict=True)]
        if sum(counts):
            found.append(
                {
                    "layer": row["layer"],
                    "name": row["name"],
                    "drive": of,
                    "count": sum(counts),
                    "sum_ns": row["sum_ns"] - then["sum_ns"],
                    "p50_ns": round(quantile_ns(counts, 0.5)),
                    "p99_ns": round(quantile_ns(counts, 0.99)),
                }
            )
    return sorted(found, key=lambda row: -row["sum_ns"])


def _layers(work: list[dict]):
    table = _table("what took time", "layer", "work", "per look", "mean", "p50", "p99", left=2)
    for row in work[:SHOWN_OPERATIONS]:
        times = (row["sum_ns"] / row["count"], row["p50_ns"], row["p99_ns"])
        texts = (f"{ns / 1e3:,.0f} us" for ns in times)
        table.add_row(row["layer"], row["name"].replace("_", " "), f"{row['count']:,}", *texts)
    return table


def _rows(telemetry: dict) -> list[tuple[str | None, dict]]:
    """(drive, latencies of one kind of work); of the store itself the drive is None."""
    own = [(None, row) for row in telemetry["latencies"]]
    return own + [(drive["drive"], row) for drive in telemetry["drives"] for row in drive.get("latencies", [])]


def _of_drives(now: dict) -> list[dict]:
    rows = []
    for drive in now["drives"]:
        row = {"drive": drive["drive"], "state": drive["state"]}
        row |= dict.fromkeys(("free_bytes", "write_amplification", "life_used_percent"))
        if "counters" in drive:
            counters = drive["counters"]
            row["free_bytes"] = counters["space"]["free_bytes"]
            row["write_amplification"] = counters["waf"]["total"]
            row["life_used_percent"] = counters["flash"]["percentage_used"]
        rows.append(row)
    return rows


def _drives(rows: list[dict]):
    from kvfs.sizes import format_size

    table = _table("drives", "drive", "state", "free", "write amplification", "life used", left=2)
    for row in rows:
        free, waf, life = row["free_bytes"], row["write_amplification"], row["life_used_percent"]
        table.add_row(
            row["drive"],
            row["state"],
            "–" if free is None else format_size(free),
            "–" if waf is None else f"{waf:.2f}",
            "–" if life is None else f"{life} %",
        )
    return table
