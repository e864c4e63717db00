"""How an attend call reads less than all pages: its arguments, checked, and what they came to."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from kvfs.errors import DriveLacks, InvalidArgument
from kvfs.layout import KvGeometry
from spdk_glue.vendor_command import (
    ANSWER_HEADER,
    COMPRESSION_MAX,
    TARGET_ERROR_MAX,
    Derive,
    SparseMethod,
)

TOKENS_MAX = (1 << 32) - 1


class Sparf(NamedTuple):
    """SparF as published: r channels and k tokens for each query head."""

    channels: int
    tokens: int


@dataclass(frozen=True)
class Sparse:
    """method: SKETCH with a compression or a target error, the other 0; or SPARF with channels and tokens

    exact_if_cached: of SKETCH, that the drive may read all pages instead where its cache has them
    """

    method: SparseMethod
    channels: int = 0
    tokens: int = 0
    compression: float = 0.0
    target_error: float = 0.0
    exact_if_cached: bool = False

    @property
    def derive(self) -> Derive:
        """What it reads of sealed tokens."""
        return Derive.SKETCH if self.method == SparseMethod.SKETCH else Derive.CHANNEL_MAJOR_KEYS


@dataclass
class PageCounts:
    """Pages that attention has read on drives, by where they came from and, of sparse commands, what they were.

    index_pages: sketches, channels; chosen_pages: of what was chosen by them; dense_pages: of tokens without
    derived data, or with damaged one, or all where they were cached; damaged_segments: of derived data
    """

    commands: int = 0
    pages_from_flash: int = 0
    pages_from_cache: int = 0
    index_pages: int = 0
    chosen_pages: int = 0
    dense_pages: int = 0
    damaged_segments: int = 0

    @property
    def num_pages(self) -> int:
        return self.pages_from_flash + self.pages_from_cache

    def add(self, other: "PageCounts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def add_answer(self, answer: np.ndarray) -> None:
        """answer: of an ATTENTION_FETCH"""
        header = answer[: ANSWER_HEADER.itemsize].view(ANSWER_HEADER)[0]
        fields = {name: int(header[name]) for name in vars(self) if name != "commands"}
        self.add(PageCounts(1, **fields))


@dataclass(frozen=True)
class Reading:
    """How much a call reads. sparse: None for everything; counts: what is read is added to it"""

    sparse: Sparse | None = None
    counts: PageCounts | None = None


EVERYTHING = Reading()


def reading_of(geometry: KvGeometry, compression, target_error, sparf, exact_if_cached, counts) -> Reading:
    """Store.attend's arguments, checked. Raises InvalidArgument."""
    if counts is not None and not isinstance(counts, PageCounts):
        raise InvalidArgument(f"counts is a kvfs.PageCounts, not {type(counts).__name__}")
    return Reading(sparse_of(geometry.head_dim, compression, target_error, sparf, exact_if_cached), counts)


def sparse_of(
    head_dim: int | None, compression=None, target_error=None, sparf=None, exact_if_cached=True
) -> Sparse | None:
    """None if nothing is asked for. head_dim: None if it is not known yet. Raises InvalidArgument."""
    asked = {"compression": compression, "target_error": target_error, "sparf": sparf}
    if not isinstance(exact_if_cached, (bool, np.bool_)):
        raise InvalidArgument(f"exact_if_cached is True or False, not {exact_if_cached!r}")
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidArgument(f"{' and '.join(given)} exclude each other: give one of them")
    if compression is not None:
        value = _number(compression)
        if value is None or not 1 <= value <= COMPRESSION_MAX:
            raise InvalidArgument(f"compression is a number from 1 to {COMPRESSION_MAX:g}, not {compression!r}")
        return Sparse(SparseMethod.SKETCH, compression=value, exact_if_cached=bool(exact_if_cached))
    if target_error is not None:
        value = _number(target_error)
        if value is None or not np.float32(0) < np.float32(value) <= TARGET_ERROR_MAX:
            raise InvalidArgument(
                f"target_error is a number above 0 and up to {TARGET_ERROR_MAX:g}, not {target_error!r}"
            )
        return Sparse(SparseMethod.SKETCH, target_error=value, exact_if_cached=bool(exact_if_cached))
    try:
        channels, tokens = sparf
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"sparf is (channels, tokens), not {sparf!r}") from error
    for name, value, most in (("channels", channels, head_dim or TOKENS_MAX), ("tokens", tokens, TOKENS_MAX)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
            raise InvalidArgument(f"sparf's {name} are a whole number from 1 to {most}, not {value!r}")
    return Sparse(SparseMethod.SPARF, channels=int(channels), tokens=int(tokens))


def _number(value) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def check_drive_has(sparse: Sparse | None, methods: int) -> None:
    """methods: of Identify, bit i is SparseMethod i. Raises DriveLacks."""
    if sparse is not None and not methods >> sparse.method & 1:
        raise DriveLacks(f"attention by {sparse.method.name.lower()}")
