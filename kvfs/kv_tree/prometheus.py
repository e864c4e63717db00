"""Counters in the text format that Prometheus reads."""

from collections.abc import Iterator


def metrics_text(counters: dict) -> str:
    """counters: nested dicts of numbers (Store.counters); None is left out.

    A list's items get an index; those that are dicts of one drive each get its name instead.
    """
    return "".join(f"{line}\n" for line in _lines("kvfs", counters))


def _lines(prefix: str, values: dict) -> Iterator[str]:
    for name, value in values.items():
        metric = f"{prefix}_{name}"
        if isinstance(value, dict):
            yield from _lines(metric, value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _of_drives(metric, value)
        elif isinstance(value, list):
            yield f"# TYPE {metric} untyped"
            yield from (f'{metric}{{index="{index}"}} {number}' for index, number in enumerate(value))
        elif isinstance(value, (int, float)):
            yield f"# TYPE {metric} untyped"
            yield f"{metric} {value}"


def _of_drives(prefix: str, drives: list[dict]) -> Iterator[str]:
    for name, first in drives[0].items():
        if name != "drive" and not isinstance(first, str | bool):
            metric = f"{prefix}_{name}"
            numbers = [(each["drive"], each[name]) for each in drives if isinstance(each[name], int | float)]
            if numbers:
                yield f"# TYPE {metric} untyped"
                yield from (f'{metric}{{drive="{_escaped(drive)}"}} {number}' for drive, number in numbers)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
