"""Hits and misses of look-ups for prefixes, by tenant and model."""

from dataclasses import dataclass, fields

from kvfs.prefix.match import Miss
from kvfs.tenant_counters import ByTenant, Lookups


@dataclass
class LookupCounters(Lookups):
    """groups_dropped: whose entries were given up because the group is damaged or holds other tokens."""

    groups_dropped: int = 0
    miss_unknown: int = 0
    miss_other_model: int = 0
    miss_other_dtype: int = 0
    miss_other_settings: int = 0
    miss_not_on_flash: int = 0
    miss_tokens_differ: int = 0
    miss_damaged: int = 0
    miss_drive_lost: int = 0
    miss_too_short: int = 0

    def compared(self, miss: Miss | None, num_dropped: int) -> None:
        """Stored tokens were compared with a prompt's."""
        self.groups_dropped += num_dropped
        self.miss_tokens_differ += miss == Miss.TOKENS_DIFFER


assert {f"miss_{miss}" for miss in Miss} == {f.name for f in fields(LookupCounters) if f.name[:5] == "miss_"}


class PrefixCounters(ByTenant[LookupCounters]):
    def __init__(self):
        super().__init__(LookupCounters)

    def as_dict(self) -> dict:
        """The sums, and under `tenants` a dict of each tenant and model."""
        return sums(self.rows())


def sums(rows: list[dict]) -> dict:
    """Counters of several tenants as PrefixCounters.as_dict has them."""
    names = [field.name for field in fields(LookupCounters)]
    return {**{name: sum(row[name] for row in rows) for name in names}, "tenants": rows}
