"""Attention over sequences, as a store offers it."""

from collections.abc import Sequence as Items
from typing import Any

from accel.merge import merge_states
from kvfs.arrays import Array, Pair, float_array, give
from kvfs.attention import Call, Start, at_once, finish
from kvfs.attention_scores import head_array, scoring_of, with_sinks
from kvfs.errors import EmptySequence, InvalidArgument
from kvfs.prefix.reuse import suspecting
from kvfs.sequence import Sequence
from kvfs.sparse import PageCounts, check_drive_has, reading_of
from kvfs.telemetry.requests import request
from kvfs.visible_tokens import common_model, visible, windows


class AttendingStore:
    """What Store adds for it. Expects a store's lock and its `Attention`."""

    @request("attend")
    @suspecting
    def attend(
        self,
        layer: int,
        queries: Array,
        sequences: "Sequence | Items[Sequence]",
        *,
        causal: bool = True,
        token_ranges: Array | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        query_positions: Array | None = None,
        sinks: Array | None = None,
        compression: float | None = None,
        target_error: float | None = None,
        sparf: tuple[int, int] | None = None,
        exact_if_cached: bool = True,
        counts: PageCounts | None = None,
        out: Pair | None = None,
    ) -> tuple[Any, Any]:
        """Attention of each sequence's queries over its stored tokens of one layer.

        queries: [num_sequences, num_queries, num_query_heads, head_dim]: NumPy, torch, DLPack or a buffer, in
            host memory; float16 and bfloat16 (for a model of that dtype also its bits as uint16) cross the
            link as they are, anything else as float32
        causal: the queries are the layer's last `num_queries` tokens, and each sees itself and what came
            before; False: each sees all tokens
        token_ranges: int64 [num_sequences, num_queries, 2], the visible positions [start, stop) of each
            query instead: sliding windows, left padding, only the past
        window: a query sees the last so many of these at most; and the first `sink_tokens` of them all the
            same, as streaming models want it (arXiv:2309.17453)
        scale: of scores, head_dim ** -0.5 by default
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118)
        alibi_slopes: [num_query_heads]; a score is lessened by slope * distance to the query (arXiv:2108.12409)
        query_positions: int64 [num_sequences, num_queries], where distances count from; by default the last
            token that the query may see
        sinks: [num_query_heads], the learnt score of a token without a value, which takes its share of the
            weights and of lse (gpt-oss)
        compression: 1 to 64, how much less is read of sealed tokens: at most 4 / (3 * compression) of their
            pages, but never less than their sketches, 9/64 in float16; what is not sealed is read as ever
        target_error: above 0, to 1: the relative error of the output that is expected at most; as much is read
            as that takes
        sparf: (channels, tokens), r and k of SparF as published (arXiv:2409.04992), over channel-major keys
        exact_if_cached: of a compression or target error: a drive that has the pages of all tokens in its cache
            answers by these, exact and faster, so that answers depend on what is cached; False: it never does
        counts: what the call reads on the drive is added to it
        out: (out, lse), the caller's arrays to be written to: float32 of the shapes below, writable, contiguous

        Returns `out`, or new NumPy arrays: (out float32 of queries' shape, lse float32 [num_sequences,
        num_queries, num_query_heads]); lse is the natural log of the sum of exponentials, -inf (and out zero)
        where a query sees nothing. Stored NaN and infinity propagate as IEEE arithmetic has it.

        Raises EmptySequence, InvalidArgument, DriveLacks; NvmeStatusError naming the block if one is corrupt.
        """
        reading = (compression, target_error, sparf, exact_if_cached, counts)
        scores = (scale, softcap, alibi_slopes, query_positions)
        visibility = (causal, token_ranges, window, sink_tokens)
        call = self._attend(layer, queries, sequences, visibility, scores, sinks, reading)
        return give(finish(call), out)

    def _attend(
        self, layer: int, queries, sequences, visibility, scores, sinks, reading, start: Start = at_once
    ) -> Call:
        """See attend. visibility, scores, reading: its arguments of these kinds, in its order."""
        causal, token_ranges, window, sink_tokens = visibility
        with self._lock:
            self._check_open()
            sequences = [sequences] if isinstance(sequences, Sequence) else list(sequences)
            model = common_model(sequences, self)
            geometry = model.geometry
            shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
            meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
            queries = float_array(queries, "queries", shape, meaning, geometry.numpy_dtype)
            if queries.shape[1] < 1:
                raise InvalidArgument("queries hold no query")
            layer = geometry.check_layer(layer)
            reading = reading_of(geometry, *reading)
            check_drive_has(reading.sparse, self._attention.sparse_methods)
            self._attended += sequences
            try:
                for sequence in sequences:
                    sequence._use()
                    if sequence._layers[layer].num_tokens == 0:
                        raise EmptySequence(sequence.name, layer)
                    sequence._end_finished_spills(layer)
                num_tokens = [sequence._layers[layer].num_tokens for sequence in sequences]
                ranges = visible(num_tokens, queries.shape[1], causal, token_ranges)
                scoring = scoring_of(geometry, *scores, ranges[1])
                sinks = None if sinks is None else head_array(sinks, "sinks", geometry)
                work = (model, layer, queries, sequences)
                recent, *first = windows(*ranges, window, sink_tokens)
                out, lse = yield from self._attention.call(*work, *recent, scoring, start, reading)
                for starts, stops in first:
                    sink_state = finish(self._attention.call(*work, starts, stops, scoring, at_once, reading))
                    out, lse = merge_states(out, lse, *sink_state)
                return (out, lse) if sinks is None else with_sinks(out, lse, sinks)
            finally:
                for sequence in sequences:
                    self._attended.remove(sequence)
