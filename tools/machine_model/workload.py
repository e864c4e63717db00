"""What a machine is asked to do."""

from dataclasses import dataclass, fields

from machine_model.quantities import BadMachine

MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of input_tokens, decoded together for output_tokens each.

    compression: of kvfs-sketch and SparF; writeback_tokens: a spill's, None: as many as fill a page;
    x_share: alpha of X-cache, None: the formula's
    """

    batch: int
    input_tokens: int
    output_tokens: int
    compression: float = 8.0
    writeback_tokens: int | None = None
    x_share: float | None = None

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None:
                continue
            whole = one.name in ("batch", "input_tokens", "output_tokens", "writeback_tokens")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise BadMachine(f"{one.name} is a {'whole ' if whole else ''}number, not {value!r}")
            low, high = {"x_share": (0, 1), "compression": (1, 64)}.get(one.name, (1, MAX_TOKENS))
            if not low <= value <= high:
                raise BadMachine(f"{one.name} is {low} to {high:,}, not {value!r}")

    @property
    def last_tokens(self) -> int:
        """Of each sequence, in the end."""
        return self.input_tokens + self.output_tokens
