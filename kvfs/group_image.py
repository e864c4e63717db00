"""Group images: one layer's share of a token group in host memory, byte for byte as it lies on flash.

The host's tail is kept as images, so a spill writes them as they are and the attention kernels read the
tail as they read pages. These kernels move rows between images and token-major arrays; rows are opaque
words, so one pair serves every dtype.
"""

import numpy as np
from numba import njit

from accel.quantized_pages import decode_pages
from kvfs.layout import GroupLayout
from kvfs.streaming_store import PIECE_BYTES, copy_piece, finish_pieces
from spdk_glue import dma
from spdk_glue.vendor_command import DTYPE_OF_NAME


@njit(nogil=True, cache=True)
def _pack(rows, image, first_row, per_page, row_words):
    num_tokens, num_heads = rows.shape[0], rows.shape[1]
    page, row = divmod(first_row, per_page)
    for token in range(num_tokens):
        start = row * row_words
        for head in range(num_heads):
            for word in range(row_words):  # a loop, not a slice: no view is made per row
                image[head, page, start + word] = rows[token, head, word]
        row += 1
        if row == per_page:
            page, row = page + 1, 0


@njit(nogil=True, cache=True)
def _pack_streaming(rows, image, first_row, per_page, row_words):
    """As _pack, past the caches, for many tokens. Each page is written in one go: its stores fill lines."""
    num_tokens, num_heads = rows.shape[0], rows.shape[1]
    row_bytes = 8 * row_words
    source, target = np.int64(rows.ctypes.data), np.int64(image.ctypes.data)
    head_stride, page_stride = image.strides[0], image.strides[1]
    token = 0
    while token < num_tokens:
        page, row = divmod(first_row + token, per_page)
        count = min(per_page - row, num_tokens - token)
        for head in range(num_heads):
            to = target + head * head_stride + page * page_stride + row * row_bytes
            for t in range(token, token + count):
                start = source + (t * num_heads + head) * row_bytes
                for offset in range(0, row_bytes, PIECE_BYTES):
                    copy_piece(to + offset, start + offset)
                to += row_bytes
        token += count
    finish_pieces()


@njit(nogil=True, cache=True)
def _unpack(rows, image, first_row, per_page, row_words):
    num_tokens, num_heads = rows.shape[0], rows.shape[1]
    page, row = divmod(first_row, per_page)
    for token in range(num_tokens):
        start = row * row_words
        for head in range(num_heads):
            for word in range(row_words):
                rows[token, head, word] = image[head, page, start + word]
        row += 1
        if row == per_page:
            page, row = page + 1, 0


class ImagePool:
    """Images that are not in use, kept because touching fresh memory costs more than filling it.

    Fresh ones are cut from pieces of a huge page or more. An image comes back with its old rows. They are
    never written to flash: only whole pages are, and slack is never anything but zero.
    """

    def __init__(self, capacity_bytes: int):
        self._capacity_bytes = capacity_bytes
        self._idle: dict[GroupLayout, list[np.ndarray]] = {}
        self._idle_bytes = 0
        self.used_bytes = 0  # of images that were taken and not given back

    def take(self, layout: GroupLayout) -> np.ndarray:
        """An image, uint8 [num_kv_heads, 2, pages_per_head, page_size], aligned to its pages."""
        self.used_bytes += layout.image_bytes
        idle = self._idle.setdefault(layout, [])
        if not idle:
            num_images = max(1, dma.HUGE_PAGE // layout.image_bytes)
            idle.extend(dma.allocate(num_images * layout.image_bytes).reshape(num_images, *layout.image_shape))
            self._idle_bytes += num_images * layout.image_bytes
        self._idle_bytes -= layout.image_bytes
        return idle.pop()

    def give_back(self, layout: GroupLayout, image: np.ndarray) -> None:
        """The caller must not use the image any more."""
        self.used_bytes -= layout.image_bytes
        if self._idle_bytes + layout.image_bytes <= self._capacity_bytes:
            self._idle.setdefault(layout, []).append(image)
            self._idle_bytes += layout.image_bytes


def _words(layout: GroupLayout, image: np.ndarray, rows: np.ndarray, kind: int):
    # head_dim is a multiple of 8, so a row of any dtype is whole pieces of 16 bytes
    words = image[:, kind].view(np.uint64)
    return rows.view(np.uint64), words, layout.tokens_per_page, layout.row_bytes // 8


def pack(layout: GroupLayout, image: np.ndarray, first_row: int, keys: np.ndarray, values: np.ndarray) -> None:
    """Put tokens into an image from row `first_row` of its group on.

    keys, values: [num_tokens, num_kv_heads, head_dim] of the storage dtype, C-contiguous.
    """
    # a few tokens are soon read again by attention over the tail: they stay in the caches
    store = _pack_streaming if len(keys) >= layout.tokens_per_page else _pack
    for kind, rows in enumerate((keys, values)):
        source, words, per_page, row_words = _words(layout, image, rows, kind)
        store(source, words, first_row, per_page, row_words)


def unpack(
    layout: GroupLayout, image: np.ndarray, first_row: int, keys: np.ndarray, values: np.ndarray
) -> None:
    """The reverse of `pack`: fill keys and values from an image."""
    for kind, rows in enumerate((keys, values)):
        target, words, per_page, row_words = _words(layout, image, rows, kind)
        _unpack(target, words, first_row, per_page, row_words)


def decode(
    layout: GroupLayout, pages: np.ndarray, first_row: int, keys: np.ndarray, values: np.ndarray
) -> None:
    """As `unpack`, from quantized pages, uint8 [num_kv_heads, K | V, num_pages, page_size]."""
    geometry = layout.geometry
    rows = decode_pages(pages.reshape(-1, layout.page_size), DTYPE_OF_NAME[geometry.dtype], geometry.head_dim)
    of_heads = rows.reshape(geometry.num_kv_heads, 2, -1, geometry.head_dim)
    for kind, target in enumerate((keys, values)):
        target[:] = of_heads[:, kind, first_row : first_row + len(target)].swapaxes(0, 1)
