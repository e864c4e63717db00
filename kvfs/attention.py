"""Attention over stored tokens: the drive's over those on flash, the host's over the tails, merged by lse.

A call is a generator that yields once, when the drive has its work: whoever has several drives gives work to
all of them before it waits for one. `finish` ends it.
"""

from collections.abc import Callable, Generator

import numpy as np

from accel.merge import merge_states
from kvfs.arrays import to_query
from kvfs.attention_request import DrivePart, build_descriptor, parse_answer
from kvfs.attention_scores import Scoring
from kvfs.errors import InvalidArgument
from kvfs.host_attention import attend_tails
from kvfs.model import Model
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import answer_bytes

State = tuple[np.ndarray, np.ndarray]  # (out, lse)
Asked = tuple[np.ndarray | None, int | None]  # an answer, or the ticket that it comes by
# How a drive is given its work: calls a function at once or on another thread; what it returns gives the
# result. A drive beside the host computes what it has in its cache, or is small, on the thread that asks.
Start = Callable[[Callable[[], Asked]], Callable[[], Asked]]
Call = Generator[None, None, State]


def finish(call: Call) -> State:
    """The answer of an attention call, begun or not."""
    try:
        while True:
            next(call)
    except StopIteration as end:
        return end.value


def at_once(work: Callable[[], Asked]) -> Callable[[], Asked]:
    """The Start of one drive alone."""
    result = work()
    return lambda: result


class Attention:
    """worker: the host's kernels, from accel.workers."""

    def __init__(self, namespace: Namespace, worker):
        self._namespace = namespace
        self._worker = worker
        limits = namespace.attention
        self._max_items, self._max_queries = int(limits["max_items"]), int(limits["max_queries"])
        self._max_transfer_bytes = int(limits["max_transfer_bytes"])

    def call(
        self, model: Model, layer, queries, sequences, starts, stops, scoring: Scoring, start: Start = at_once
    ) -> Call:
        """(out, lse) of checked arguments, in as many commands as the drive needs; see Store.attend."""
        limit = self._items_per_command(model, queries)
        if len(sequences) <= limit:
            return (yield from self._command(model, layer, queries, sequences, starts, stops, scoring, start))
        answers = []
        for part in (slice(i, i + limit) for i in range(0, len(sequences), limit)):
            ranges = starts[part], stops[part], scoring.of_items(part)
            command = self._command(model, layer, queries[part], sequences[part], *ranges, start)
            answers.append(finish(command) if answers else (yield from command))
        return tuple(np.concatenate(column) for column in zip(*answers, strict=True))

    def _command(self, model, layer, queries, sequences, starts, stops, scoring: Scoring, start: Start) -> Call:
        wire_queries, query_dtype = to_query(queries)
        tails = [sequence._layers[layer] for sequence in sequences]
        seen = [
            (min(own_starts), max(own_stops), tail.num_spilled)
            for own_starts, own_stops, tail in zip(starts.tolist(), stops.tolist(), tails, strict=True)
        ]
        sees_flash = any(first < min(stop, spilled) for first, stop, spilled in seen)
        sees_tail = any(max(first, spilled) < stop for first, stop, spilled in seen)
        size = answer_bytes(*queries.shape)
        asked: Callable[[], Asked] | None = None
        if sees_flash or not sees_tail:
            parts = [
                DrivePart(sequence._groups, tail.num_spilled)
                for sequence, tail in zip(sequences, tails, strict=True)
            ]
            descriptor = build_descriptor(
                model.layout, layer, wire_queries, query_dtype, parts, starts, stops, scoring
            )
            asked = start(lambda: self._ask(descriptor, size))
        try:
            yield
        except GeneratorExit:  # another drive has failed: nobody wants the answer any more
            _, ticket = asked() if asked is not None else (None, None)
            if ticket is not None:
                self._namespace.attention_cancel(ticket)
            raise
        if sees_tail:  # while the drive works
            host_queries = np.ascontiguousarray(queries, np.float32)
            out, lse = attend_tails(self._worker, model.layout, tails, host_queries, starts, stops, scoring)
        if asked is None:
            return out, lse
        answer, ticket = asked()
        if ticket is not None:
            answer = self._namespace.attention_fetch(ticket, size)
        state = parse_answer(answer, queries.shape)
        return merge_states(*state, out, lse) if sees_tail else state

    def _ask(self, descriptor: np.ndarray, size: int) -> Asked:
        answer = self._namespace.attend_now(descriptor, size)
        return answer, self._namespace.attention_submit(descriptor) if answer is None else None

    def _items_per_command(self, model: Model, queries: np.ndarray) -> int:
        """How many sequences fit in one command of this drive."""
        _, num_queries, num_heads, head_dim = queries.shape
        if num_queries > self._max_queries:
            raise InvalidArgument(f"at most {self._max_queries} queries, not {num_queries}")
        per_item = 8 * num_queries * num_heads * (head_dim + 1)
        return max(1, min(self._max_items, self._max_transfer_bytes // (2 * per_item)))


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
