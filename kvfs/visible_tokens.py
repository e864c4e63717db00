"""What an attend call is over: its sequences, and the tokens that each query sees."""

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.model import Model


def common_model(sequences, store) -> Model:
    """The one model of the sequences of an attend call. Raises InvalidArgument if they do not go together."""
    if not sequences:
        raise InvalidArgument("attend needs at least one sequence")
    for sequence in sequences:
        if getattr(sequence, "_store", None) is not store:
            raise InvalidArgument(f"{sequence!r} is not a sequence of this store")
        sequence._check_usable()
        if sequence.model is not sequences[0].model:
            raise InvalidArgument(
                f"one call attends over one model: {sequence.name!r} is of {sequence.model.name!r},"
                f" {sequences[0].name!r} of {sequences[0].model.name!r}"
            )
    return sequences[0].model


def range_array(token_ranges, num_sequences: int, num_queries: int) -> np.ndarray:
    """int64 [num_sequences, num_queries, 2], a copy. Raises InvalidArgument for another shape or type."""
    ranges = np.asarray(token_ranges)
    if ranges.shape != (num_sequences, num_queries, 2) or ranges.dtype.kind not in "iu":
        raise InvalidArgument(
            f"token_ranges is integers of shape {(num_sequences, num_queries, 2)}, not {ranges.shape}"
        )
    return ranges.astype(np.int64)


def visible(num_tokens: list[int], num_queries: int, causal: bool, token_ranges):
    """Visible positions of each query: int64 [num_sequences, num_queries] starts and stops.

    num_tokens: of the layer, in each sequence
    """
    limits = np.array(num_tokens, np.int64)[:, None]
    if token_ranges is not None:
        ranges = range_array(token_ranges, len(num_tokens), num_queries)
        starts, stops = ranges[..., 0], ranges[..., 1]
        if (starts < 0).any() or (stops > limits).any():
            raise InvalidArgument(f"token_ranges lie within 0 and the layer's tokens ({int(limits.min())})")
        return starts, stops
    starts = np.zeros((len(num_tokens), num_queries), np.int64)
    if not causal:
        return starts, starts + limits
    if num_queries > min(num_tokens):
        raise InvalidArgument(f"{num_queries} causal queries over {min(num_tokens)} tokens")
    return starts, limits - np.arange(num_queries - 1, -1, -1, dtype=np.int64)


def windows(starts: np.ndarray, stops: np.ndarray, window: int | None, sink_tokens: int):
    """The visible ranges under a sliding window, as one or two (starts, stops) that do not overlap.

    Raises InvalidArgument.
    """
    for name, value, least in (("window", window, 1), ("sink_tokens", sink_tokens, 0)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise InvalidArgument(f"{name} is a whole number from {least} on, not {value!r}")
    if window is None:
        return [(starts, stops)]
    recent = np.maximum(starts, stops - int(window)), stops
    sinks = starts, np.minimum(starts + int(sink_tokens), recent[0])
    return [recent, sinks] if (sinks[0] < sinks[1]).any() else [recent]
