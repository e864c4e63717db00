"""One attention call over the drives of a set: each has its part before any is waited for."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from kvfs.arrays import Array, Pair, float_array, give
from kvfs.attention import Asked, at_once, finish
from kvfs.attention_scores import head_array, scoring_of, with_sinks
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.drive_set.shares import shares_of
from kvfs.errors import EmptySequence, InvalidArgument, KvfsError
from kvfs.sparse import PageCounts, reading_of
from kvfs.telemetry.requests import request
from kvfs.visible_tokens import common_model, range_array, visible, windows
from spdk_glue.request_id import carried
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)


class SetAttention:
    """A part of DriveSet."""

    @request("attend")
    def attend(
        self,
        layer: int,
        queries: Array,
        sequences: "SetSequence | Sequence[SetSequence]",
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
        """As kvfs.Store.attend: every drive has its part before the first is waited for."""
        with self._lock:
            self._check_open()
            sequences = [sequences] if isinstance(sequences, SetSequence) else list(sequences)
            geometry = common_model(sequences, self).geometry
            shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
            meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
            queries = float_array(queries, "queries", shape, meaning, geometry.numpy_dtype)
            if queries.shape[1] < 1:
                raise InvalidArgument("queries hold no query")
            layer = geometry.check_layer(layer)
            for sequence in sequences:
                sequence._use()
                if sequence.layer_tokens(layer) == 0:
                    raise EmptySequence(sequence.name, layer)
            # what is wrong is said of the whole, before any drive has its part
            num_tokens = [sequence.layer_tokens(layer) for sequence in sequences]
            ranges = visible(num_tokens, queries.shape[1], causal, token_ranges)
            windows(*ranges, window, sink_tokens)
            scoring_of(geometry, scale, softcap, alibi_slopes, query_positions, ranges[1])
            reading = (compression, target_error, sparf, exact_if_cached, counts)
            reading_of(geometry, *reading)
            sinks = None if sinks is None else head_array(sinks, "sinks", geometry)
            if token_ranges is not None:
                token_ranges = range_array(token_ranges, *queries.shape[:2])
            if alibi_slopes is not None:
                alibi_slopes = head_array(alibi_slopes, "alibi_slopes", geometry)

            def work(share, start):
                of_items = [
                    None if array is None else np.asarray(array)[share.items]
                    for array in (token_ranges, query_positions)
                ]
                slopes = None if alibi_slopes is None else alibi_slopes[share.query_heads]
                visibility = (causal, of_items[0], window, sink_tokens)
                scores = (scale, softcap, slopes, of_items[1])
                part_queries = queries[share.items][:, :, share.query_heads]
                return share.member.store._attend(
                    layer, part_queries, share.parts, visibility, scores, None, reading, start
                )

            state = self._gather(shares_of(self, sequences, layer), work, queries.shape)
            return give(state if sinks is None else with_sinks(*state, sinks), out)

    def _gather(self, shares, work: Callable, shape) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of all shares; `work` makes a share's call.

        Each drive is given its work by a thread of its own: what is small it computes there and then.
        """
        start = self._start if len(shares) > 1 and self._in_threads else at_once
        out, lse = np.empty(shape, np.float32), np.empty(shape[:-1], np.float32)
        calls = []
        try:
            for share in shares:
                with share.member.in_use(share.holding):
                    call = work(share, start)
                    next(call)
                calls.append(call)
            begun = time.perf_counter()  # what a drive has answered by now nobody waits for
            self._turn += 1
            first = self._turn % len(shares)
            for number in [*range(first, len(shares)), *range(first)]:
                share = shares[number]
                with share.member.in_use(share.holding):
                    answer = finish(calls[number])
                out[share.items, :, share.query_heads], lse[share.items, :, share.query_heads] = answer
                if number == first:
                    self._note_latency(share, time.perf_counter() - begun)
        except BaseException:
            for call in calls:
                with suppress(KvfsError, NvmeError):
                    call.close()
            raise
        return out, lse

    def _start(self, work: Callable[[], Asked]) -> Callable[[], Asked]:
        return self._threads.submit(carried(work)).result

    def _note_latency(self, share, seconds: float) -> None:
        if not share.num_bytes:
            return  # its tokens were in this process's memory
        member = share.member
        member.latency.note(seconds, share.num_bytes)
        others = [other.latency for other in self._live if other is not member]
        if member.latency.becomes_slow(others):
            log.warning(
                "drive %s is slow: it takes %.1f ms a call, %.1f times as long per byte as the others, which"
                " wait for it",
                member.location,
                member.latency.seconds * 1e3,
                member.latency.compare(others),
            )
