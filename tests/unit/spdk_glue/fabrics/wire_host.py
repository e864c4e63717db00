"""A host's queue without a socket: commands in, bytes out, bytes in, completions out."""

import numpy as np

from spdk_glue import dma
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics.initiator import faults
from spdk_glue.fabrics.tcp_glue._tcp_glue import ffi, lib

GUARD_BYTES = 64  # around each command's memory
GUARD = 0xA5


class GuardedMemory:
    """`size` bytes, and bytes around them that nobody may write."""

    def __init__(self, size: int, fill: int = 0x5A):
        self._all = np.full(size + 2 * GUARD_BYTES, GUARD, np.uint8)
        self.data = self._all[GUARD_BYTES : GUARD_BYTES + size]
        self.data[:] = fill

    def is_intact(self) -> bool:
        guards = np.concatenate([self._all[:GUARD_BYTES], self._all[len(self._all) - GUARD_BYTES :]])
        return bool((guards == GUARD).all())


class WireHost:
    def __init__(
        self,
        *,
        queue_id=1,
        depth=8,
        header_digest=False,
        data_digest=False,
        data_alignment=4,
        max_h2c_data_bytes=8192,
        in_capsule_bytes=4096,
    ):
        options = ffi.new(
            "host_options *",
            {
                "queue_id": queue_id,
                "depth": depth,
                "header_digest": header_digest,
                "data_digest": data_digest,
                "data_alignment": data_alignment,
                "max_h2c_data_bytes": max_h2c_data_bytes,
                "in_capsule_bytes": in_capsule_bytes,
                "max_transfer_bytes": 1 << 20,
            },
        )
        self.depth = depth
        self.state = ffi.gc(lib.host_create(options), lib.host_destroy)
        self._kept = []
        self._detail = ffi.new("uint32_t *")

    def start(self, entry: np.ndarray, data: np.ndarray | None = None, cid: int = 0) -> int:
        """Of a submitted command: 0, or a negative errno."""
        entry = entry.copy()
        entry["cid"] = cid
        self._kept.append(data)
        address, size = (0, 0) if data is None else (dma.address_of(data), data.nbytes)
        return lib.host_start(self.state, ffi.from_buffer("host_entry *", entry), address, size, ffi.NULL)

    def first_output(self, size: int) -> bytes:
        """The first bytes of what is to be sent."""
        room = np.empty(size, np.uint8)
        return room[: lib.host_take_output(self.state, ffi.from_buffer("uint8_t *", room), size)].tobytes()

    def output(self, at_once: int = 1 << 20) -> bytes:
        """All that is to be sent, taken `at_once` bytes at a time."""
        room = np.empty(at_once, np.uint8)
        found = b""
        while taken := lib.host_take_output(self.state, ffi.from_buffer("uint8_t *", room), at_once):
            found += room[:taken].tobytes()
        return found

    def feed(self, received: bytes, at_once: int = 1 << 20) -> bool:
        """Whether all was in order."""
        for start in range(0, len(received), at_once):
            piece = received[start : start + at_once]
            if lib.host_feed(self.state, piece, len(piece)):
                return False
        return True

    def completions(self) -> np.ndarray:
        found = np.empty(self.depth, COMPLETION_ENTRY)
        count = lib.host_take_arrived(self.state, ffi.from_buffer("host_completion *", found), self.depth)
        return found[:count]

    def abort(self) -> None:
        lib.host_abort(self.state)

    @property
    def fault(self) -> int:
        return lib.host_fault_of(self.state, self._detail)

    @property
    def fault_text(self) -> str:
        return faults.describe(self.fault, self._detail[0])
