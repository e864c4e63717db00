"""Attention over stored tokens: the drive's over those on flash, the host's over the tails, merged by lse.

A call is a generator that yields once, when the drive has its work: whoever has several drives gives work to
all of them before it waits for one. `finish` ends it.
"""

from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np

from accel.merge import merge_states
from kvfs.arrays import to_query
from kvfs.attention_request import DrivePart, build_descriptor, parse_answer
from kvfs.attention_scores import Scoring
from kvfs.errors import InvalidArgument
from kvfs.host_attention import attend_tails
from kvfs.model import Model
from kvfs.sparse import EVERYTHING, Reading
from kvfs.sparse_segments import give_up_damaged, segments_of
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import EXACT_IF_CACHED, answer_bytes

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
        self.sparse_methods = int(limits["sparse_methods"])  # bit i: SparseMethod i
        self._takes_exact = bool(limits["descriptor_flags"] & EXACT_IF_CACHED)
        self._max_items, self._max_queries = int(limits["max_items"]), int(limits["max_queries"])
        self._max_transfer_bytes = int(limits["max_transfer_bytes"])

    def call(
        self,
        model: Model,
        layer,
        queries,
        sequences,
        starts,
        stops,
        scoring: Scoring,
        start: Start = at_once,
        reading: Reading = EVERYTHING,
    ) -> Call:
        """(out, lse) of checked arguments, in as many commands as the drive needs; see Store.attend."""
        limit = self._items_per_command(model, queries)
        if len(sequences) <= limit:
            work = (model, layer, queries, sequences, starts, stops, scoring, start, reading)
            return (yield from self._command(*work))
        answers = []
        for part in (slice(i, i + limit) for i in range(0, len(sequences), limit)):
            ranges = starts[part], stops[part], scoring.of_items(part)
            command = self._command(model, layer, queries[part], sequences[part], *ranges, start, reading)
            answers.append(finish(command) if answers else (yield from command))
        return tuple(np.concatenate(column) for column in zip(*answers, strict=True))

    def _command(
        self, model, layer, queries, sequences, starts, stops, scoring: Scoring, start: Start, reading: Reading
    ) -> Call:
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
            segments = segments_of(reading.sparse, sequences, seen, model.geometry.group_tokens)
            parts = [
                DrivePart(sequence._groups, tail.num_spilled, own)
                for sequence, tail, own in zip(sequences, tails, segments, strict=True)
            ]
            sparse = reading.sparse
            if sparse is not None and not self._takes_exact:
                sparse = replace(sparse, exact_if_cached=False)
            descriptor = build_descriptor(
                model.layout, layer, wire_queries, query_dtype, parts, starts, stops, scoring, sparse
            )
            asked = start(lambda: self._ask(descriptor, size, not sees_tail))
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
        if reading.counts is not None:
            reading.counts.add_answer(answer)
        if reading.sparse is not None:
            give_up_damaged(answer, sequences, segments)
        state = parse_answer(answer, queries.shape)
        return merge_states(*state, out, lse) if sees_tail else state

    def _ask(self, descriptor: np.ndarray, size: int, may_wait: bool) -> Asked:
        answer = self._namespace.attend_now(descriptor, size, may_wait)
        return answer, self._namespace.attention_submit(descriptor) if answer is None else None

    def _items_per_command(self, model: Model, queries: np.ndarray) -> int:
        """How many sequences fit in one command of this drive."""
        _, num_queries, num_heads, head_dim = queries.shape
        if num_queries > self._max_queries:
            raise InvalidArgument(f"at most {self._max_queries} queries, not {num_queries}")
        per_item = 8 * num_queries * num_heads * (head_dim + 1)
        return max(1, min(self._max_items, self._max_transfer_bytes // (2 * per_item)))
