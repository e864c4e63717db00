"""What is counted of a cache of objects."""

from dataclasses import asdict, dataclass, fields
from enum import StrEnum

from kvfs.tenant_counters import Lookups


class Miss(StrEnum):
    """Why an object was not given."""

    ABSENT = "absent"  # never stored, evicted or deleted
    IDENTITY = "identity"  # stored by who named another identity
    SIZE = "size"  # it has another size than the buffer
    DAMAGED = "damaged"  # the drive could not give it back; it is dropped
    DRIVE_LOST = "drive_lost"  # the drive of the set that would have it is lost


@dataclass
class ObjectCounters:
    """Since the store was opened. stored, present, refused, declined: of what was put; bytes: of objects

    refused: for want of room; declined: not offered before, see space/admission.py
    """

    hits: int = 0
    misses: int = 0
    miss_absent: int = 0
    miss_identity: int = 0
    miss_size: int = 0
    miss_damaged: int = 0
    miss_drive_lost: int = 0
    stored: int = 0
    present: int = 0
    refused: int = 0
    declined: int = 0
    evictions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_spared: int = 0  # of what was declined

    def miss(self, why: Miss) -> None:
        self.misses += 1
        name = f"miss_{why}"
        setattr(self, name, getattr(self, name) + 1)

    def misses_by_reason(self) -> dict[str, int]:
        return {str(why): getattr(self, f"miss_{why}") for why in Miss}


class RequestMiss(StrEnum):
    """Why a request of an engine was not given all that it asked for."""

    ABSENT = "absent"  # as of an object
    IDENTITY = "identity"
    LOST = "lost"  # it was there, and could not be loaded: damaged, or evicted meanwhile


@dataclass
class RequestCounters(Lookups):
    """Of an engine's requests, as it tells them (ObjectCache.count_request): each is one look-up."""

    miss_absent: int = 0
    miss_identity: int = 0
    miss_lost: int = 0


assert {f"miss_{m}" for m in RequestMiss} == {f.name for f in fields(RequestCounters) if f.name[:5] == "miss_"}


def counters_of(caches) -> dict:
    """The sums; under `caches` a dict of each open cache (CacheIndex), under `tenants` of whose requests."""
    rows = [
        {
            "cache": cache.name,
            "objects": cache.num_objects,
            "bytes": cache.used_bytes,
            "capacity_bytes": cache.capacity_bytes,
            **asdict(cache.counters),
        }
        for cache in caches
    ]
    return sums(rows, [{"cache": cache.name, **row} for cache in caches for row in cache.requests.rows()])


def sums(rows: list[dict], tenants: list[dict]) -> dict:
    """Counters of several caches as counters_of has them. tenants: rows of their requests."""
    names = ["objects", "bytes", *(field.name for field in fields(ObjectCounters))]
    return {**{name: sum(row[name] for row in rows) for name in names}, "caches": rows, "tenants": tenants}
