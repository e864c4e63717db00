"""From an attention mask to token ranges: the drive computes over one contiguous range per query.

Causal attention, left padding, sliding windows, chunked attention and their combinations all are such ranges.
Anything else is refused, never approximated.
"""

import numpy as np
import torch

from kvfs.engines.errors import UnsupportedMask


def causal_ranges(num_sequences, num_queries, num_past):
    """Range of each of the last `num_queries` tokens when every token sees all before it and itself.

    Returns int64 [num_sequences, num_queries, 2]: (start, stop) positions.
    """
    ranges = np.zeros((num_sequences, num_queries, 2), np.int64)
    ranges[:, :, 1] = np.arange(num_past + 1, num_past + num_queries + 1)
    return ranges


def ranges_of_mask(mask, num_sequences, num_queries, num_past):
    """Read the visible range of every query from a 4-D mask.

    mask: bool (True: visible) or float (0: visible, the dtype's minimum or -inf: hidden),
          [num_sequences or 1, num_query_heads or 1, num_queries, num_past + num_queries]

    Returns int64 [num_sequences, num_queries, 2]: (start, stop) positions, (0, 0) for a query that sees nothing
    (left padding). Raises UnsupportedMask for holes, for masks that differ between heads or add a bias, and for
    masks that do not cover the stored tokens.
    """
    num_tokens = num_past + num_queries
    if mask.ndim != 4 or mask.shape[2] != num_queries or mask.shape[3] != num_tokens:
        raise UnsupportedMask(
            f"attention mask of shape {tuple(mask.shape)} for {num_queries} new tokens after {num_past} stored "
            f"ones: expected [batch, 1, {num_queries}, {num_tokens}]"
        )
    visible = _visible(mask)
    first = visible.argmax(axis=-1)
    end = num_tokens - visible[..., ::-1].argmax(axis=-1)
    count = np.count_nonzero(visible, axis=-1)
    empty = count == 0
    if not np.array_equal(np.where(empty, 0, end - first), count):
        raise UnsupportedMask(
            "the attention mask has holes: kvfs needs one contiguous range of visible positions per query "
            "(causal, left padding, sliding window); generate() guesses a mask from pad tokens in the ids "
            "unless attention_mask is passed"
        )
    ranges = np.stack([np.where(empty, 0, first), np.where(empty, 0, end)], axis=-1).astype(np.int64)
    _check_queries_see_themselves(ranges, num_past)
    return np.broadcast_to(ranges, (num_sequences, num_queries, 2)).copy()  # torch wants it writable


class RangesMemo:
    """The ranges of the masks of the current step: all layers of a kind get the same mask object."""

    def __init__(self):
        self._num_past = None
        self._of_mask = {}  # id -> (mask, ranges); the mask is kept so that its id stays its own

    def ranges(self, mask, num_sequences, num_queries, num_past):
        """ranges_of_mask, computed once per mask and step."""
        if num_past != self._num_past:
            self._num_past = num_past
            self._of_mask.clear()
        known = self._of_mask.get(id(mask))
        if known is None:
            known = mask, ranges_of_mask(mask, num_sequences, num_queries, num_past)
            self._of_mask[id(mask)] = known
        return known[1]


def _visible(mask):
    """bool [num_sequences, num_queries, num_tokens] of a mask that is the same for all heads."""
    mask = mask.detach().cpu()
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            raise UnsupportedMask(
                "the attention mask adds a bias (ALiBi, relative positions): not supported by kvfs"
            )
        mask = ~hidden
    visible = mask.numpy()
    if visible.shape[1] > 1 and not (visible == visible[:, :1]).all():
        raise UnsupportedMask("the attention mask differs between heads: not supported by kvfs")
    return visible[:, 0]


def _check_queries_see_themselves(ranges, num_past):
    """A mask in which no new token sees itself belongs to fewer tokens than are stored: the usual cause is a
    prompt that is passed again in full although all of it is in the sequence already."""
    own_position = np.arange(num_past, num_past + ranges.shape[1])
    sees_itself = (ranges[..., 0] <= own_position) & (own_position < ranges[..., 1])
    if num_past and not sees_itself.any():
        raise UnsupportedMask(
            f"the attention mask hides all {ranges.shape[1]} new tokens behind the {num_past} stored ones: "
            "pass the ids and the mask of the whole sequence (stored and new), or crop() the cache first"
        )
