"""The drive that fuzzing works on: blocks that name themselves, tickets whose answers are secrets.

Every 8-byte word of it has a tag in its upper half, so a look at any data that a target sent tells where each
word came from: the namespace, an answer, memory that was used for something else before.
"""

import threading

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY, AdminOpcode, IoOpcode
from spdk_glue.controller import Controller
from spdk_glue.fabrics.target.subsystem import ServedDrive
from spdk_glue.identify import IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE, Cns
from spdk_glue.status import CommandFailed, Status

BLOCK = 4096
NUM_LBAS = 64
NAMESPACE_TAG, POISON_TAG, SECRET_TAG = 0x4E414D45, 0x504F4953, 0x53454352
assert COMPLETION_ENTRY.itemsize == 16


def tagged(tag: int, num_bytes: int, low: int = 0) -> np.ndarray:
    """uint8 [num_bytes] of words with a tag."""
    return np.full(-(-num_bytes // 8), tag << 32 | low, "<u8").view(np.uint8)[:num_bytes]


def count_tag(data: np.ndarray, tag: int) -> int:
    """Aligned words with this tag in data that begin at a word."""
    words = data[: len(data) // 8 * 8].view("<u8")
    return int((words >> np.uint64(32) == tag).sum())


class FuzzDrive:
    """tickets: the drive's number to how its answer begins; `victim` are those of the host that is spied on"""

    def __init__(self):
        self.blocks = tagged(NAMESPACE_TAG, NUM_LBAS * BLOCK).reshape(NUM_LBAS, BLOCK).copy()
        self.tickets: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.controller = Controller(
            {
                IoOpcode.READ: self._each(self._read),
                IoOpcode.WRITE: self._each(self._write),
                IoOpcode.FLUSH: self._each(lambda request: None),
                IoOpcode.DATASET_MANAGEMENT: self._each(lambda request: None),
                IoOpcode.ATTENTION_SUBMIT: self._each(self._submit),
                IoOpcode.ATTENTION_FETCH: self._each(self._fetch),
                IoOpcode.ATTENTION_CANCEL: self._each(self._cancel),
            },
            {AdminOpcode.IDENTIFY: self._each(self._identify)},
        )

    def served(self) -> ServedDrive:
        return ServedDrive(self.controller, attend_small_now=self._attend_small_now)

    @staticmethod
    def _attend_small_now(descriptor: np.ndarray, answer: np.ndarray) -> bool:
        if len(descriptor) != 512 or len(answer) != 512:
            return False
        answer[:] = tagged(7, 512)
        return True

    @staticmethod
    def _each(handler):
        def run(requests):
            for request in requests:
                try:
                    handler(request)
                except CommandFailed as failure:
                    request.fail(failure)

        return run

    def _range(self, request) -> np.ndarray:
        stop = request.first_lba + request.num_lbas
        if stop > NUM_LBAS:
            raise CommandFailed(Status.LBA_OUT_OF_RANGE, lba=request.first_lba)
        if request.data.nbytes != request.num_lbas * BLOCK:
            raise CommandFailed(Status.SGL_LENGTH_INVALID)
        return self.blocks[request.first_lba : stop].reshape(-1)

    def _read(self, request) -> None:
        request.data[:] = self._range(request)

    def _write(self, request) -> None:
        """Checks, and throws away: what a fuzzer writes is no secret of anybody's."""
        self._range(request)

    def _submit(self, request) -> None:
        with self._lock:
            if request.cdw10 in self.tickets:
                raise CommandFailed(Status.TICKET_IN_USE)
            self.tickets[request.cdw10] = request.data[:64].copy()

    def _fetch(self, request) -> None:
        with self._lock:
            answer = self.tickets.pop(request.cdw10, None)
        if answer is None:
            raise CommandFailed(Status.UNKNOWN_TICKET)
        request.data[: len(answer)] = answer[: request.data.nbytes]
        request.result = min(len(answer), request.data.nbytes)

    def _cancel(self, request) -> None:
        with self._lock:
            if self.tickets.pop(request.cdw10, None) is None:
                raise CommandFailed(Status.UNKNOWN_TICKET)

    @staticmethod
    def _identify(request) -> None:
        kind = request.cdw10 & 0xFF
        if kind == Cns.CONTROLLER:
            record = np.zeros(1, IDENTIFY_CONTROLLER)
            record["sn"], record["mn"] = b"FUZZ", b"fuzz"
        elif kind == Cns.NAMESPACE:
            record = np.zeros(1, IDENTIFY_NAMESPACE)
            record["nsze"], record["lbaf"][0, 0]["lbads"] = NUM_LBAS, BLOCK.bit_length() - 1
        else:
            raise CommandFailed(Status.INVALID_FIELD)
        raw = record.view(np.uint8)[: request.data.nbytes]
        request.data[: len(raw)] = raw
