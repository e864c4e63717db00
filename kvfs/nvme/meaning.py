"""Identify and SMART in words: for each field its value with its unit, and what it means."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvfs.sizes import format_size
from spdk_glue import capability_bits as bits
from spdk_glue.identify import CAPABILITIES_SIGNATURE, FLBAS_EXTENDED

DATA_UNIT_BYTES = 512_000
KELVIN_ZERO_CELSIUS = 273
MEMORY_PAGE = 4096  # in which MDTS counts, for a controller whose smallest page is that
HOST_MEMORY_UNIT = 4096
KEEP_ALIVE_UNIT_MS = 100
FORMAT_INDEX = 0xF


@dataclass(frozen=True)
class Line:
    """A field by the specification's name, its value for people, and what it is."""

    field: str
    value: str
    meaning: str


Show = Callable[[int], str | None]  # None leaves the field out: it says nothing on this drive


def text(value: str) -> str:
    return value or "not told"


def number(value: int) -> str:
    return f"{value:,}"


def _hex(value: int) -> str:
    return f"{value:#x}"


def _given(show: Show) -> Show:
    """Leave out a zero, which stands for "not told" or "none"."""
    return lambda value: show(value) if value else None


def _listed(table: dict[int, str]) -> Show:
    return lambda value: ", ".join(bits.words_of(value, table)) or "none"


def _less_one(unit: str) -> Show:
    """Of a count that is told less one."""
    return lambda value: f"{value + 1:,} {unit if value else unit.removesuffix('s')}"


def celsius(kelvin: int) -> str | None:
    return f"{kelvin - KELVIN_ZERO_CELSIUS} °C" if kelvin else None


def _version(value: int) -> str:
    return f"{value >> 16}.{value >> 8 & 0xFF}" + (f".{value & 0xFF}" if value & 0xFF else "")


def _entry_sizes(value: int) -> str:
    least, most = 1 << (value & 0xF), 1 << (value >> 4)
    return f"{least} bytes" if least == most else f"{least} to {most} bytes"


def _mdts(value: int) -> str:
    return format_size(MEMORY_PAGE << value) if value else "no limit"


def _lockable(value: int) -> str:
    return "present, on Flush" if value & 1 else "none: what is written is durable"


CONTROLLER: dict[str, tuple[str, Show]] = {
    "vid": ("PCI vendor", _given(_hex)),
    "ssvid": ("PCI subsystem vendor", _given(_hex)),
    "sn": ("serial number", text),
    "mn": ("model", text),
    "fr": ("firmware", text),
    "subnqn": ("NVM subsystem", text),
    "ver": ("version of the NVMe specification", _version),
    "cntrltype": ("type of controller", _given(lambda value: bits.CONTROLLER_TYPES.get(value, str(value)))),
    "cntlid": ("controller identifier", str),
    "cmic": ("paths to the namespaces", _given(_listed(bits.CMIC))),
    "mdts": ("largest transfer of one command", _mdts),
    "maxcmd": ("commands outstanding on one queue", _given(number)),
    "rab": ("commands taken from a queue at once", _given(lambda value: number(1 << value))),
    "nn": ("largest namespace identifier", number),
    "mnan": ("namespaces at most", _given(number)),
    "tnvmcap": ("flash in all", _given(format_size)),
    "unvmcap": ("flash in no namespace", _given(format_size)),
    "oacs": ("optional admin commands", _listed(bits.OACS)),
    "oncs": ("optional I/O commands", _listed(bits.ONCS)),
    "fuses": ("fused commands", _given(_listed(bits.FUSES))),
    "ctratt": ("attributes", _given(_listed(bits.CTRATT))),
    "vwc": ("volatile write cache", _lockable),
    "awun": ("written atomically", _less_one("blocks")),
    "awupf": ("written atomically through a power failure", _less_one("blocks")),
    "fna": ("format and erase", _given(_listed(bits.FNA))),
    "sanicap": ("sanitize", _given(_listed(bits.SANICAP))),
    "nwpc": ("write protection of namespaces", _given(_listed(bits.NWPC))),
    "lpa": ("log pages", _given(_listed(bits.LPA))),
    "elpe": ("error log", _less_one("entries at once")),
    "npss": ("power states", lambda value: number(value + 1)),
    "wctemp": ("temperature that warns", celsius),
    "cctemp": ("temperature that is critical", celsius),
    "rtd3r": ("wakes from runtime D3 in", _given(lambda value: f"{value:,} us")),
    "hmpre": ("host memory wanted", _given(lambda value: format_size(value * HOST_MEMORY_UNIT))),
    "kas": ("granularity of Keep Alive", _given(lambda value: f"{value * KEEP_ALIVE_UNIT_MS:,} ms")),
    "sgls": ("scatter-gather lists", _given(lambda value: "yes" if value & 3 else None)),
    "sqes": ("submission queue entry", _entry_sizes),
    "cqes": ("completion queue entry", _entry_sizes),
}


def controller_lines(record: np.void) -> list[Line]:
    """Of IDENTIFY_CONTROLLER, and of what a kvfs drive adds to it."""
    return [*_lines(record, CONTROLLER), *_attention_lines(record["attention"])]


def _attention_lines(attention: np.void) -> Iterator[Line]:
    if attention["signature"] != CAPABILITIES_SIGNATURE:
        return
    sizes = f"{attention['head_dim_min']} to {attention['head_dim_max']}"
    yield Line("kvfs", f"version {attention['version']}", "computes attention over what it holds")
    yield Line("kvfs", plain(attention["worker"]), f"its worker, {attention['num_workers']} at once")
    yield Line("kvfs", sizes, f"head_dim, with up to {attention['max_group_size']} query heads per KV head")
    yield Line("kvfs", number(int(attention["max_items"])), "sequences in one command at most")
    yield Line("kvfs", number(int(attention["num_placement_ids"])), "streams that placement hints tell apart")


def namespace_lines(record: np.void) -> list[Line]:
    """Of IDENTIFY_NAMESPACE."""
    index = int(record["flbas"]) & FORMAT_INDEX
    block_bytes = block_bytes_of(record)

    def blocks(value: int) -> str:
        return f"{value:,} blocks, {format_size(value * block_bytes)}"

    def deallocated(value: int) -> str:
        return bits.DLFEAT_READ.get(value & 7, "not told")

    preferred = {
        "npwg": ("writes suit best in multiples of", _less_one("blocks")),
        "npwa": ("and begin at multiples of", _less_one("blocks")),
        "npdg": ("deallocations suit best in multiples of", _less_one("blocks")),
        "npda": ("and begin at multiples of", _less_one("blocks")),
        "nows": ("optimal size of a write", _less_one("blocks")),
    }
    atomic = {
        "nawun": ("written atomically", _less_one("blocks")),
        "nawupf": ("written atomically through a power failure", _less_one("blocks")),
    }
    features = int(record["nsfeat"])
    shown: dict[str, tuple[str, Show]] = {
        "nsze": ("size", blocks),
        "ncap": ("may be allocated", blocks),
        "nuse": ("allocated now", blocks),
        "nvmcap": ("flash behind it", _given(format_size)),
        "nsfeat": ("features", _listed(bits.NSFEAT)),
        "nmic": ("paths", _given(_listed(bits.NMIC))),
        "nsattr": ("write protection", lambda value: "write protected" if value & 1 else None),
        "dlfeat": ("deallocated blocks read as", deallocated),
        "mc": ("metadata may lie", _given(_listed(bits.MC))),
        "dps": ("protection information", _given(lambda value: f"type {value & 7}")),
        "rescap": ("reservations", _given(_hex)),
        "fpi": ("format still to go", _given(lambda value: f"{value & 0x7F} %" if value >> 7 else None)),
        **(atomic if features >> 1 & 1 else {}),
        **(preferred if features >> 4 & 1 else {}),
        "noiob": ("commands should not cross multiples of", _given(lambda value: f"{value:,} blocks")),
        "endgid": ("endurance group", _given(str)),
        "nguid": ("identifier", _given(str)),
        "eui64": ("identifier", _given(str)),
    }
    lines = _lines(record, shown)
    extended = " behind each block" if int(record["flbas"]) & FLBAS_EXTENDED else ""
    for position, form in enumerate(record["lbaf"][: int(record["nlbaf"]) + 1]):
        if not form["lbads"]:
            continue
        metadata = f"{form['ms']} bytes of metadata{extended}" if form["ms"] else "no metadata"
        in_use = ", in use" if position == index else ""
        speed = bits.LBA_PERFORMANCE[int(form["rp"]) & 3]
        lines.append(
            Line(f"lbaf {position}", f"{1 << int(form['lbads'])} bytes", f"{metadata}, {speed} speed{in_use}")
        )
    return lines


def block_bytes_of(record: np.void) -> int:
    """Of IDENTIFY_NAMESPACE."""
    return 1 << int(record["lbaf"][int(record["flbas"]) & FORMAT_INDEX]["lbads"])


def _units(value: int) -> str:
    return f"{value:,} ({format_size(value * DATA_UNIT_BYTES)})"


def _percent(value: int) -> str:
    return f"{value} %"


def _minutes(value: int) -> str:
    return f"{value:,} min"


SMART: dict[str, tuple[str, Show]] = {
    "critical_warning": ("what needs attention now", _listed(bits.CRITICAL_WARNING)),
    "temperature_kelvin": ("temperature", lambda value: celsius(value) or "not told"),
    "available_spare": ("spare left, of what there was", _percent),
    "available_spare_threshold": ("spare at which it warns", _percent),
    "percentage_used": ("of the rated life; more than 100 is allowed", _percent),
    "endurance_group_warning": ("endurance groups that need attention", _listed({})),
    "data_units_read": ("units of 512,000 bytes that hosts have read", _units),
    "data_units_written": ("units of 512,000 bytes that hosts have written", _units),
    "host_read_commands": ("read commands", number),
    "host_write_commands": ("write commands", number),
    "controller_busy_minutes": ("time with I/O commands under way", _minutes),
    "power_cycles": ("power cycles", number),
    "power_on_hours": ("time under power", lambda value: f"{value:,} h"),
    "unsafe_shutdowns": ("power lost without notice", number),
    "media_errors": ("blocks that could not be given back", number),
    "num_error_log_entries": ("entries in the error log, over its life", number),
    "warning_temperature_minutes": ("time above the temperature that warns", _minutes),
    "critical_temperature_minutes": ("time above the critical temperature", _minutes),
    "temperature_sensors_kelvin": ("sensor", celsius),
    "thermal_transitions": ("times throttled, 1 lightly, 2 heavily", number),
    "thermal_seconds": ("time throttled, 1 lightly, 2 heavily", lambda value: f"{value:,} s"),
}


def smart_lines(record: np.void) -> list[Line]:
    """Of SMART_LOG."""
    return _lines(record, SMART)


def _lines(record: np.void, shown: dict[str, tuple[str, Show]]) -> list[Line]:
    lines = []
    for field, (meaning, show) in shown.items():
        value = plain(record[field])
        several = isinstance(value, list)
        for position, one in enumerate(value if several else [value], start=1):
            words = show(one)
            if words is not None:
                lines.append(Line(f"{field} {position}" if several else field, words, meaning))
    return lines


def plain(value):
    """A record's field for JSON: integers, text or, of identifiers, hexadecimal digits without a prefix.

    Identifiers of zeros, which stand for none, are empty.
    """
    if isinstance(value, np.ndarray) and value.dtype.names is None:
        return value.tolist()
    if isinstance(value, np.ndarray):
        return [plain(element) for element in value]
    if isinstance(value, np.void) and value.dtype.names is not None:
        return {name: plain(value[name]) for name in value.dtype.names}
    if isinstance(value, np.void):
        raw = value.tobytes()
        return raw.hex() if any(raw) else ""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip()
    return value.item()
