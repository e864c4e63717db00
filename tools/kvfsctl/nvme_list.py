"""`kvfsctl nvme list`: the NVMe namespaces and controllers of this machine, and which of them kvfs can take."""

from dataclasses import asdict, dataclass
from pathlib import Path

from kvfsctl.output import JsonOption, print_json, print_table


@dataclass(frozen=True)
class Row:
    """One namespace or controller. holds: what kvfs has on it; None where that could not be read."""

    location: str
    kind: str  # "namespace", or "controller" without a kernel driver
    facts: dict
    used_bytes: int | None
    holds: str | None
    in_use: tuple[str, ...]
    why_not: str | None


def list_devices(json_output: JsonOption = False):
    """List NVMe namespaces, and controllers that SPDK could take.

    What a namespace holds and how much of it is allocated is asked of the drive, where this user may.
    """
    show(rows(Path("/")), json_output)


def rows(root: Path) -> list[Row]:
    """Of the machine whose /sys, /proc and /dev are below a root."""
    from kvfs.nvme.linux_devices import namespaces, pcie_controllers

    found = []
    for one in namespaces(root):
        used_bytes, holds = _ask(one.location)
        used_bytes = one.used_bytes if used_bytes is None else used_bytes
        found.append(Row(one.location, "namespace", asdict(one), used_bytes, holds, one.in_use, one.why_not))
    for one in pcie_controllers(root):
        found.append(Row(one.location, "controller", asdict(one), None, None, one.in_use, one.why_not))
    return found


def _ask(location: str) -> tuple[int | None, str | None]:
    """(bytes allocated, what kvfs has on it); None where the drive cannot be asked."""
    from kvfs.errors import ERRNO
    from kvfs.nvme.device import open_device

    try:
        with open_device(location, read_only=True) as device:
            return int(device.namespace["nuse"]) * device.block_bytes, device.contents() or "nothing of kvfs"
    except tuple(ERRNO):
        return None, None


def show(found: list[Row], json_output: bool) -> None:
    if json_output:
        print_json("nvme list", devices=[_plain(row) for row in found])
    elif found:
        print_table(
            "NVMe devices",
            ["location", "model", "serial", "size", "block", "used", "holds", "kvfs can take it"],
            [_cells(row) for row in found],
            left=3,
        )
    else:
        print("no NVMe devices: kvfs has its drives in files here (kvfsctl format)")


def _plain(row: Row) -> dict:
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in row.facts.items()}
    return {
        "location": row.location,
        "kind": row.kind,
        **facts,
        "used_bytes": row.used_bytes,
        "holds": row.holds,
        "can_take": row.why_not is None,
        "why_not": row.why_not,
    }


def _cells(row: Row) -> list[str]:
    from kvfs.sizes import format_size

    take = "yes" if row.why_not is None else f"no: {row.why_not}"
    if row.kind == "controller":
        ids = f"PCI {row.facts['vendor']:04x}:{row.facts['device']:04x}, {row.facts['driver'] or 'no driver'}"
        return [row.location, ids, "", "", "", "", "", take]
    facts = row.facts
    return [
        row.location,
        facts["model"] + (" (zoned)" if facts["is_zoned"] else ""),
        facts["serial"],
        format_size(facts["size_bytes"]),
        str(facts["block_bytes"]),
        "not known" if row.used_bytes is None else format_size(row.used_bytes),
        "not known" if row.holds is None else row.holds,
        take,
    ]
