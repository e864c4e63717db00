"""Sizes as people write them."""

import re

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTPE", start=1):
    _UNITS[f"{_letter}iB"] = _UNITS[f"{_letter}I"] = 1024**_power
    _UNITS[_letter] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
_BY_CASELESS_NAME = {name.upper(): factor for name, factor in _UNITS.items()}


def parse_size(size: int | str) -> int:
    """Bytes of 4096, "8GiB", "500MB" or "64M" (binary, as dd has it). Raises ValueError."""
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"a size is not negative: {size}")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _BY_CASELESS_NAME:
        raise ValueError(f"{size!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _BY_CASELESS_NAME[match[2].upper()])


def format_size(num_bytes: float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
