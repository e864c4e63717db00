"""What cores that count their cycles have done, in a line: simulated ones compute the right thing slowly, so
their speed on a card is modelled from cycles."""

BEAT_BYTES = 64
CLOCK_MHZ = 300  # assumed of a card


def core_line(attention: dict) -> str | None:
    """attention: of Store.counters; None where no such core was at work."""
    units, cycles, streamed = (attention.get(f"core_{name}", 0) for name in ("units", "cycles", "bytes"))
    left = attention.get("fallback_units", 0)
    if not cycles and not left:
        return None
    line = f"FPGA cores: {units:,} units"
    if cycles:
        a_cycle = streamed / cycles
        line += (
            f", {cycles:,} cycles, {a_cycle:.1f} bytes of K and V a cycle ({a_cycle / BEAT_BYTES:.2f} beats of"
            f" {BEAT_BYTES}): {a_cycle * CLOCK_MHZ / 1000:.1f} GB/s each, modelled at {CLOCK_MHZ} MHz"
        )
    return f"{line}; {left:,} units left to numba" if left else line
