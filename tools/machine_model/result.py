"""What the model says of one machine, language model, system and workload. All bytes and seconds are floats."""

from dataclasses import asdict, dataclass

from machine_model.workload import Workload

CATEGORIES = ("gpu", "weights", "flash", "accelerator", "link", "host", "write")


@dataclass(frozen=True)
class StepSample:
    """One decode step. context: tokens of each sequence before it; weight: share of all steps that it stands
    for; busy: seconds by resource; breakdown: seconds on the critical path by category"""

    context: int
    seconds: float
    weight: float
    busy: dict[str, float]
    breakdown: dict[str, float]


@dataclass(frozen=True)
class Traffic:
    """Bytes. kv_stored: K and V, X, sketches of all sequences in the end; the others for each token generated,
    dense_read: what a dense step reads, for comparison"""

    kv_stored: float
    flash_read_per_token: float
    link_per_token: float
    flash_written_per_token: float
    dense_read_per_token: float


@dataclass(frozen=True)
class Result:
    """Where it does not fit (`why_not`) times are None and tokens_per_second 0. bottleneck: the resource that
    is busy longest; waf: of the drives' FTL, None where it is not kvfs's."""

    machine: str
    model: str
    system: str
    workload: Workload
    num_drives: int
    fits: bool
    why_not: str | None
    prefill_seconds: float | None
    decode_seconds: float | None
    tokens_per_second: float
    decode_tokens_per_second: float
    steps: tuple[StepSample, ...]
    breakdown: dict[str, float]
    utilisation: dict[str, float]
    bottleneck: str | None
    bytes: Traffic | None
    waf: float | None

    def as_dict(self) -> dict:
        return asdict(self)
