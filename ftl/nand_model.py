"""How flash misbehaves, in numbers: what media_nand.py draws its faults by."""

from dataclasses import asdict, dataclass

import numpy as np

WEAR_OUT_SPAN = 0.1  # of the rated cycles: past them, failure grows to certainty over this many more


@dataclass(frozen=True)
class NandModel:
    """How flash misbehaves; by default not at all within its rated cycles."""

    program_failure_rate: float = 0.0  # per page programmed
    erase_failure_rate: float = 0.0  # per block erased
    factory_bad_fraction: float = 0.0  # of all blocks, bad from the start
    grown_bad_fraction: float = (
        0.0  # of all blocks, failing for ever from a point spread evenly over their life
    )
    rated_cycles: int = 3000  # erases of a block
    bit_error_rate: float = 0.0  # per bit read, of a new block
    bit_error_growth: float = 100.0  # times that at the rated cycles, exponentially between
    read_disturb_limit: int | None = None  # reads of a block between erases that do no harm
    read_disturb_error_rate: float = 1e-6  # per bit read, for each further such number of reads
    lost_write_rate: float = 0.0  # per page: nothing is programmed, success is reported
    misdirected_write_rate: float = 0.0  # per page: a free page of the same block is programmed instead
    dead_dies: frozenset[int] = frozenset()

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith(("rate", "fraction")) and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value}")
        if self.rated_cycles < 1:
            raise ValueError(f"rated_cycles must be at least 1, not {self.rated_cycles}")

    def wear_failure(self, cycles: np.ndarray) -> np.ndarray:
        """float64: the probability that a block worn this much does not survive one more cycle."""
        return np.clip((cycles / self.rated_cycles - 1) / WEAR_OUT_SPAN, 0, 1)

    def bit_errors(self, cycles: np.ndarray, reads: np.ndarray) -> np.ndarray:
        """float64: errors per bit read in a block with these erases, and reads since the last."""
        rate = self.bit_error_rate * self.bit_error_growth ** (cycles / self.rated_cycles)
        if self.read_disturb_limit is not None:
            rate = rate + self.read_disturb_error_rate * np.maximum(reads / self.read_disturb_limit - 1, 0)
        return rate


@dataclass
class NandFaults:
    """What went wrong so far."""

    program_failures: int = 0  # blocks of failed programs
    erase_failures: int = 0  # blocks
    bits_flipped: int = 0
    lost_writes: int = 0  # pages
    misdirected_writes: int = 0  # pages
    power_cuts: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
