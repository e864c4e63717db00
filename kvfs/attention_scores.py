"""How scores come from queries and keys: scale, soft cap, linear bias, sinks."""

from dataclasses import dataclass, replace

import numpy as np

from kvfs.arrays import as_numpy
from kvfs.errors import InvalidArgument
from kvfs.layout import KvGeometry


@dataclass(frozen=True)
class Scoring:
    """How scores come from queries and keys.

    score = scale * q . k, then, if softcap is above zero, softcap * tanh(score / softcap), then less slope of
    the head times the distance from the query, if there are slopes.

    slopes: float32 [num_query_heads] or None; positions: int64 [num_items, num_queries], where queries stand
    """

    scale: float
    softcap: float = 0.0
    slopes: np.ndarray | None = None
    positions: np.ndarray | None = None

    def of_items(self, part: slice) -> "Scoring":
        """For some of the items only."""
        return self if self.positions is None else replace(self, positions=self.positions[part])


def head_array(values, name: str, geometry: KvGeometry) -> np.ndarray:
    """float32 [num_query_heads], a copy. Raises InvalidArgument for another shape, or what is not finite."""
    try:
        array = np.array(as_numpy(values), np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is not an array: {error}") from error
    if array.shape != (geometry.num_query_heads,) or not np.isfinite(array).all():
        raise InvalidArgument(f"{name} are {geometry.num_query_heads} finite numbers, one for each query head")
    return array


def _finite(value, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is a number, not {value!r}") from error
    if not np.isfinite(number):
        raise InvalidArgument(f"{name} is a finite number, not {number}")
    return number


def scoring_of(
    geometry: KvGeometry, scale, softcap, alibi_slopes, query_positions, stops: np.ndarray
) -> Scoring:
    """Store.attend's arguments, checked. stops: int64 [num_sequences, num_queries]. Raises InvalidArgument."""
    scale = geometry.head_dim**-0.5 if scale is None else _finite(scale, "scale")
    softcap = 0.0 if softcap is None else _finite(softcap, "softcap")
    if softcap < 0:
        raise InvalidArgument(f"softcap is above zero, or None for no cap, not {softcap}")
    if alibi_slopes is None:
        if query_positions is not None:
            raise InvalidArgument("query_positions are of use with alibi_slopes only")
        return Scoring(scale, softcap)
    positions = stops - 1
    if query_positions is not None:
        try:
            positions = np.asarray(query_positions)
        except ValueError as error:
            raise InvalidArgument(f"query_positions is not an array: {error}") from error
        if positions.shape != stops.shape or positions.dtype.kind not in "iu":
            raise InvalidArgument(f"query_positions is integers of shape {stops.shape}, not {positions.shape}")
    positions = positions.astype(np.int64)
    if (positions < -1).any() or (positions >= 1 << 32).any():
        raise InvalidArgument("query_positions lie within 0 and 2**32 - 1")
    return Scoring(scale, softcap, head_array(alibi_slopes, "alibi_slopes", geometry), positions.clip(min=0))


def with_sinks(out: np.ndarray, lse: np.ndarray, sinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A state as if each head saw one token more, of score sinks[head] and value zero."""
    with_sink = np.logaddexp(lse, sinks)
    return out * np.exp(lse - with_sink)[..., None], with_sink
