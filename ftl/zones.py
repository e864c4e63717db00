"""Zones of a raw NVMe namespace: places that are written from their start on, and emptied as a whole.

Keeps how far each is written, so that nobody asks the drive for it. What lies between two writes is padded with
a pattern that no page is likely to have: what was never programmed must not pass for a page of zeros.
"""

from contextlib import contextmanager

import numpy as np

from ftl.layout import BLOCK_BYTES
from ftl.raw_namespace import media_errors, name_of
from spdk_glue import dma
from spdk_glue.command import ZONE_SEQUENTIAL, ZoneState
from spdk_glue.dma import EXTENT
from spdk_glue.identify import ZONES_UNLIMITED
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeStatusError

PAD = np.frombuffer(b"kvfs: nothing was programmed here".ljust(64, b".") * (BLOCK_BYTES // 64), np.uint8)
PAD_BYTES = 1 << 20  # written at a time
ACTIVE = (ZoneState.IMPLICITLY_OPEN, ZoneState.EXPLICITLY_OPEN, ZoneState.CLOSED)
USELESS = (ZoneState.READ_ONLY, ZoneState.OFFLINE)


class Zones:
    """All zones of a namespace, by number. Several threads may use different ones. Failures are MediaIoErrors.

    size_bytes: from the start of a zone to the start of the next
    capacity: int64 [n], bytes of each that can be written, whole blocks; written: int64 [n], bytes of each that
        were, from its start on
    is_active: bool [n], begun and not full; max_active: how many may be, None for any number
    is_usable: bool [n], can be written and reset; is_offline: bool [n], cannot even be read
    """

    def __init__(self, namespace: BlockNamespace):
        self.name = name_of(namespace)
        self._namespace = namespace
        with media_errors(namespace, 0):
            limits, zone_lbas = namespace.zoned()
            found = namespace.zones()
        self.size_bytes = zone_lbas * namespace.block_bytes
        if self.size_bytes % BLOCK_BYTES or (found["type"] & 0xF != ZONE_SEQUENTIAL).any():
            raise ValueError(f"{self.name}: zones of {self.size_bytes} bytes, or not of sequential writes")
        lowest = min(int(limits["mar"]), int(limits["mor"]))
        self.max_active = None if lowest == ZONES_UNLIMITED else lowest + 1
        self._whole_capacity = found["capacity"].astype(np.int64) * namespace.block_bytes
        self.capacity = self._whole_capacity // BLOCK_BYTES * BLOCK_BYTES
        self.written = self.capacity.copy()  # of zones that are read-only nobody knows
        self.is_active, self.is_usable, self.is_offline = np.zeros((3, len(found)), bool)
        for zone in range(len(found)):
            self._note(zone, found[zone])

    def __len__(self) -> int:
        return len(self.capacity)

    def _note(self, zone: int, descriptor: np.void) -> None:
        state = int(descriptor["state"]) >> 4
        self.is_active[zone] = state in ACTIVE
        self.is_usable[zone], self.is_offline[zone] = state not in USELESS, state == ZoneState.OFFLINE
        if state == ZoneState.FULL:
            self.written[zone] = self.capacity[zone]
        elif state not in USELESS:  # there the write pointer says nothing
            pointer = int(descriptor["write_pointer"] - descriptor["first_lba"]) * self._namespace.block_bytes
            self.written[zone] = pointer

    @contextmanager
    def _changing(self, zone: int):
        """A failure leaves a zone as the drive says that it is."""
        try:
            with media_errors(self._namespace, self.start(zone) + int(self.written[zone])):
                try:
                    yield
                except NvmeStatusError:
                    self._note(zone, self._namespace.zones(self._first_lba(zone), max_zones=1)[0])
                    raise
        finally:
            if self.written[zone] >= self._whole_capacity[zone]:
                self.is_active[zone] = False

    def _first_lba(self, zone: int) -> int:
        return self.start(zone) // self._namespace.block_bytes

    def start(self, zone: int) -> int:
        """Byte offset in the namespace."""
        return zone * self.size_bytes

    # what changes a zone; one thread at a time

    def append(self, zone: int, addresses: np.ndarray, lengths: np.ndarray) -> None:
        """Write memory behind what is written: addresses, and lengths in bytes, int64 [n]."""
        extents = np.empty(len(addresses), EXTENT)
        extents["address"], extents["length"] = addresses, lengths
        extents["offset"] = self.start(zone) + self.written[zone] + np.cumsum(lengths) - lengths
        self.is_active[zone] = True
        with self._changing(zone):
            self._namespace.write_in_order(extents)
            self.written[zone] += int(np.sum(lengths))

    def pad(self, zone: int, until: int) -> None:
        """Have a zone written up to a byte at least."""
        missing = until - int(self.written[zone])
        if missing > 0:
            buffer = dma.allocate(min(PAD_BYTES, -(-missing // BLOCK_BYTES) * BLOCK_BYTES))
            fill_with_pad(buffer)
            lengths = np.full(-(-missing // buffer.nbytes), buffer.nbytes, np.int64)
            lengths[-1] = missing - lengths[:-1].sum()
            self.append(zone, np.full(len(lengths), dma.address_of(buffer)), lengths)

    def finish(self, zone: int) -> None:
        """Make a zone full: what is left of it is given up, and it is not active any more."""
        if self.is_active[zone]:
            with self._changing(zone):
                self._namespace.finish_zone(self._first_lba(zone))
                self.written[zone], self.is_active[zone] = self.capacity[zone], False

    def reset(self, zone: int) -> None:
        """Empty a zone."""
        if self.written[zone] or self.is_active[zone]:
            with self._changing(zone):
                self._namespace.reset_zone(self._first_lba(zone))
                self.written[zone], self.is_active[zone] = 0, False

    # what does not

    def read(self, extents: np.ndarray) -> None:
        """Read EXTENT [n], offsets in the namespace; none crosses from one zone to the next."""
        with media_errors(self._namespace, int(extents["offset"][0])):
            self._namespace.read_extents(extents)

    def flush(self) -> None:
        """Everything so far is durable when this returns."""
        with media_errors(self._namespace, 0):
            self._namespace.flush()

    def close(self) -> None:
        self._namespace.close()


def fill_with_pad(memory: np.ndarray) -> None:
    """memory: uint8, whole blocks."""
    memory.reshape(-1, BLOCK_BYTES)[:] = PAD
