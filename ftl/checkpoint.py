"""Checkpoints: the map on flash, so that opening a large drive need not read the OOB of every page.

A checkpoint holds the map and a table of the superblocks as of one instant. At opening, a superblock whose
first page is still the one that the table knows holds what it held then; only superblocks that were written
since are scanned. Nothing depends on a checkpoint: without a whole one everything is scanned, with the same
result.

The payload is compressed, since long runs of a sequence's pages follow each other in the map.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from ftl.layout import CHECKPOINT_HEADER, CHECKPOINT_MAGIC, CHECKPOINT_SUPERBLOCK
from spdk_glue import dma

COMPRESSION_LEVEL = 1
PIECE_ENTRIES = 1 << 16  # of the map, compressed together


@dataclass
class Checkpoint:
    """entries: the map, uint32 or uint64 [num_lbas], page + 1, zero where unmapped
    superblocks: CHECKPOINT_SUPERBLOCK [num_superblocks]
    """

    entries: np.ndarray
    superblocks: np.ndarray
    sequence_number: int  # the next one at that instant
    program_number: int  # all programs up to it are durable and in the map; later ones may be
    session: int


def encode(checkpoint: Checkpoint, page_size: int) -> np.ndarray:
    """uint8 [num_pages, page_size]: every page with a header, so that a part that is missing shows."""
    pieces = [zlib.compress(checkpoint.superblocks.tobytes(), COMPRESSION_LEVEL)]
    for first in range(0, len(checkpoint.entries), PIECE_ENTRIES):
        part = checkpoint.entries[first : first + PIECE_ENTRIES]
        # in a run each entry is the one before plus one
        steps = np.diff(part, prepend=part.dtype.type(0))
        pieces.append(zlib.compress(steps.tobytes(), COMPRESSION_LEVEL))
    lengths = np.array([len(pieces), *map(len, pieces)], "<u4").tobytes()
    payload = np.frombuffer(lengths + b"".join(pieces), np.uint8)
    room = page_size - CHECKPOINT_HEADER.itemsize
    num_pages = -(-len(payload) // room)
    pages = dma.allocate(num_pages * page_size).reshape(num_pages, page_size)
    headers = np.zeros(num_pages, CHECKPOINT_HEADER)
    headers["magic"] = CHECKPOINT_MAGIC
    headers["part"], headers["num_parts"] = np.arange(num_pages), num_pages
    headers["payload_bytes"] = len(payload)
    headers["sequence_number"] = checkpoint.sequence_number
    headers["program_number"] = checkpoint.program_number
    headers["session"] = checkpoint.session
    pages[:, : CHECKPOINT_HEADER.itemsize] = headers.view(np.uint8).reshape(num_pages, -1)
    padded = np.zeros(num_pages * room, np.uint8)
    padded[: len(payload)] = payload
    pages[:, CHECKPOINT_HEADER.itemsize :] = padded.reshape(num_pages, room)
    return pages


def decode(pages: np.ndarray, num_lbas: int, num_superblocks: int, entry_dtype: np.dtype) -> Checkpoint | None:
    """The newest checkpoint of which all of uint8 [n, page_size] is there and well formed; None without one."""
    if not len(pages):
        return None
    headers = pages[:, : CHECKPOINT_HEADER.itemsize].copy().view(CHECKPOINT_HEADER)[:, 0]
    marked = headers["magic"] == CHECKPOINT_MAGIC
    for number in np.unique(headers["program_number"][marked])[::-1]:
        own = np.flatnonzero(marked & (headers["program_number"] == number))
        order = own[np.argsort(headers["part"][own])]
        header = headers[order[0]]
        if headers["part"][order].tolist() != list(range(int(header["num_parts"]))):
            continue
        payload = (
            pages[order, CHECKPOINT_HEADER.itemsize :].reshape(-1)[: int(header["payload_bytes"])].tobytes()
        )
        found = _parse(payload, num_lbas, num_superblocks, entry_dtype)
        if found is not None:
            return Checkpoint(*found, int(header["sequence_number"]), int(number), int(header["session"]))
    return None


def _parse(payload: bytes, num_lbas: int, num_superblocks: int, entry_dtype: np.dtype):
    """(entries, superblocks), or None for what is not of this drive."""
    if len(payload) < 4:
        return None
    count = int(np.frombuffer(payload, "<u4", 1)[0])
    start = 4 * (count + 1)
    if count < 1 or start > len(payload):
        return None
    lengths = np.frombuffer(payload, "<u4", count, 4).tolist()
    pieces = []
    try:
        for length in lengths:
            pieces.append(zlib.decompress(payload[start : start + length]))
            start += length
    except zlib.error:
        return None
    if len(pieces[0]) != num_superblocks * CHECKPOINT_SUPERBLOCK.itemsize:
        return None
    if sum(map(len, pieces[1:])) != num_lbas * entry_dtype.itemsize:
        return None
    entries = [np.cumsum(np.frombuffer(piece, entry_dtype), dtype=entry_dtype) for piece in pieces[1:]]
    return np.concatenate(entries), np.frombuffer(pieces[0], CHECKPOINT_SUPERBLOCK)
