"""`kvfsctl stats`: counters of all layers, or what happens from one look to the next."""

from kvfsctl.core_speed import core_line
from kvfsctl.drive import print_drives
from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table
from kvfsctl.repeating import CountArgument, IntervalArgument, repeat

# counters whose unit is not in their name
_UNITS = {
    "total": "pages of flash per page that the host wrote",
    "lifetime": "at least, since the drive was made",
}


# of kvfs.telemetry.rates, in its order: a column each
RATES = (
    "attends/s",
    "p50",
    "p99",
    "flash read/s",
    "flash written/s",
    "host written/s",
    "cache",
    "workers",
    "queue",
)
HEADER_EVERY = 20  # lines


def stats(
    drive: StoreArgument,
    interval: IntervalArgument = None,
    count: CountArgument = None,
    json_output: JsonOption = False,
):
    """Show write amplification by cause, and the counters of link, flash and attention unit.

    The split of write amplification is since the drive was opened; its lifetime total is a lower bound.
    Counters start at zero when a process opens the drive: on a drive that no one has open they show what
    opening it took. An engine reads its own through Store.counters().

    With INTERVAL it shows what happened since the last look instead, a line each.
    """
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        if interval is not None:
            _show_rates(store, drive, interval, count, json_output)
            return
        counters = store.counters()
    if json_output:
        print_json("stats", drive=str(drive), counters=counters)
        return
    drives = counters.pop("drives", None)
    if drives is not None:
        print_drives(drive, drives)
    for layer, values in counters.items():
        rows = []
        for name, value in values.items():
            if name in ("version", "waf") or isinstance(value, list):
                continue
            if value is None:
                text = "–"
            elif "bytes" in name:
                text = format_size(value)
            elif isinstance(value, float):
                text = f"{value:.3f}"
            else:
                text = f"{value:,}"
            rows.append([name.replace("_", " "), text, _UNITS.get(name, "")])
        print_table(layer, ["counter", "value", ""], rows)
    if (line := core_line(counters.get("attention", {}))) is not None:
        print(line)
    print_tenants(counters.get("prefix", {}), counters.get("objects", {}))


def _show_rates(store, drive, interval: float, count: int | None, json_output: bool) -> None:
    """As vmstat does: a line is of the interval that ends with it."""
    from kvfs.telemetry.rates import rates

    before, lines = store.telemetry(), 0

    def show() -> None:
        nonlocal before, lines
        now = store.telemetry()
        found = rates(before, now)
        if json_output:
            print_json("stats", in_a_line=True, drive=str(drive), time_s=now["time_s"], **found)
        else:
            if lines % HEADER_EVERY == 0:
                print(" ".join(f"{column:>15}" for column in RATES))
            print(" ".join(f"{rate_text(*rate):>15}" for rate in found.items()))
        before, lines = now, lines + 1

    repeat(show, interval, count, at_once=False)


def rate_text(name: str, value: float | None) -> str:
    """One of kvfs.telemetry.rates, for people."""
    from kvfs.sizes import format_size

    if value is None:
        return "–"
    if "bytes" in name:
        return format_size(round(value))
    if name.endswith("_us"):
        return f"{value:,.0f} us"
    return f"{100 * value:.0f} %" if name.endswith("_ratio") else f"{value:,.0f}"


def print_tenants(prefix: dict, objects: dict) -> None:
    """Look-ups by tenant and model, where there were any."""
    _print_lookups("prefix look-ups", ["tenant", "model"], prefix.get("tenants", []))
    _print_lookups("requests for objects", ["cache", "tenant", "model"], objects.get("tenants", []))


def _print_lookups(title: str, labels: list[str], rows: list[dict]) -> None:
    """Look-ups, by what names a row."""
    if not rows:
        return
    names = ("lookups", "hits", "misses", "tokens_wanted", "tokens_found")
    reasons = [name for name in rows[0] if name.startswith("miss_")]
    table = []
    for row in rows:
        why = ", ".join(f"{name.removeprefix('miss_')} {row[name]:,}" for name in reasons if row[name])
        table.append(
            [*(row[label] for label in labels), why.replace("_", " "), *(f"{row[name]:,}" for name in names)]
        )
    columns = [*labels, "found less because", *(name.replace("_", " ") for name in names)]
    print_table(title, columns, table, left=len(labels) + 1)
