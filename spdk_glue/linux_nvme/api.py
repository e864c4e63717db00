"""Typed calls into the C of this package. Everything here releases the GIL while it works.

A batch is three arrays: `entries` SUBMISSION_ENTRY [n], `addresses` and `lengths` int64 or uint64 [n]. Each
returns or raises as a whole: ValueError, with nothing sent, where a command's data have not the length that the
command itself says, or are more than Linux takes at once; ConnectionLost where the drive is gone; OSError where
Linux refuses a command.
"""

import errno
import os
import threading
from dataclasses import dataclass

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.linux_nvme._linux_nvme import ffi, lib
from spdk_glue.status import ConnectionLost, QueuePairInUse

# Of a drive that was removed, that the driver gave up, that did not come back from a reset in time, or whose
# submitted commands ended so before.
GONE = (errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.EAGAIN, errno.EBUSY, errno.ENODATA)


@dataclass(frozen=True)
class Device:
    """A namespace's open node. max_transfer_bytes: of one command"""

    fd: int
    path: str
    block_bytes: int
    max_transfer_bytes: int

    def for_commands(self, is_admin: bool):
        return ffi.new("nvme_device *", [self.fd, is_admin, self.block_bytes, self.max_transfer_bytes])


def lost(path: str) -> ConnectionLost:
    return ConnectionLost(f"{path}: the drive is gone or no longer answers; see `dmesg`, then open it again")


def _as_words(array: np.ndarray) -> np.ndarray:
    """Contiguous, of 64 bits."""
    return np.ascontiguousarray(array if array.itemsize == 8 else array.astype(np.uint64))


class _Batch:
    """The record that C takes, and what has to live as long as it."""

    def __init__(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray):
        if not len(entries) == len(addresses) == len(lengths):
            raise ValueError(f"{len(entries)} commands, {len(addresses)} addresses and {len(lengths)} lengths")
        self.entries, self.lengths = np.ascontiguousarray(entries), lengths
        self._kept = [
            ffi.from_buffer("const nvme_entry *", self.entries),
            ffi.from_buffer("const uint64_t *", _as_words(addresses)),
            ffi.from_buffer("const uint64_t *", _as_words(lengths)),
        ]
        self.record = ffi.new("nvme_batch *", [*self._kept, len(entries)])
        self.failed_at = ffi.new("size_t *")

    def check(self, result: int, device: Device) -> None:
        if not result:
            return
        at = self.failed_at[0]
        opcode, length = int(self.entries["opcode"][at]), int(self.lengths[at])
        if result == lib.LENGTH_REFUSED:
            raise ValueError(
                f"{length} bytes with command {opcode:#04x}: not the length that the command itself says, or"
                f" more than the {device.max_transfer_bytes} that Linux takes at once"
            )
        raise error_of(-result, device, f"command {opcode:#04x} with {length} bytes")


def error_of(number: int, device: Device, what: str) -> Exception:
    if number in GONE:
        return lost(device.path)
    return OSError(number, f"Linux refuses {what}: {os.strerror(number)}", device.path)


def check_lengths(
    device: Device, is_admin: bool, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray
) -> None:
    batch = _Batch(entries, addresses, lengths)
    batch.check(lib.nvme_check_lengths(device.for_commands(is_admin), batch.record, batch.failed_at), device)


def ioctl_transfer(
    device: Device, is_admin: bool, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
) -> np.ndarray:
    """COMPLETION_ENTRY [n] in the order of the commands, each by an ioctl of its own, up to eight at a time."""
    batch, completions = _Batch(entries, addresses, lengths), np.empty(len(entries), COMPLETION_ENTRY)
    out = ffi.from_buffer("nvme_completion *", completions)
    record = device.for_commands(is_admin)
    batch.check(lib.nvme_ioctl_transfer(record, batch.record, depth, out, batch.failed_at), device)
    return completions


class Ring:
    """An io_uring for I/O commands of one device. Raises NotImplementedError where Linux has no such ring."""

    def __init__(self, device: Device, depth: int):
        self._device = device
        self._lock = threading.Lock()
        ring = lib.nvme_ring_create(device.for_commands(is_admin=False), depth)
        if ring == ffi.NULL:
            raise NotImplementedError("io_uring with entries of 128 bytes")
        self._ring = ffi.gc(ring, lib.nvme_ring_destroy)
        self._arrived = np.empty(depth, COMPLETION_ENTRY)
        self._out = ffi.from_buffer("nvme_completion *", self._arrived)

    def _call(self, function, *arguments) -> int:
        """Of C, with the ring, for one thread at a time."""
        if not self._lock.acquire(blocking=False):
            raise QueuePairInUse("a queue pair is one thread's at a time: make one for each thread")
        try:
            if self._ring is None:
                raise ValueError("the queue pair is closed")
            return function(self._ring, *arguments)
        finally:
            self._lock.release()

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        """COMPLETION_ENTRY [n] in the order of the commands, of which up to `depth` are under way."""
        batch, completions = _Batch(entries, addresses, lengths), np.empty(len(entries), COMPLETION_ENTRY)
        out = ffi.from_buffer("nvme_completion *", completions)
        result = self._call(lib.nvme_ring_transfer, batch.record, depth, out, batch.failed_at)
        batch.check(result, self._device)
        return completions

    def submit(self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> None:
        """Starts commands; their memory is the drive's until `poll` has returned their completions."""
        batch = _Batch(entries, addresses, lengths)
        batch.check(self._call(lib.nvme_ring_submit, batch.record, batch.failed_at), self._device)

    def poll(self, wait: bool) -> np.ndarray:
        """Completions of submitted commands, at least one if `wait`."""
        count = self._call(lib.nvme_ring_poll, wait, self._out)
        if count < 0:
            raise error_of(-count, self._device, "a submitted command")
        return self._arrived[:count].copy()

    def close(self) -> None:
        """Waits for what is under way."""
        if self._ring is not None:
            self._call(ffi.release)
            self._ring = None
