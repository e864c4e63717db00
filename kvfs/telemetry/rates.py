"""What happened between two looks at a store: rates and latencies, for who shows them as they change."""

from spdk_glue.probes import BOUNDS_NS


def quantile_ns(counts: list[int], share: float) -> float | None:
    """The duration that `share` of them did not exceed, within the width of its bucket; None of none."""
    total, before = sum(counts), 0
    for bucket, count in enumerate(counts):
        if count and before + count >= share * total:
            low = BOUNDS_NS[bucket - 1] if bucket else 0
            high = BOUNDS_NS[min(bucket, len(BOUNDS_NS) - 1)]
            return low + (high - low) * (share * total - before) / count
        before += count
    return None


def total_of(telemetry: dict, layer: str, name: str) -> float:
    """A counter of all drives together."""
    return sum(drive["counters"][layer].get(name) or 0 for drive in telemetry["drives"] if "counters" in drive)


def _counts(telemetry: dict, operation: str) -> list[int]:
    return next(row["counts"] for row in telemetry["latencies"] if row["name"] == operation)


def rates(before: dict, now: dict) -> dict[str, float | None]:
    """before, now: of Store.telemetry, of one store. None: nothing to tell it from."""
    seconds = max(now["time_s"] - before["time_s"], 1e-9)

    def per_second(layer: str, name: str) -> float:
        return (total_of(now, layer, name) - total_of(before, layer, name)) / seconds

    attends = [b - a for a, b in zip(_counts(before, "attend"), _counts(now, "attend"), strict=True)]
    cache, flash = per_second("attention", "pages_from_cache"), per_second("attention", "pages_from_flash")
    ahead = per_second("attention", "pages_read_ahead")  # found in the cache, but flash has read them for it
    workers = total_of(now, "attention", "num_workers")
    return {
        "attends_per_second": sum(attends) / seconds,
        "attend_p50_us": _us(quantile_ns(attends, 0.5)),
        "attend_p99_us": _us(quantile_ns(attends, 0.99)),
        "flash_read_bytes_per_second": per_second("flash", "bytes_read"),
        "flash_written_bytes_per_second": per_second("flash", "bytes_written"),
        "host_written_bytes_per_second": per_second("flash", "host_bytes_written"),
        "cache_hit_ratio": max(cache - ahead, 0.0) / (cache + flash) if cache + flash else None,
        "worker_use_ratio": per_second("attention", "kernel_ns") / 1e9 / workers if workers else None,
        "commands_outstanding": sum(drive.get("commands_outstanding", 0) for drive in now["drives"]),
    }


def _us(ns: float | None) -> float | None:
    return None if ns is None else ns / 1000
