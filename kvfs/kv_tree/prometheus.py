"""Counters in the text format that Prometheus reads."""

from collections.abc import Iterator


def metrics_text(counters: dict) -> str:
    """counters: nested dicts of numbers (Store.counters). A list's items get an index; None is left out."""
    return "".join(f"{line}\n" for line in _lines("kvfs", counters))


def _lines(prefix: str, values: dict) -> Iterator[str]:
    for name, value in values.items():
        metric = f"{prefix}_{name}"
        if isinstance(value, dict):
            yield from _lines(metric, value)
        elif isinstance(value, list):
            yield f"# TYPE {metric} untyped"
            yield from (f'{metric}{{index="{index}"}} {number}' for index, number in enumerate(value))
        elif isinstance(value, (int, float)):
            yield f"# TYPE {metric} untyped"
            yield f"{metric} {value}"
