"""Write amplification, by cause."""

import numpy as np


def write_amplification(flash: np.void) -> dict[str, float | None]:
    """Pages of flash used up per page that the host wrote, from a FLASH_HEALTH_LOG; None before its first.

    total, of which: host (1), garbage_collection, wear_levelling, padding, parity, metadata. What is left of
    the total is pages programmed again after a program failed. lifetime: total since the drive was made,
    without padding; its host pages include deallocations, so it is a lower bound.
    """
    host, lifetime = int(flash["host_pages_written"]), int(flash["lifetime_versions"])
    wear = int(flash["wear_leveling_pages_written"])
    pages = {
        "total": int(flash["media_pages_programmed"]) + int(flash["padding_pages"]),
        "host": host,
        "garbage_collection": int(flash["gc_pages_written"]) - wear,
        "wear_levelling": wear,
        "padding": int(flash["padding_pages"]),
        "parity": int(flash["parity_pages_written"]),
        "metadata": int(flash["metadata_pages_written"]),
    }
    found = {name: count / host if host else None for name, count in pages.items()}
    return {**found, "lifetime": int(flash["lifetime_pages_programmed"]) / lifetime if lifetime else None}
