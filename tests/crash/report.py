"""What a simulation did, or what it found wrong."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """crash_points: (media operation, depth) of every power cut; digest: of all media operations."""

    seed: int
    crash_points: set[tuple[int, int]] = field(default_factory=set)
    steps: int = 0
    refusals: int = 0
    bit_flips: int = 0
    digest: int = 0
    cpu_seconds: float = 0.0


class SimulationFailed(AssertionError):
    """A run found something wrong. The cause says what; `done` is what was done last."""

    def __init__(self, seed: int, done: list[str], cause: BaseException):
        self.seed, self.done = seed, done
        super().__init__(f"seed {seed}: {type(cause).__name__}: {cause}")
