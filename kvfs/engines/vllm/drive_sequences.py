"""The drive's copy of what vLLM's batches attend over: a sequence for each request.

An attention layer sees no request, only the blocks that its tokens are in. Without prefix caching no two
requests share a block, so a request is known by its first one; another request that gets that block later
begins there with its first token.
"""

import itertools
import logging
import os
from typing import NamedTuple

import numpy as np

from kvfs.errors import OutOfSpace
from kvfs.owner_process import this_process
from kvfs.sequence_attributes import OWNER

log = logging.getLogger(__name__)

PREFIX = "vllm-attention."  # of names, then the process: what a killed engine leaves, the next one removes


class Row(NamedTuple):
    """A request's part of a batch. num_before: tokens that it had."""

    first_block: int
    num_before: int
    num_new: int


class DriveSequences:
    """store: open, and used by nobody else for sequences of PREFIX."""

    def __init__(self, store, model):
        self._store = store
        self._model = model
        self._by_first_block: dict[int, object] = {}
        self._numbers = itertools.count()
        self.requests_refused = 0  # for want of room: on the drive, or under a cap
        for sequence in store.sequences():
            if sequence.name.startswith(PREFIX) and not _is_in_use(sequence.name):
                store.delete_sequence(sequence.name)

    def append(self, layer: int, row: Row, keys: np.ndarray, values: np.ndarray):
        """Add a row's new tokens; its sequence, or None if the drive does not have what came before.

        keys, values: [num_new, num_kv_heads, head_dim]
        """
        sequence = self._by_first_block.get(row.first_block)
        if sequence is not None and sequence.is_deleted:  # evicted, for another under the same cap
            sequence = None
        if row.num_before == 0 and (sequence is None or sequence.layer_tokens(layer)):
            self._forget(row.first_block)
            name = f"{PREFIX}{os.getpid()}.{next(self._numbers)}"
            sequence = self._by_first_block[row.first_block] = self._store.create_sequence(
                self._model, name, {OWNER: this_process()}
            )
        if sequence is None:
            return None
        if sequence.layer_tokens(layer) != row.num_before:
            self._forget(row.first_block)
            return None
        try:
            sequence.append(layer, keys, values)
        except OutOfSpace as error:
            self.requests_refused += 1
            if self.requests_refused == 1:
                log.warning("kvfs: %s; vLLM attends to such requests itself", error)
            self._forget(row.first_block)
            return None
        return sequence

    def _forget(self, first_block: int) -> None:
        sequence = self._by_first_block.pop(first_block, None)
        if sequence is not None and not sequence.is_deleted:
            self._store.delete_sequence(sequence.name)

    def close(self) -> None:
        for first_block in list(self._by_first_block):
            self._forget(first_block)


def _is_in_use(name: str) -> bool:
    """Whether another process that runs has made it."""
    process = int(name.removeprefix(PREFIX).partition(".")[0])
    return process != os.getpid() and os.path.exists(f"/proc/{process}")
