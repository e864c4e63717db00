"""Commands that SPDK's target hands to the drive's threads, without SPDK."""

import threading

import cffi
import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import COMPLETION_ENTRY, IoOpcode
from spdk_glue.request_id import current
from spdk_glue.spdk_target.commands import ADMIN, ATTENTION, BLOCKS, PIECE, DriveCommands


class Reactors:
    """One command on one lane, then the end."""

    def __init__(self, lane: int, entry: np.ndarray):
        self._lane, self._entry = lane, entry
        self._lock = threading.Lock()
        self.answers = []

    def kvfs_target_take(self, lane, block_bytes, max_requests, max_pieces, requests, num_requests, pieces):
        with self._lock:
            if lane != self._lane or self._entry is None:
                return -1
            entry, self._entry = self._entry, None
        taken = np.frombuffer(cffi.FFI().buffer(pieces), PIECE)
        taken["entry"][0] = entry
        num_requests[0] = 1
        return 1

    def kvfs_target_answer(self, requests, num_requests, pieces, completions, taken):
        self.answers.append(taken)


class Drive:
    """As Hosts and as each host's controller: notes whom its threads work for."""

    def __init__(self):
        self.requests = []

    def controller(self, controller_id):
        return self

    def execute(self, queue_id, entries, buffers):
        self.requests.append(current.request)
        return np.zeros(len(entries), COMPLETION_ENTRY)

    def forget(self, is_gone):
        return []


@pytest.fixture
def ffi():
    ffi = cffi.FFI()
    for name, size in {"kvfs_piece": 88, "kvfs_completion": 16}.items():
        ffi.cdef(f"typedef struct {{ uint8_t bytes[{size}]; }} {name};")
    return ffi


@pytest.mark.parametrize(
    ("lane", "entry", "request_id"),
    [
        (ATTENTION, command.vendor(IoOpcode.ATTENTION_SUBMIT, 1, 1, (7 << 32) + 9), (7 << 32) + 9),
        (ATTENTION, command.vendor(IoOpcode.ATTENTION_SUBMIT, 1), None),
        # these dwords are something else in other commands
        (BLOCKS, command.vendor(IoOpcode.READ, 1, 1, (7 << 32) + 9), None),
        (ADMIN, command.vendor(IoOpcode.READ, 1, 1, (7 << 32) + 9), None),
    ],
)
def test_hosts_request(ffi, lane, entry, request_id):
    """Spans and log lines of the drive would be nobody's."""
    reactors, drive = Reactors(lane, entry), Drive()
    DriveCommands(ffi, reactors, drive, 4096, before_admin=lambda: None).join()
    assert drive.requests == [request_id]
    assert reactors.answers == [1]
