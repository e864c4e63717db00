"""Reading single heads of a sequence in one batch, without waiting for anyone: rows as stored, or dequantized.

A head's pages in a group are consecutive, and heads and layers follow each other: pieces in that order are one
extent per group. Where no page has slack and whole pages are wanted, flash is read to where the result lies:
nothing is copied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from accel.quantized_pages import decode_pages
from kvfs.errors import InvalidArgument
from kvfs.files.buffer_pool import BufferPool
from kvfs.head_pieces import KEYS, VALUES, HeadRows
from kvfs.layout import GroupLayout
from kvfs.metadata import GroupRow
from kvfs.tail import LayerTail
from spdk_glue.vendor_command import DTYPE_OF_NAME

KEPT_BYTES = 16 << 20  # of idle buffers of each size

_buffers = BufferPool(KEPT_BYTES)


class _Run(NamedTuple):
    """Rows on consecutive pages of one head in one group. image: these pages; None: on flash at `lba`."""

    lba: int
    image: np.ndarray | None
    num_pages: int
    first_row: int  # within the first page
    num_rows: int


class HeadBatch:
    """What one read takes from flash and from tails. Made under the store's lock, filled and used without."""

    def __init__(
        self,
        layout: GroupLayout,
        groups: list[GroupRow],
        layers: list[LayerTail],
        pieces: Sequence[HeadRows],
    ):
        self._layout = layout
        self._num_rows = sum(piece.stop - piece.start for piece in pieces)
        self._runs = [run for piece in pieces for run in self._runs_of(piece, groups, layers[piece.layer])]
        # without slack, pages that follow each other are the rows that follow each other
        self._is_direct = _has_no_slack(layout) and (len(pieces) == 1 or self._are_whole_pages())
        num_pages = sum(run.num_pages for run in self._runs)
        self._lease = _buffers.take(max(1, num_pages) * layout.page_size)
        self._pages = self._lease.reshape(-1, layout.page_size)
        self.extents: list[tuple[int, np.ndarray]] = []  # (LBA, where to read it to)
        page = first = next_lba = 0  # an extent begins at page `first`
        for run in self._runs:
            if run.lba != next_lba:
                self._add_extent(next_lba, first, page)
                first = page
            if run.image is not None:
                self._pages[page : page + run.num_pages] = run.image
            page += run.num_pages
            next_lba = 0 if run.image is not None else run.lba + run.num_pages
        self._add_extent(next_lba, first, page)

    def _add_extent(self, end_lba: int, first: int, stop: int) -> None:
        """Pages [first, stop) are those that end at `end_lba`; 0: they are there already."""
        if end_lba and first < stop:
            self.extents.append((end_lba - (stop - first), self._pages[first:stop]))

    def _are_whole_pages(self) -> bool:
        """Of all runs; the last may end within one."""
        per_page = self._layout.tokens_per_page
        return all(run.first_row == 0 for run in self._runs) and all(
            run.num_rows == run.num_pages * per_page for run in self._runs[:-1]
        )

    def _runs_of(self, piece: HeadRows, groups: list[GroupRow], tail: LayerTail):
        layout = self._layout
        group_tokens = layout.geometry.group_tokens
        head_pages = piece.layer * layout.layer_lbas + (2 * piece.head + piece.kind) * layout.pages_per_head
        token = piece.start
        while token < piece.stop:
            group, row = divmod(token, group_tokens)
            is_on_flash = token < tail.num_spilled
            limit = min(piece.stop, tail.num_spilled) if is_on_flash else piece.stop
            num_rows = min(group_tokens - row, limit - token)
            per_page = (layout if is_on_flash else layout.in_memory).tokens_per_page
            page, first_row = divmod(row, per_page)
            num_pages = -(-(first_row + num_rows) // per_page)
            if is_on_flash:
                yield _Run(groups[group].base_lba + head_pages + page, None, num_pages, first_row, num_rows)
            else:
                image = tail.images[group][piece.head, piece.kind, page : page + num_pages]
                yield _Run(0, image, num_pages, first_row, num_rows)
            token += num_rows

    def rows(self) -> memoryview:
        """The wanted rows one after another, once the extents have been read."""
        row_bytes = self._layout.row_bytes
        if self._is_direct:
            start = self._runs[0].first_row * row_bytes if self._runs else 0
            return memoryview(self._lease)[start : start + self._num_rows * row_bytes]
        rows = np.empty((self._num_rows, row_bytes), np.uint8)
        page = row = 0
        for run in self._runs:
            there = self._page_rows(self._pages[page : page + run.num_pages], is_on_flash=run.image is None)
            rows[row : row + run.num_rows] = there[run.first_row :][: run.num_rows]
            page, row = page + run.num_pages, row + run.num_rows
        return memoryview(rows.reshape(-1))

    def _page_rows(self, pages: np.ndarray, is_on_flash: bool) -> np.ndarray:
        """uint8 [num_rows, row_bytes]: all rows of some pages."""
        geometry, row_bytes = self._layout.geometry, self._layout.row_bytes
        if is_on_flash and geometry.is_quantized:
            rows = decode_pages(pages, DTYPE_OF_NAME[geometry.dtype], geometry.head_dim)
            return rows.view(np.uint8).reshape(-1, row_bytes)
        return pages[:, : self._layout.in_memory.tokens_per_page * row_bytes].reshape(-1, row_bytes)


def _has_no_slack(layout: GroupLayout) -> bool:
    if layout.geometry.is_quantized:
        return False
    return layout.pages_per_head * layout.page_size == layout.geometry.group_tokens * layout.row_bytes


def check(layout: GroupLayout, layers: list[LayerTail], piece: HeadRows) -> None:
    """Raises InvalidArgument for rows that the sequence does not have."""
    geometry = layout.geometry
    if not 0 <= piece.layer < geometry.num_layers or not 0 <= piece.head < geometry.num_kv_heads:
        raise InvalidArgument(f"no layer {piece.layer} with KV head {piece.head}")
    if piece.kind not in (KEYS, VALUES):
        raise InvalidArgument(f"kind is 0 for keys or 1 for values, not {piece.kind!r}")
    limit = layers[piece.layer].num_tokens
    if not 0 <= piece.start <= piece.stop <= limit:
        raise InvalidArgument(f"tokens [{piece.start}, {piece.stop}) of a layer that has {limit}")
