"""Approximate scores of SparF on the core: chosen channels of channel-major keys, a row of tokens for each.

What ranks tokens, and what is done with the ranks, is the drive's: see DESIGN.md.
"""

import numpy as np

from accel.fpga.model import channel_scores, quantised

ELEMENT_BYTES = 2


def fill(core, dtype: int, pages, num_tokens: int, page_size: int, weights, scores) -> bool:
    """As accel.sparf.kernels.approximate_scores, on a core with `shape` and `weigh_channels`. False: an element
    is not finite, and `scores` are of no use."""
    shape = core.shape
    most = shape.lanes * shape.max_beats
    num_rows, num_channels = weights.shape
    if not num_channels:
        scores[:] = 0
        return True
    one = np.ones(num_channels, np.uint32)
    for first_row in range(0, num_rows, shape.rows):
        rows = slice(first_row, min(first_row + shape.rows, num_rows))
        count = rows.stop - rows.start
        words, exponents = quantised(np.asarray(weights[rows], np.float64))
        of_channel = np.zeros((num_channels, shape.lanes // 2), np.int32)  # a beat each
        of_channel[:, :count] = words.T
        addresses = of_channel.ctypes.data + np.arange(num_channels) * of_channel.strides[0]
        for first in range(0, num_tokens, most):
            stop = min(first + most, num_tokens)
            page, place = divmod(first * ELEMENT_BYTES, page_size)
            beats = -(-(stop - first) // shape.lanes)
            result = core.weigh_channels(dtype, beats, one, addresses, pages[:, page] + np.uint64(place))
            if result.status:
                return False
            padded = np.zeros(shape.rows, np.int64)
            padded[:count] = exponents
            scores[rows, first:stop] = channel_scores(result, padded)[:count, : stop - first]
    return True
