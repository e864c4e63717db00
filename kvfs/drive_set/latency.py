"""How long drives take to answer, and which of them the others wait for.

Answers are fetched one drive after another, so only the first one fetched is timed exactly; the order turns
with each call, and every drive gets its turn. What is compared is time per byte of keys and values, for drives
need not have the same share; and medians, for a single hiccup slows nobody down for long.
"""

import statistics
from collections import deque
from collections.abc import Sequence

SAMPLES = 32  # that are remembered
LEAST_SAMPLES = 16
LOOK_EVERY = 8  # samples
SLOW_RATIO = 2.0  # of the median of the others
SLOW_EXCESS_SECONDS = 0.5e-3  # per call: less than that nobody waits for


class Latency:
    """Of one drive's answers."""

    def __init__(self):
        self.num_samples = 0
        self.is_slow = False
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # seconds, and per byte

    def note(self, seconds: float, num_bytes: int) -> None:
        self.num_samples += 1
        self._samples.append((seconds, seconds / num_bytes))

    @property
    def seconds(self) -> float:
        """Of a call."""
        return statistics.median(seconds for seconds, _ in self._samples) if self._samples else 0.0

    @property
    def seconds_per_byte(self) -> float:
        return statistics.median(per_byte for _, per_byte in self._samples)

    def compare(self, others: Sequence["Latency"]) -> float | None:
        """How many times longer it takes than the others (their median); None where too little is known."""
        known = [other.seconds_per_byte for other in others if other.num_samples >= LEAST_SAMPLES]
        if self.num_samples < LEAST_SAMPLES or not known:
            return None
        return self.seconds_per_byte / max(statistics.median(known), 1e-15)

    def becomes_slow(self, others: Sequence["Latency"]) -> bool:
        """Whether it is slow now and was not before, as of now and then; hysteresis keeps the log short."""
        if self.num_samples % LOOK_EVERY:
            return False
        ratio = self.compare(others)
        if ratio is None:
            return False
        excess = self.seconds * (1 - 1 / max(ratio, 1e-15))
        was_slow = self.is_slow
        if ratio > SLOW_RATIO and excess > SLOW_EXCESS_SECONDS:
            self.is_slow = True
        elif ratio < SLOW_RATIO / 1.5:
            self.is_slow = False
        return self.is_slow and not was_slow
