"""`kvfsctl stats`: counters of all layers."""

from kvfsctl.drive import print_drives
from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json, print_table

# counters whose unit is not in their name
_UNITS = {
    "total": "pages of flash per page that the host wrote",
    "lifetime": "at least, since the drive was made",
}


def stats(drive: StoreArgument, json_output: JsonOption = False):
    """Show write amplification by cause, and the counters of link, flash and attention unit.

    The split of write amplification is since the drive was opened; its lifetime total is a lower bound.
    Counters start at zero when a process opens the drive: on a drive that no one has open they show what
    opening it took. An engine reads its own through Store.counters().
    """
    from kvfs.sizes import format_size

    with open_store(drive) as store:
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
