"""Numbers of TOML files: each with its unit and its source, checked when read.

A number is a table { value = "768 GB/s", source = "..." }. Prefixes are decimal (GB) or binary (GiB). Whatever
is only assumed says so: `assumed = true`. A value in another unit, without one, below zero or far from anything
that exists is refused with the field's name and the unit that it should have.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvfs.errors import InvalidArgument

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_QUANTITY = re.compile(
    r"\s*([-+]?[0-9][0-9_.]*(?:e[-+]?[0-9]+)?)\s*([^\s0-9]*(?:\s*/\s*[a-z]+)?)\s*", re.IGNORECASE
)


class BadMachine(InvalidArgument):
    """A file of a machine or a language model that says something impossible."""


@dataclass(frozen=True)
class Unit:
    """What a field is measured in. base: the unit that values are kept in; lowest, highest: of anything that
    exists or may come, in that unit, so that a slip by a prefix is seen."""

    base: str
    example: str
    lowest: float
    highest: float
    prefixes: str = "kMGTP"
    binary: bool = False
    whole: bool = False
    power_of_two: bool = False

    def parse(self, field: str, text: object) -> float:
        """Raises BadMachine naming the field."""
        if self.base == "":
            return self._number(field, text)
        expected = f"{field} is in {self.base}, as {self.example!r}"
        if not isinstance(text, str):
            raise BadMachine(f"{expected}, not {text!r} without a unit")
        match = _QUANTITY.fullmatch(text)
        if match is None:
            raise BadMachine(f"{expected}, not {text!r}")
        unit = match[2].replace(" ", "")
        scale = self._scale(unit)
        if scale is None:
            raise BadMachine(f"{expected}, not {text!r}")
        try:
            number = float(match[1])
        except ValueError:
            raise BadMachine(f"{expected}, not {text!r}") from None
        return self.checked(field, number * scale, text)

    def _scale(self, unit: str) -> float | None:
        if not unit.endswith(self.base):
            return None
        prefix = unit[: len(unit) - len(self.base)]
        if self.binary and prefix in _BINARY:
            return _BINARY[prefix]
        return _DECIMAL[prefix] if prefix == "" or prefix in self.prefixes else None

    def _number(self, field: str, value: object) -> float:
        kind = "a whole number" if self.whole else "a number"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (self.whole and not float(value).is_integer()):
            raise BadMachine(f"{field} is {kind} without a unit, as {self.example}, not {value!r}")
        return self.checked(field, value, value)

    def checked(self, field: str, value: float, text: object) -> float:
        if not self.lowest <= value <= self.highest:
            unit = self.base or "no unit"
            raise BadMachine(f"{field} is {self.lowest:g} to {self.highest:g} ({unit}), not {text!r}")
        if self.power_of_two and (value != int(value) or int(value) & (int(value) - 1)):
            raise BadMachine(f"{field} is a power of two ({self.base}), not {text!r}")
        return int(value) if self.whole else float(value)

    def nearest(self, value: float) -> float:
        """The nearest number that is allowed."""
        value = min(max(value, self.lowest), self.highest)
        if self.power_of_two:
            return 2.0 ** round(math.log2(value))
        return round(value) if self.whole else value


# Of many things; what is one thing only has narrower limits, which a slip by a prefix or a unit misses
BYTES = Unit("B", "48 GB", 1.0, 1e18, binary=True)
RATE = Unit("B/s", "768 GB/s", 1e6, 1e14, binary=True)
FLOPS = Unit("FLOP/s", "154.8 TFLOP/s", 1e11, 1e17)
SECONDS = Unit("s", "50 us", 0.0, 10.0, prefixes="mun")
WATTS = Unit("W", "300 W", 0.1, 1e5, prefixes="mk")
DOLLARS = Unit("USD", "4650 USD", 1.0, 1e7, prefixes="k")
SHARE = Unit("", "0.85", 0.01, 1.0)
SPARE = Unit("", "0.07", 0.0, 0.5)
COUNT = Unit("", "8", 1, 10**9, whole=True)
FEW = replace(COUNT, highest=4096)
SWITCH = Unit("", "1", 0, 1, whole=True)

MEMORY = replace(BYTES, lowest=1e9, highest=1e15)
GPU_MEMORY_RATE = replace(RATE, lowest=1e10)
PAGE = replace(BYTES, example="4 KiB", lowest=4096.0, highest=65536.0, power_of_two=True)
READ_TIME = replace(SECONDS, example="50 us", lowest=1e-7, highest=2e-3)
PROGRAM_TIME = replace(SECONDS, example="700 us", lowest=1e-6, highest=5e-2)
ERASE_TIME = replace(SECONDS, example="3500 us", lowest=1e-5, highest=0.5)
CYCLES = replace(COUNT, example="3000", highest=10**7)


@dataclass(frozen=True)
class Number:
    """One number of a machine. path: as `gpu.memory_bandwidth`; unit: as in Unit.base; assumed: no source says
    so"""

    path: str
    value: float
    unit: str
    source: str
    assumed: bool


def read_number(path: str, unit: Unit, table: object) -> Number:
    """Of a table { value, source[, assumed] }. Raises BadMachine."""
    if not isinstance(table, Mapping):
        raise BadMachine(f'{path} is {{ value = {_example(unit)}, source = "..." }}, not {table!r}')
    unknown = set(table) - {"value", "source", "assumed"}
    if unknown:
        raise BadMachine(f"{path}: {', '.join(sorted(unknown))} is none of value, source, assumed")
    if "value" not in table:
        raise BadMachine(f"{path} lacks its value, as {_example(unit)}")
    value = unit.parse(path, table["value"])
    source = table.get("source")
    if not isinstance(source, str) or not source.strip():
        raise BadMachine(f"{path} lacks its source")
    return Number(path, value, unit.base, source, bool(table.get("assumed", False)))


def _example(unit: Unit) -> str:
    return f'"{unit.example}"' if unit.base else unit.example
