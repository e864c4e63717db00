"""SEAL_GROUPS: token groups that no longer change are rewritten in order, or coded for sparse attention.

What is derived is read from the groups' pages, past the DRAM cache, and written to blocks that the host names.
It is made by one thread of low priority, a layer of a segment at a time: attention goes first, and memory stays
bounded. Nothing is locked meanwhile; the host sees to it that nobody writes to the groups or the targets.
"""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from accel.block_commands import flash_errors_as_status
from accel.descriptor import widen
from accel.quantized_pages import decode_pages
from accel.seal_request import SealRequest, Segment
from ftl.mapping import PAGE_NONE
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import QUANTIZED, Derive, row_bytes, tokens_per_page

log = logging.getLogger(__name__)

COMPACTION_BYTES = 8 << 20  # moved at a time: long runs, bounded memory
LOW_PRIORITY = 19  # added to the process's nice value; Linux ends at 19


def _encoder(derive: Derive) -> Callable[[np.ndarray, np.ndarray, DerivedLayout], np.ndarray]:
    from accel.sketch.encoder import encode  # which compile what they need
    from accel.sparf.channel_major import encode_channel_major

    return encode if derive == Derive.SKETCH else encode_channel_major


@dataclass
class SealingCounters:
    """Since the drive was opened. Pages are read from and written to flash; segments are whole ones or
    parts."""

    commands: int = 0
    segments: int = 0
    pages_read: int = 0
    pages_written: int = 0
    refused: int = 0  # not finite, for example


class Sealing:
    """in_background: False: done where it is asked for, so that the drive does the same thing each time."""

    def __init__(self, ftl: FlashTranslationLayer, in_background: bool):
        self._ftl = ftl
        self._in_background = in_background
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self.counters = SealingCounters()

    def seal(self, data: np.ndarray) -> None:
        """Do what a SEAL_GROUPS' data say. Raises CommandFailed."""
        request = SealRequest.read(data, self._ftl.page_size, self._ftl.num_lbas)
        if not self._in_background:
            self._run(request)
            return
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "kvfs-sealing", initializer=_go_last)
        self._thread.submit(self._run, request).result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _run(self, request: SealRequest) -> None:
        self.counters.commands += 1
        with flash_errors_as_status(Status.WRITE_FAULT):
            if request.derive == Derive.COMPACT:
                self._compact(request)
                return
            for segment in request.segments:
                for layer in range(request.num_layers):
                    self._derive_layer(request, segment, layer)
                self.counters.segments += 1

    # compaction

    def _compact(self, request: SealRequest) -> None:
        """Rewrite groups so that each layer's pages are physical neighbours again."""
        for layer in range(request.num_layers):
            lbas = request.layer_lbas_of(request.bases, layer)
            lbas = lbas[self._ftl.resolve(lbas) != PAGE_NONE]
            step = COMPACTION_BYTES // self._ftl.page_size
            for start in range(0, len(lbas), step):
                part = lbas[start : start + step]
                _, addresses = self._read(part)
                self._ftl.write(part, addresses, stream=request.placement_id)

    def _read(self, lbas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, addresses of the pages in them)"""
        buffer = dma.allocate(len(lbas) * self._ftl.page_size)
        addresses = dma.page_addresses(buffer, self._ftl.page_size)
        self._ftl.read(lbas, addresses)
        return buffer, addresses

    # what sparse attention reads

    def _derive_layer(self, request: SealRequest, segment: Segment, layer: int) -> None:
        page_size = self._ftl.page_size
        layout = request.layout(segment)
        lbas = request.layer_lbas_of(segment.bases, layer)
        absent = self._ftl.resolve(lbas) == PAGE_NONE
        if absent.any():
            raise CommandFailed(
                Status.DEALLOCATED_BLOCK, lba=int(lbas[np.argmax(absent)]), detail="page never written"
            )
        source, _ = self._read(lbas)
        pages = source.reshape(len(segment.bases), request.num_kv_heads, 2, -1, page_size)
        target = dma.allocate(layout.layer_lbas * page_size)
        encode = _encoder(request.derive)
        for head in range(request.num_kv_heads):
            keys, values = (_rows(pages[:, head, kind], request) for kind in (0, 1))
            try:
                derived = encode(keys, values, layout)
            except ValueError as error:
                self.counters.refused += 1
                log.info("layer %d, KV head %d from LBA %d on: %s", layer, head, lbas[0], error)
                detail = f"layer {layer}, KV head {head}"
                raise CommandFailed(Status.CANNOT_BE_SEALED, lba=int(lbas[0]), detail=detail) from error
            _place(derived, target.reshape(-1, page_size), layout, head)
        first = segment.target + layout.layer_lbas * layer
        targets = np.arange(first, first + layout.layer_lbas)
        self._ftl.write(targets, dma.page_addresses(target, page_size), stream=request.placement_id)
        self.counters.pages_read += len(lbas)
        self.counters.pages_written += len(targets)


def _rows(pages: np.ndarray, request: SealRequest) -> np.ndarray:
    """float32 [num_tokens, head_dim]: what one head's pages hold, uint8 [num_groups, pages_per_head,
    page_size]."""
    num_groups, per_head, page_size = pages.shape
    head_dim, dtype = request.head_dim, request.dtype
    page_rows = tokens_per_page(page_size, head_dim, dtype)
    flat = pages.reshape(-1, page_size)
    if dtype in QUANTIZED:
        rows = decode_pages(flat, dtype, head_dim)
    else:
        rows = widen(np.ascontiguousarray(flat[:, : page_rows * row_bytes(head_dim, dtype)]).reshape(-1), dtype)
    rows = rows.reshape(num_groups, per_head * page_rows, head_dim)[:, : request.group_tokens]
    return np.ascontiguousarray(rows, np.float32).reshape(-1, head_dim)


def _place(derived: np.ndarray, target: np.ndarray, layout: DerivedLayout, head: int) -> None:
    """Put a head's pages where they lie among its layer's."""
    first = layout.index_lba(0, head)
    target[first : first + layout.index_pages] = derived[: layout.index_pages]
    first = layout.refinement_lba(0, head)
    target[first : first + layout.refinement_pages] = derived[layout.index_pages :]


def _go_last() -> None:
    """Of this thread, on Linux: the scheduler prefers the others."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + LOW_PRIORITY)
