"""Delayed writeback: the newest tokens of one sequence and layer, in host memory.

Tokens collect in group images. Once `writeback_tokens` of them make whole pages (or the group is full)
those pages are spilled: written to the group's blocks as they lie in the image, or quantized. A spill runs in
the background; until it has completed, its tokens count as tail. The host attends over the tail, the drive over
what has been spilled. Source: INF2, arXiv:2502.09921.

A group that went out in small pieces lies scattered on the flash, and reads slowly. When it is full its image
goes out once more, in one run: the same bytes to the same blocks, so any copy that a power cut leaves is right.

States of a token of one layer, by position: [0, num_spilled) on flash, [num_spilled, num_submitted) on its
way there, [num_submitted, num_tokens) only here.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from accel.quantized_pages import encode_pages
from kvfs import group_image
from kvfs.group_image import ImagePool
from kvfs.layout import GroupLayout
from spdk_glue import dma
from spdk_glue.namespace import Pending
from spdk_glue.vendor_command import DTYPE_OF_NAME

LONG_RUN_BYTES = 256 << 10  # pieces from here on read as fast as a whole group: knee of `bench writeback`


@dataclass
class Spill:
    """Pages on their way to flash; `stop` is one past the last token that they hold."""

    pending: Pending
    stop: int
    num_bytes: int
    is_under_way: bool = True


class LayerTail:
    """One layer's tail. `images` maps a group position to its image, for groups not wholly on flash."""

    def __init__(self, layout: GroupLayout, pool: ImagePool, num_tokens: int = 0):
        self._layout = layout
        self._image_layout = layout.in_memory
        self._pool = pool
        self._first_token = num_tokens  # the images have none before it
        self.num_tokens = num_tokens
        self.num_submitted = num_tokens
        self.num_spilled = num_tokens
        self.images: dict[int, np.ndarray] = {}
        self.spills: deque[Spill] = deque()

    def clear(self) -> None:
        """Give the images back; the tail is of no use afterwards."""
        while self.images:
            self._pool.give_back(self._image_layout, self.images.popitem()[1])

    def pack(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Take in tokens [num_tokens, num_kv_heads, head_dim] that fit in the current group."""
        group_tokens = self._layout.geometry.group_tokens
        position, row = divmod(self.num_tokens, group_tokens)
        assert row + len(keys) <= group_tokens
        image = self.images.get(position)
        if image is None:
            image = self.images[position] = self._pool.take(self._image_layout)
        group_image.pack(self._image_layout, image, row, keys, values)
        self.num_tokens += len(keys)

    def refill(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Take in tokens that were stored before, of any number of groups."""
        group_tokens = self._layout.geometry.group_tokens
        start = 0
        while start < len(keys):
            count = min(group_tokens - self.num_tokens % group_tokens, len(keys) - start)
            part = slice(start, start + count)
            self.pack(np.ascontiguousarray(keys[part]), np.ascontiguousarray(values[part]))
            start += count

    def spillable(self, writeback_tokens: int) -> tuple[int, int, int, int] | None:
        """(group position, first page, stop page, stop token) that is due for writing, or None."""
        group_tokens, per_page = self._layout.geometry.group_tokens, self._layout.tokens_per_page
        position, row = divmod(self.num_submitted, group_tokens)
        stop_row = min(self.num_tokens - position * group_tokens, group_tokens)
        if stop_row < group_tokens:
            stop_row -= stop_row % per_page
            if stop_row - row < writeback_tokens:
                return None
        if stop_row <= row:
            return None
        first_page = row // per_page
        stop_page = -(-stop_row // per_page)
        is_whole = stop_row == group_tokens and position * group_tokens >= self._first_token
        if is_whole and not self._layout.geometry.is_quantized:  # which rows coded before would be coded anew
            piece_bytes = self._layout.image_bytes * max(writeback_tokens, per_page) // group_tokens
            if piece_bytes < LONG_RUN_BYTES:
                first_page = 0
        return position, first_page, stop_page, position * group_tokens + stop_row

    def extents(self, base_lba: int, position: int, first_page: int, stop_page: int):
        """(LBA, buffer) pairs of some pages of every head; base_lba: of this layer in the group."""
        per_head = self._layout.pages_per_head
        if self._layout.geometry.is_quantized:
            pages = self._quantized(position, first_page, stop_page)
        else:
            pages = self.images[position][:, :, first_page:stop_page]
        if first_page == 0 and stop_page == per_head:
            return [(base_lba, pages.reshape(-1))]
        return [
            (base_lba + (2 * head + kind) * per_head + first_page, pages[head, kind].reshape(-1))
            for head in range(self._layout.geometry.num_kv_heads)
            for kind in (0, 1)
        ]

    def _quantized(self, position: int, first_page: int, stop_page: int) -> np.ndarray:
        """uint8 [num_kv_heads, 2, num_pages, page_size]: those pages of a group as they are to lie on flash.

        The image's rows become what comes back of these pages: what is attended over while they are on their
        way is what will be when they have arrived.
        """
        layout, image_layout = self._layout, self._image_layout
        geometry, per_page = layout.geometry, layout.tokens_per_page
        first_row = first_page * per_page
        num_rows = min(stop_page * per_page, geometry.group_tokens) - first_row
        shape = (geometry.num_kv_heads, 2, stop_page - first_page, layout.page_size)
        pages = dma.allocate(math.prod(shape)).reshape(shape)
        encode_pages(
            self.images[position].reshape(-1, image_layout.pages_per_head, layout.page_size),
            image_layout.tokens_per_page,
            first_row,
            num_rows,
            DTYPE_OF_NAME[geometry.dtype],
            geometry.head_dim,
            pages.reshape(-1, *shape[2:]),
        )
        kv_shape = (num_rows, geometry.num_kv_heads, geometry.head_dim)
        keys, values = (np.empty(kv_shape, geometry.numpy_dtype) for _ in range(2))
        group_image.decode(layout, pages, 0, keys, values)
        group_image.pack(image_layout, self.images[position], first_row, keys, values)
        return pages

    def image_addresses(self) -> tuple[int, list[int]]:
        """(group position, address of its image and of those behind it) of the first token not on flash."""
        group_tokens = self._layout.geometry.group_tokens
        first = self.num_spilled // group_tokens
        stop = -(-self.num_tokens // group_tokens) if self.num_tokens > self.num_spilled else first
        return first, [dma.address_of(self.images[position]) for position in range(first, stop)]

    def take_oldest_spill(self) -> Spill:
        """It counts as under way no longer; the caller waits for it."""
        spill = self.spills.popleft()
        spill.is_under_way = False
        return spill

    def completed(self, spill: Spill) -> None:
        """A spill has reached the flash: its tokens are the drive's, whole groups leave memory."""
        self.num_spilled = spill.stop
        whole = self.num_spilled // self._layout.geometry.group_tokens
        for position in [p for p in self.images if p < whole]:
            self._pool.give_back(self._image_layout, self.images.pop(position))

    def read(self, start: int, stop: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Copy tokens [start, stop), all at or past num_spilled, into [stop - start, heads, head_dim]."""
        group_tokens = self._layout.geometry.group_tokens
        position = start
        while position < stop:
            group, row = divmod(position, group_tokens)
            count = min(group_tokens - row, stop - position)
            part = slice(position - start, position - start + count)
            group_image.unpack(self._image_layout, self.images[group], row, keys[part], values[part])
            position += count
