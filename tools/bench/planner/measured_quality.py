"""What compressions do to a model's predictions: measured, not computed. The planner advises no other.

By `kvfsctl bench sparse`: the shipped model (head_dim 64, 4 query heads a KV head, float16) behind so many
tokens of held-out source code, attention on the drive, 512 tokens predicted at compression 8, 128 at others. A
line for each text and length; other models and texts may do better or worse.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """agreement: share of next tokens that dense attention predicts too; perplexity: over dense"""

    compression: int
    context: int
    agreement: float
    perplexity: float


MEASURED = (
    Measured(8, 8192, 0.988, 1.002),
    Measured(8, 8192, 0.984, 1.012),
    Measured(8, 8192, 0.982, 1.001),
    Measured(8, 16_384, 0.969, 0.997),
    Measured(8, 16_384, 0.969, 0.993),
    Measured(8, 16_384, 0.982, 0.995),
    Measured(8, 32_768, 0.980, 0.993),
    Measured(8, 32_768, 0.959, 1.007),
    Measured(8, 32_768, 0.941, 1.004),
    Measured(6, 8192, 1.000, 1.004),
    Measured(6, 8192, 0.984, 1.006),
    Measured(6, 8192, 0.992, 1.004),
    Measured(6, 16_384, 0.977, 1.004),
    Measured(6, 16_384, 0.984, 0.998),
    Measured(6, 16_384, 0.992, 0.999),
    Measured(6, 32_768, 0.984, 0.999),
    Measured(6, 32_768, 0.961, 1.011),
)


@dataclass(frozen=True)
class Quality:
    """Ranges over texts and lengths, num_texts together: (lowest, highest)."""

    agreement: tuple[float, float]
    perplexity: tuple[float, float]
    num_texts: int


def quality_of(compression: int) -> Quality | None:
    """None where nobody has measured it."""
    found = [one for one in MEASURED if one.compression == compression]
    if not found:
        return None
    agreement, perplexity = [one.agreement for one in found], [one.perplexity for one in found]
    return Quality((min(agreement), max(agreement)), (min(perplexity), max(perplexity)), num_texts=len(found))
