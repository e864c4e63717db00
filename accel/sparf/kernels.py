"""SparF over pages: approximate scores from channel-major ones, runs of chosen tokens in token-major ones."""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit

from accel.workers import micro_kernels, vector_ir
from accel.workers.micro_kernels import add_block, score_stride
from accel.workers.target import Target, host_target
from spdk_glue.derived_layout import channel_bytes
from spdk_glue.vendor_command import KvDtype

TILE_TOKENS = 64  # scores of a few heads for so many tokens stay in registers; divides what a page holds
HEADS_MAX = 8
_STORED = {KvDtype.FLOAT32: vector_ir.FLOAT32, KvDtype.BFLOAT16: vector_ir.BFLOAT16}
_EMITTERS = zlib.crc32(b"".join(Path(module.__file__).read_bytes() for module in (micro_kernels, vector_ir)))


@cache
def _scorer(dtype: int, heads: int, lanes: int, accumulators: int, converts_half: int):
    """To `add_block` a channel is a row of tokens: the sums it makes of weighted rows are scores."""
    emitters = _EMITTERS
    stride = score_stride(heads)
    item = vector_ir.ITEM_BITS[dtype] // 8
    tile = TILE_TOKENS
    # bfloat16 is widened into even and odd channels, see load_pairs; here these are tokens
    pairs = micro_kernels.load_pairs(dtype, tile, lanes)

    @njit(nogil=True, cache=True, boundscheck=False)
    def score(pages, page_size, weights, scores):
        emitters  # noqa: B018 - makes it part of the key
        num_rows, num_channels = weights.shape
        num_tokens = scores.shape[1]
        rows = np.zeros(num_channels + 8, np.int64)
        of_heads = np.zeros((num_channels + 8, stride), np.float32)
        factor = np.zeros(max(stride, 16), np.float32)
        sums = np.empty((heads, tile), np.float32)
        for first_row in range(0, num_rows, heads):
            count = min(heads, num_rows - first_row)
            for channel in range(num_channels):
                for head in range(stride):
                    of_heads[channel, head] = weights[first_row + head, channel] if head < count else 0
            for first in range(0, num_tokens, tile):
                page, place = divmod(first * item, page_size)
                for channel in range(num_channels):
                    rows[channel] = np.int64(pages[channel, page]) + place
                rows[num_channels:] = rows[num_channels - 1]
                sums[:] = 0
                at = np.int64(rows.ctypes.data)
                add_block(
                    at, at, num_channels, np.int64(of_heads.ctypes.data), np.int64(factor.ctypes.data),
                    np.int64(sums.ctypes.data), np.int64(0),
                    dtype, tile, heads, lanes, accumulators, converts_half,
                )  # fmt: skip
                stop = min(num_tokens - first, tile)
                for head in range(count):
                    if pairs:
                        for token in range(stop):
                            group, within = divmod(token, 2 * lanes)
                            column = group * 2 * lanes + within // 2 + (within % 2) * lanes
                            scores[first_row + head, first + token] = sums[head, column]
                    else:
                        for token in range(stop):
                            scores[first_row + head, first + token] = sums[head, token]

    return score


def approximate_scores(
    pages: np.ndarray,
    num_tokens: int,
    page_size: int,
    dtype: KvDtype,
    weights: np.ndarray,
    scores: np.ndarray,
    target: Target | None = None,
) -> None:
    """scores[row, token] = sum over channels of weights[row, channel] * K[token, channel], for one segment.

    pages: uint64 [num_channels, pages_per_channel], addresses of the chosen channels' pages
    dtype: of the layout; weights: float32 [num_rows, num_channels]
    scores: float32 [num_rows, num_tokens], filled; rows may be apart. Does not hold the GIL.
    target: the machine's own if None (others: for tests)
    """
    assert scores.shape == (len(weights), num_tokens)
    assert page_size % (TILE_TOKENS * channel_bytes(dtype)) == 0
    if len(pages) == 0:
        scores[:] = 0
        return
    target = target or host_target()
    heads = min(score_stride(len(weights)), HEADS_MAX)
    stored = _STORED.get(dtype, vector_ir.FLOAT16)
    score = _scorer(stored, heads, target.lanes, target.accumulators, int(target.converts_half))
    score(pages, page_size, weights, scores)


def bend_scores(
    scores: np.ndarray,
    first_token: int,
    start: np.ndarray,
    stop: np.ndarray,
    softcap: float = 0.0,
    slopes: np.ndarray | None = None,
    position: np.ndarray | None = None,
) -> None:
    """Makes approximate scores of one segment what the command's scores are, in place.

    scores: float32 [num_rows, num_tokens], of tokens first_token and on; start, stop: int64 [num_rows], what a
    row sees (other tokens get -inf); slopes: float32 [num_rows] or None; position: int64 [num_rows]
    """
    positions = first_token + np.arange(scores.shape[1])
    if softcap > 0:
        scores /= softcap
        np.tanh(scores, out=scores)
        scores *= softcap
    if slopes is not None and len(slopes):
        scores -= slopes[:, None] * (position[:, None] - positions)
    scores[(positions < start[:, None]) | (positions >= stop[:, None])] = -np.inf


def chosen_runs(chosen: np.ndarray, tokens_per_page: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chosen tokens as runs of rows within pages.

    chosen: bool [num_tokens], tokens that lie in pages of tokens_per_page rows, the first in row 0
    Returns (page int64 [num_runs], first_row int32, stop_row int32), in the order of tokens: of an
    AttentionBatch, a run's page with page_first_row and page_num_tokens.
    """
    tokens = np.flatnonzero(chosen)
    page, row = np.divmod(tokens, tokens_per_page)
    is_first = np.append(True, (np.diff(tokens) != 1) | (np.diff(page) != 0))[: len(tokens)]
    is_last = np.append(is_first[1:], True)[: len(tokens)]
    return page[is_first], row[is_first].astype(np.int32), (row[is_last] + 1).astype(np.int32)
