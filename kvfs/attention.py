"""Attention over stored tokens: the drive's over those on flash, the host's over the tails, merged by lse."""

import numpy as np

from accel.merge import merge_states
from kvfs.arrays import to_query
from kvfs.attention_request import build_descriptor, parse_answer
from kvfs.errors import InvalidArgument
from kvfs.host_attention import attend_tails
from kvfs.model import Model
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import answer_bytes


class Attention:
    """worker: the host's kernels, from accel.workers."""

    def __init__(self, namespace: Namespace, worker):
        self._namespace = namespace
        self._worker = worker

    def run(self, model: Model, layer, queries, sequences, starts, stops, scale):
        """(out, lse) of checked arguments, in as many commands as the drive needs; see Store.attend."""
        limit = self._items_per_command(model, queries)
        if len(sequences) > limit:
            parts = [
                self.run(
                    model,
                    layer,
                    queries[i : i + limit],
                    sequences[i : i + limit],
                    starts[i : i + limit],
                    stops[i : i + limit],
                    scale,
                )
                for i in range(0, len(sequences), limit)
            ]
            return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        wire_queries, query_dtype = to_query(queries)
        tails = [sequence._layers[layer] for sequence in sequences]
        spilled = np.array([tail.num_spilled for tail in tails])[:, None]
        sees_flash = bool((np.minimum(stops, spilled) > starts).any())
        sees_tail = bool((stops > np.maximum(starts, spilled)).any())
        ticket = None
        if sees_flash or not sees_tail:
            parts = [sequence._drive_part(layer) for sequence in sequences]
            descriptor = build_descriptor(
                model.layout, layer, wire_queries, query_dtype, parts, starts, stops, scale
            )
            ticket = self._namespace.attention_submit(descriptor)
        if sees_tail:  # while the drive works
            host_queries = np.ascontiguousarray(queries, np.float32)
            out, lse = attend_tails(self._worker, model.layout, tails, host_queries, starts, stops, scale)
        if ticket is None:
            return out, lse
        size = answer_bytes(*queries.shape)
        answer = parse_answer(self._namespace.attention_fetch(ticket, size), queries.shape)
        return merge_states(*answer, out, lse) if sees_tail else answer

    def _items_per_command(self, model: Model, queries: np.ndarray) -> int:
        """How many sequences fit in one command of this drive."""
        capabilities = self._namespace.attention
        if queries.shape[1] > int(capabilities["max_queries"]):
            raise InvalidArgument(f"at most {int(capabilities['max_queries'])} queries, not {queries.shape[1]}")
        per_item = 8 * (queries[0].size + queries.shape[1] * queries.shape[2])
        return max(
            1, min(int(capabilities["max_items"]), int(capabilities["max_transfer_bytes"]) // (2 * per_item))
        )


def visible(sequences, layer: int, num_queries: int, causal: bool, token_ranges):
    """Visible positions of each query: int64 [num_sequences, num_queries] starts and stops."""
    limits = np.array([sequence._layers[layer].num_tokens for sequence in sequences], np.int64)[:, None]
    if token_ranges is not None:
        ranges = np.asarray(token_ranges)
        if ranges.shape != (len(sequences), num_queries, 2) or ranges.dtype.kind not in "iu":
            raise InvalidArgument(
                f"token_ranges is integers of shape {(len(sequences), num_queries, 2)}, not {ranges.shape}"
            )
        starts, stops = ranges[..., 0].astype(np.int64), ranges[..., 1].astype(np.int64)
        if (starts < 0).any() or (stops > limits).any():
            raise InvalidArgument(f"token_ranges lie within 0 and the layer's tokens ({int(limits.min())})")
        return starts, stops
    starts = np.zeros((len(sequences), num_queries), np.int64)
    behind = np.arange(num_queries - 1, -1, -1, dtype=np.int64) if causal else np.zeros(num_queries, np.int64)
    if causal and num_queries > int(limits.min()):
        raise InvalidArgument(f"{num_queries} causal queries over {int(limits.min())} tokens")
    return starts, limits - behind
