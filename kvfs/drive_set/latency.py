"""How long drives take to answer, and which of them the others wait for.

Answers are fetched one drive after another, so only the first one fetched is timed exactly; the order turns
with each call, and every drive gets its turn. What is compared is time per byte of keys and values, for drives
need not have the same share.
"""

import statistics
from collections.abc import Sequence

WEIGHT = 1 / 16  # of the newest sample: some dozens of calls are remembered
LEAST_SAMPLES = 16
SLOW_RATIO = 2.0  # of the median of the others
SLOW_EXCESS_SECONDS = 0.5e-3  # per call: less than that nobody waits for


class Latency:
    """Of one drive's answers: seconds per call and per byte, exponentially weighted."""

    def __init__(self):
        self.num_samples = 0
        self.seconds = 0.0
        self.num_bytes = 0.0
        self.is_slow = False

    def note(self, seconds: float, num_bytes: int) -> None:
        self.num_samples += 1
        weight = max(WEIGHT, 1 / self.num_samples)
        self.seconds += weight * (seconds - self.seconds)
        self.num_bytes += weight * (num_bytes - self.num_bytes)

    @property
    def seconds_per_byte(self) -> float:
        return self.seconds / max(self.num_bytes, 1.0)

    def compare(self, others: Sequence["Latency"]) -> float | None:
        """How many times longer it takes than the others (their median); None where too little is known."""
        known = [other.seconds_per_byte for other in others if other.num_samples >= LEAST_SAMPLES]
        if self.num_samples < LEAST_SAMPLES or not known:
            return None
        return self.seconds_per_byte / max(statistics.median(known), 1e-15)

    def becomes_slow(self, others: Sequence["Latency"]) -> bool:
        """Whether it is slow now and was not before; hysteresis keeps the log short."""
        ratio = self.compare(others)
        if ratio is None:
            return False
        excess = self.seconds * (1 - 1 / ratio)
        was_slow = self.is_slow
        if ratio > SLOW_RATIO and excess > SLOW_EXCESS_SECONDS:
            self.is_slow = True
        elif ratio < SLOW_RATIO / 1.5:
            self.is_slow = False
        return self.is_slow and not was_slow
