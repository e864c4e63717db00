"""Results as rows of text, for terminals and reports."""

from itertools import groupby

from machine_model.economics import Economics
from machine_model.fleet import Fleet
from machine_model.papers import PaperFigure
from machine_model.quantities import Number
from machine_model.result import Result
from machine_model.sensitivity import Sensitivity

Table = tuple[list[str], list[list[str]]]  # columns, rows
UNKNOWN = "unknown"
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def quantity(value: float | None, unit: str) -> str:
    """With a prefix: 768 GB/s, 45 us, 1,862 s."""
    if value is None:
        return UNKNOWN
    if unit in ("", "USD"):
        return f"{value:,.6g} {unit}".strip()
    for scale, prefix in () if unit == "s" else _PREFIXES:
        if abs(value) >= scale:
            return f"{value / scale:,.4g} {prefix}{unit}"
    for scale, prefix in _SMALL:
        if abs(value) >= scale:
            return f"{value / scale:,.4g} {prefix}{unit}"
    return f"{value:g} {unit}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}"


def numbers(found: list[Number]) -> Table:
    rows = [
        [one.path, quantity(one.value, one.unit), "assumed" if one.assumed else "", one.source] for one in found
    ]
    return ["number", "value", "", "source"], rows


def papers(found: list[PaperFigure]) -> Table:
    rows = [
        [
            one.paper,
            one.name,
            f"{one.published:.2f}",
            f"{one.modelled:.2f}",
            percent(one.error),
            "chosen by it" if one.calibrated else "",
            one.note,
        ]
        for one in found
    ]
    return ["paper", "figure", "paper's", "model's", "error", "", "note"], rows


def results(found: list[Result], over: str | None = None) -> Table:
    """A row for each result; over: what a sweep changed."""
    columns = [
        "system",
        "tokens/s",
        "decode tokens/s",
        "prefill",
        "bottleneck",
        "busy",
        "flash read a token",
        "link a token",
    ]
    rows: list[list[str]] = []
    for (system, why_not), group in groupby(found, lambda one: (one.system, one.why_not)):
        own = list(group)
        if why_not is not None:
            rows.append([system, *_swept(own, over), "–", "–", "–", why_not, "–", "–", "–"])
        rows += [[system, *_swept([one], over), *_figures(one)] for one in own if one.fits]
    return [columns[0], *([over] if over else []), *columns[1:]], rows


def _swept(found: list[Result], over: str | None) -> list[str]:
    """The value, or from which to which, of results that have the rest in common."""
    if over is None:
        return []
    field = {"batch": "batch", "context": "input_tokens", "output": "output_tokens"}.get(over)
    values = [one.num_drives if field is None else getattr(one.workload, field) for one in found]
    return [" to ".join(f"{value:,}" for value in sorted({values[0], values[-1]}))]


def _figures(one: Result) -> list[str]:
    return [
        f"{one.tokens_per_second:,.2f}",
        f"{one.decode_tokens_per_second:,.2f}",
        quantity(one.prefill_seconds, "s"),
        one.bottleneck,
        f"{one.utilisation[one.bottleneck]:.0%}",
        quantity(one.bytes.flash_read_per_token, "B"),
        quantity(one.bytes.link_per_token, "B"),
    ]


def fleet(found: list[Fleet]) -> Table:
    columns = [
        *(
            "system",
            "drives a host",
            "hosts",
            "tokens/s, all",
            "bottleneck",
            "network a host, decode",
            "prefill",
        ),
        *("network a drive", "commands/s a host"),
    ]
    rows = [
        [
            one.system,
            f"{one.drives_per_host:,}",
            f"{one.num_hosts:,}",
            f"{one.tokens_per_second:,.0f}",
            one.bottleneck,
            *(quantity(rate, "B/s") for rate in (one.decode_network, one.prefill_network, one.drive_network)),
            f"{one.commands:,.0f}",
        ]
        for one in found
    ]
    return columns, rows


def breakdown(one: Result) -> Table:
    """Where the time of the decode steps goes, on the critical path."""
    rows = [
        [name, quantity(seconds, "s"), f"{seconds / one.decode_seconds:.1%}"]
        for name, seconds in one.breakdown.items()
    ]
    return ["on the critical path", "seconds", "of decode"], rows


def utilisation(one: Result) -> Table:
    rows = [
        [name, f"{share:.1%}"] for name, share in sorted(one.utilisation.items(), key=lambda pair: -pair[1])
    ]
    return ["resource", "busy"], rows


def costs(found: Economics) -> Table:
    def or_unknown(value, text: str) -> str:
        return UNKNOWN if value is None else text.format(value)

    rows = [
        ["machine", or_unknown(found.machine_usd, "{:,.0f} USD")],
        ["power", or_unknown(found.watts, "{:,.0f} W")],
        ["a million tokens", or_unknown(found.usd_per_million, "{:,.2f} USD")],
        ["energy a token", or_unknown(found.joules_per_token, "{:,.1f} J")],
        ["written to flash a day", quantity(found.written_per_day, "B")],
        ["flash lasts", or_unknown(found.endurance_years, "{:,.1f} years")],
    ]
    if found.unknown:
        rows.append(["not known", ", ".join(found.unknown)])
    return ["", "value"], rows


def sensitivities(found: list[Sensitivity]) -> Table:
    rows = [
        [
            one.path,
            quantity(one.value, one.unit),
            percent(one.less),
            percent(one.more),
            "assumed" if one.assumed else "",
        ]
        for one in found
    ]
    return ["number", "value", "tokens/s if less", "tokens/s if more", ""], rows
