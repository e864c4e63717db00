"""Hits and misses of look-ups, by who asked and of what model: one idea for prefixes and for objects."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Generic, TypeVar

MAX_ROWS = 1000  # of tenants and models; who comes later is counted together
OTHERS = "(others)"


@dataclass
class Lookups:
    """lookups = hits + misses: those that found something, and those that found nothing.

    tokens_wanted, tokens_found: in whole groups. Whoever derives from it has a miss_* for each reason: look-ups
    that found less than they wanted.
    """

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    tokens_wanted: int = 0
    tokens_found: int = 0

    def count(self, wanted: int, found: int, miss: StrEnum | None) -> None:
        self.lookups += 1
        self.hits += found > 0
        self.misses += found == 0
        self.tokens_wanted += wanted
        self.tokens_found += found
        if miss is not None:
            name = f"miss_{miss}"
            setattr(self, name, getattr(self, name) + 1)


Row = TypeVar("Row", bound=Lookups)


class ByTenant(Generic[Row]):
    """new_row: what is counted of a tenant and model."""

    def __init__(self, new_row: Callable[[], Row]):
        self._new_row = new_row
        self._rows: dict[tuple[str, str], Row] = {}

    def of(self, tenant: str, model: str) -> Row:
        key = (tenant, model)
        if key not in self._rows and len(self._rows) >= MAX_ROWS:
            key = (OTHERS, OTHERS)
        return self._rows.setdefault(key, self._new_row())

    def rows(self) -> list[dict]:
        """A dict of each tenant and model."""
        return [
            {"tenant": tenant, "model": model, **asdict(counters)}
            for (tenant, model), counters in sorted(self._rows.items())
        ]
