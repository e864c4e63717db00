"""The drive's threads: they take batches of commands from SPDK's reactors, and answer them."""

import logging
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from spdk_glue import dma
from spdk_glue import status as nvme_status
from spdk_glue.command import COMPLETION_ENTRY, REQUEST_OFFSET, SUBMISSION_ENTRY
from spdk_glue.request_id import working_for
from spdk_glue.spdk_target.hosts import Hosts
from spdk_glue.status import Status

log = logging.getLogger(__name__)

PIECE = np.dtype(
    [
        ("entry", SUBMISSION_ENTRY),
        ("address", "<u8"),  # of its data, in one piece, and their length in bytes
        ("length", "<u8"),
        ("request", "<u4"),
        ("controller", "<u2"),  # of SPDK's subsystem; 0: known to none
        ("queue", "<u2"),
    ]
)
assert PIECE.itemsize == 88
MAX_PIECES = 512
# Of each lane: threads, and requests that a thread takes at once. What waits for something, takes one.
BLOCKS, FLUSH, ATTENTION, ADMIN = range(4)
LANES = {BLOCKS: (2, 64), FLUSH: (1, 8), ATTENTION: (8, 1), ADMIN: (2, 1)}


def host_request(entry: np.ndarray) -> int | None:
    """Which the host works for, see request_id, of a vendor command; None if it does not say."""
    return int.from_bytes(entry.tobytes()[REQUEST_OFFSET : REQUEST_OFFSET + 8], "little") or None


class DriveCommands:
    """before_admin: done before admin commands"""

    def __init__(self, ffi, lib, hosts: Hosts, block_bytes: int, before_admin: Callable[[], None]):
        self._ffi, self._lib = ffi, lib
        self._hosts = hosts
        self._block_bytes = block_bytes
        self._before_admin = before_admin
        self._threads = [
            threading.Thread(target=self._run, args=(lane, most), name=f"kvfs-spdk-{lane}", daemon=True)
            for lane, (count, most) in LANES.items()
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Once the target has ended: wait for the threads, and let go of all hosts."""
        for thread in self._threads:
            thread.join()
        self._hosts.forget(lambda controller_id: True)

    def _run(self, lane: int, max_requests: int) -> None:
        ffi, lib = self._ffi, self._lib
        pieces = np.zeros(MAX_PIECES, PIECE)
        requests = np.zeros(max_requests, np.uint64)
        of_pieces, of_requests = (
            ffi.from_buffer("kvfs_piece[]", pieces),
            ffi.from_buffer("uint64_t[]", requests),
        )
        num_requests = ffi.new("unsigned *")
        while True:
            taken = lib.kvfs_target_take(
                lane, self._block_bytes, max_requests, MAX_PIECES, of_requests, num_requests, of_pieces
            )
            if taken < 0:
                return
            if lane == ADMIN:
                self._before_admin()
            with working_for(host_request(pieces["entry"][0]) if lane == ATTENTION else None):
                completions = self._execute(pieces[:taken], lane == ADMIN)
            lib.kvfs_target_answer(
                of_requests,
                num_requests[0],
                of_pieces,
                ffi.from_buffer("kvfs_completion[]", completions),
                taken,
            )

    def _execute(self, pieces: np.ndarray, is_admin: bool) -> np.ndarray:
        """COMPLETION_ENTRY [n] of PIECE [n]."""
        owners = pieces["controller"].astype(np.uint32) << np.uint32(16) | pieces["queue"]
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(pieces)]
        entries = np.ascontiguousarray(pieces["entry"])
        buffers = [
            dma.view(address, length) if length else None
            for address, length in zip(pieces["address"].tolist(), pieces["length"].tolist(), strict=True)
        ]
        completions = np.zeros(len(pieces), COMPLETION_ENTRY)
        for start, stop in pairwise(starts):
            part = slice(start, stop)
            try:
                controller = self._hosts.controller(int(pieces["controller"][start]))
                queue_id = 0 if is_admin else int(pieces["queue"][start])
                completions[part] = controller.execute(queue_id, entries[part], buffers[part])
            except Exception:
                # whatever happens, the host is waiting for an answer
                log.exception("commands of SPDK's target failed")
                completions["status"][part] = nvme_status.encode(Status.INTERNAL_ERROR)
        return completions
