"""The counters of a set: sums over its drives, and what each one is and does."""

SUMMED = ("link", "space", "memory", "attention", "sealing")
SUMMED_OF_FLASH = ("bytes_read", "bytes_written", "host_bytes_written", "num_pages", "mapped_pages")
MICROSECONDS = 1e6


def set_counters(drive_set) -> dict:
    """Nested plain dicts; `drives` is a list of dicts, each with the `drive` that it is of."""
    members = list(drive_set._members.values())
    of_live = {}
    for member in members:
        if member.lost is None:
            with member.in_use("its counters") as store:
                of_live[member.drive_id] = store.counters()
    found = {}
    for layer in SUMMED:
        found[layer] = _sum([counters[layer] for counters in of_live.values()])
    flash = [counters["flash"] for counters in of_live.values()]
    found["flash"] = {name: sum(each[name] for each in flash) for name in SUMMED_OF_FLASH}
    found["objects"] = drive_set._objects.counters([counters["objects"] for counters in of_live.values()])
    found["eviction"] = drive_set._space.counters()
    found["prefix"] = drive_set._prefixes.counters.as_dict()
    found["drives"] = [_of_drive(drive_set, member, of_live.get(member.drive_id)) for member in members]
    return found


def _sum(layers: list[dict]) -> dict:
    """By name; of numbers that are the same for all, such as limits and versions, it says nothing new."""
    first = layers[0] if layers else {}
    numbers = (name for name, value in first.items() if isinstance(value, (int, float)))
    return {name: sum(layer[name] for layer in layers) for name in numbers if name != "version"}


def _of_drive(drive_set, member, counters: dict | None) -> dict:
    membership = drive_set.membership
    others = [other.latency for other in drive_set._live if other is not member]
    space = counters["space"] if counters else {}
    return {
        "drive": member.location,
        "id": member.drive_id,
        "state": _state(membership, member),
        "why": member.lost,
        "has_files": member.drive_id == membership.files,
        "is_lost": int(member.lost is not None),
        "is_slow": int(member.latency.is_slow),
        "num_kv_heads": member.num_heads,
        "capacity_bytes": space.get("capacity_bytes"),
        "free_bytes": space.get("free_bytes"),
        "derived_bytes": space.get("derived_bytes"),
        "attend_latency_us": member.latency.seconds * MICROSECONDS,
        "latency_ratio": member.latency.compare(others),
        "waf": counters["waf"]["total"] if counters else None,
    }


def _state(membership, member) -> str:
    if member.lost is not None:
        return "lost"
    if member.drive_id in membership.leaving:
        return "leaving"
    return "slow" if member.latency.is_slow else "in use"
