"""What was measured of this machine, as plain numbers: the input of a prediction."""

from dataclasses import asdict, dataclass

# of accel/attention_job.py: how a drive cuts a command that is not in its cache
INLINE_BYTES = 4 << 20  # up to here one thread reads, then computes
WINDOW_BYTES = 8 << 20  # beyond, windows are read by two threads while workers compute those before


@dataclass(frozen=True)
class SketchCosts:
    """index_kernel, refined_kernel: thread seconds of a byte of index pages, of refinements; command: seconds
    of an attend call beside its bytes; refined_command: more of these for a byte of refinements, as each unit
    is chosen, looked up and merged"""

    index_kernel: float
    refined_kernel: float
    command: float
    refined_command: float


@dataclass(frozen=True)
class SketchRates:
    """Of compressed attention: costs of a command that reads its index pages from flash; of one that has these
    in the cache. Readers beside the kernels make these slower."""

    cold: SketchCosts
    kept: SketchCosts


@dataclass(frozen=True)
class DriveRates:
    """Of `num_drives` drives with `num_workers` threads each, for one geometry, batch and storage dtype.

    media: bytes/s of all drives together, as attention reads, checksums included: command by command, so that
        it begins with nothing on its way and ends with the last window alone
    media_around_cached: the same where the lines that are in the cache, as many as planned, are left out
    media_random: bytes/s of pages anywhere, many in one batch, as many side by side as are refined together
    read_cpu: CPU seconds of a byte read from flash
    kernel: seconds of one thread for a byte of K and V in memory, all workers at work (up to INLINE_BYTES:
        one thread alone)
    cached_command, cold_command: seconds of an attend call beside its bytes: Python, threads handing over, a
        few tokens of the host's; of a command whose pages are in the drive's cache, or none
    append: seconds of one token of one layer and sequence; spill: more than that if it fills a group
    tail: seconds of the host's attention over a token of the tail
    sketch: None where nothing was sealed
    """

    num_drives: int
    num_workers: int
    media: float
    media_around_cached: float
    media_random: float
    read_cpu: float
    kernel: float
    cached_command: float
    cold_command: float
    append: float
    spill: float
    tail: float
    sketch: SketchRates | None = None


@dataclass(frozen=True)
class ModelRates:
    """The model's own work in a decode step of the planned batch, attention left out.

    seconds: None if nothing is known of the model's sizes; how: what was measured, in words
    projection_flops: FLOP/s of multiplying many rows by the K and V projections, which X-cache would do; None
    where hidden_size is unknown
    """

    seconds: float | None
    how: str
    projection_flops: float | None = None


@dataclass(frozen=True)
class Rates:
    """link: bytes/s between host and drives; memory: of reading it with all CPUs."""

    num_cpus: int
    link: float
    memory: float
    drives: tuple[DriveRates, ...]
    model: ModelRates

    def as_dict(self) -> dict:
        return asdict(self)
