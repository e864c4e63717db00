"""Whether a drive is as it should be, by its counters alone."""

SPARE_PERCENT_MIN = 10  # of the flash kept back: SMART's threshold
LIFE_PERCENT_MAX = 100  # of the cycles that the flash is rated for


def complaints(counters: dict) -> list[str]:
    """What is not as it should be, one line each. counters: Store.counters(), of a drive or a set."""
    if "drives" in counters:
        return [
            f"drive {each['drive']} is {each['state']}" + (f": {each['why']}" if each["why"] else "")
            for each in counters["drives"]
            if each["is_lost"] or each["is_slow"]
        ]
    flash = counters["flash"]
    found = []
    if flash["quarantined_superblocks"]:
        found.append(
            f"{flash['quarantined_superblocks']} superblocks have lost pages: kvfsctl scrub names them"
        )
    if flash["damaged_superblocks"]:
        found.append(f"{flash['damaged_superblocks']} superblocks are read by parity: kvfsctl scrub mends them")
    if flash["available_spare_percent"] <= SPARE_PERCENT_MIN:
        found.append(f"{flash['available_spare_percent']} % of the spare flash is left: replace the drive soon")
    if flash["percentage_used"] >= LIFE_PERCENT_MAX:
        found.append(f"{flash['percentage_used']} % of the rated cycles are used: replace the drive soon")
    return found
