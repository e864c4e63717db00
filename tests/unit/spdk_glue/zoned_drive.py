"""A zoned drive in memory, which holds its host to the rules of the Zoned Namespace Command Set.

Writes that arrive together are executed last first: a host that has several outstanding in one zone breaks the
rules at once, not once in a while.
"""

import numpy as np

from spdk_glue.command import (
    REPORT_PARTIAL,
    REPORT_ZONES,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    ZONE_SEQUENTIAL,
    CommandSet,
    IoOpcode,
    ZoneAction,
    ZoneState,
)
from spdk_glue.controller import Controller
from spdk_glue.identify import IDENTIFY_ZONED_NAMESPACE, NAMESPACE_DESCRIPTOR, ZONES_UNLIMITED, Cns
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import CommandFailed, Status
from spdk_glue.transports.inproc import InprocTransport

from .memory_drive import MemoryDrive

OPEN = (ZoneState.IMPLICITLY_OPEN, ZoneState.EXPLICITLY_OPEN)
ACTIVE = (*OPEN, ZoneState.CLOSED)
UNWRITABLE = {
    ZoneState.FULL: Status.ZONE_IS_FULL,
    ZoneState.READ_ONLY: Status.ZONE_IS_READ_ONLY,
    ZoneState.OFFLINE: Status.ZONE_IS_OFFLINE,
}


class ZonedDrive(MemoryDrive):
    """states, pointers: by zone; `unwritten` is what blocks read as that were not written. A zone may be made
    read-only or offline by its state."""

    def __init__(
        self,
        num_zones: int = 16,
        zone_bytes: int = 128 << 10,
        capacity_bytes: int | None = None,
        block_bytes: int = 512,
        max_active: int | None = None,
        max_open: int | None = None,
        unwritten: int = 0,
        mdts: int = 3,
    ):
        self.zone_lbas, self.unwritten = zone_bytes // block_bytes, unwritten
        super().__init__(block_bytes, mdts, signature=b"", num_lbas=num_zones * self.zone_lbas)
        self.blocks[:] = unwritten
        self.capacities = np.full(num_zones, (capacity_bytes or zone_bytes) // block_bytes)
        self.starts = np.arange(num_zones) * self.zone_lbas
        self.states = np.full(num_zones, ZoneState.EMPTY)
        self.pointers = self.starts.copy()
        self.max_active, self.max_open = max_active, max_open
        self.zoned = np.zeros(1, IDENTIFY_ZONED_NAMESPACE)
        for name, limit in (("mar", max_active), ("mor", max_open)):
            self.zoned[name] = ZONES_UNLIMITED if limit is None else limit - 1
        self.zoned["lbafe"][0, 0]["zsze"] = self.zone_lbas
        descriptors = np.zeros(4096, np.uint8)
        # before the command set: an EUI-64, which is to be passed over
        descriptors[:17] = [1, 8, 0, 0, *range(1, 9), 4, 1, 0, 0, CommandSet.ZONED]
        assert NAMESPACE_DESCRIPTOR.itemsize == 4
        self.identities[Cns.NAMESPACE_DESCRIPTORS] = descriptors
        self.io_handlers |= {
            IoOpcode.ZONE_MANAGEMENT_SEND: self.manage_zones,
            IoOpcode.ZONE_MANAGEMENT_RECEIVE: self.report_zones,
        }
        del self.io_handlers[IoOpcode.DATASET_MANAGEMENT]  # a reset is what gives space back
        self.device = Controller(self.io_handlers, self.admin_handlers)
        self.transport = InprocTransport(self.device, num_command_threads=0)

    def host(self) -> BlockNamespace:
        return BlockNamespace(InprocTransport(self.device, num_command_threads=0))

    def identify(self, requests):
        for request in requests:
            if request.cdw10 == Cns.COMMAND_SET_NAMESPACE and request.cdw11 >> 24 == CommandSet.ZONED:
                request.data[:] = self.zoned.view(np.uint8)
            else:
                super().identify([request])

    # zones

    def set_state(self, zone: int, state: ZoneState) -> None:
        self.states[zone] = state

    def num_in(self, states) -> int:
        return int(np.isin(self.states, states).sum())

    def _activate(self, zone: int) -> Status:
        """Open a zone for a write, implicitly."""
        if self.states[zone] in OPEN:
            return Status.SUCCESS
        is_new = self.states[zone] == ZoneState.EMPTY
        if is_new and self.max_active is not None and self.num_in(ACTIVE) >= self.max_active:
            return Status.TOO_MANY_ACTIVE_ZONES
        if self.max_open is not None and self.num_in(OPEN) >= self.max_open:
            closable = np.flatnonzero(self.states == ZoneState.IMPLICITLY_OPEN)
            if not len(closable):
                return Status.TOO_MANY_OPEN_ZONES
            self.set_state(closable[0], ZoneState.CLOSED)
        self.set_state(zone, ZoneState.IMPLICITLY_OPEN)
        return Status.SUCCESS

    def write(self, requests):
        self.note(requests)
        for request in reversed(requests):
            if request.status == Status.SUCCESS:
                self._write(request)

    def _write(self, request) -> None:
        zone, offset = divmod(request.first_lba, self.zone_lbas)
        place = self._blocks(request)
        if not len(place):
            return
        status = UNWRITABLE.get(self.states[zone], Status.SUCCESS)
        if offset + request.num_lbas > self.capacities[zone] and status == Status.SUCCESS:
            status = Status.ZONE_BOUNDARY_ERROR
        if request.first_lba != self.pointers[zone] and status == Status.SUCCESS:
            status = Status.ZONE_INVALID_WRITE
        if status == Status.SUCCESS:
            status = self._activate(zone)
        if status != Status.SUCCESS:
            request.fail(CommandFailed(status, lba=request.first_lba))
            return
        self.take(zone, request.data)

    def take(self, zone: int, data: np.ndarray) -> None:
        """Data of a write that nothing speaks against."""
        first = self.pointers[zone]
        stop = first + len(data) // self.block_bytes
        self.blocks[first:stop] = data.reshape(-1, self.block_bytes)
        self.pointers[zone] = stop
        if stop == self.starts[zone] + self.capacities[zone]:
            self.set_state(zone, ZoneState.FULL)

    def read(self, requests):
        self.note(requests)
        for request in requests:
            first, last = (
                lba // self.zone_lbas for lba in (request.first_lba, request.first_lba + request.num_lbas - 1)
            )
            if first != last:
                request.fail(CommandFailed(Status.ZONE_BOUNDARY_ERROR, lba=request.first_lba))
            elif self.states[first] == ZoneState.OFFLINE:
                request.fail(CommandFailed(Status.ZONE_IS_OFFLINE, lba=request.first_lba))
            elif request.status == Status.SUCCESS:
                found = self._blocks(request)
                request.data[: len(found)] = found

    def manage_zones(self, requests):
        self.note(requests)
        for request in requests:
            zone, offset = divmod(request.first_lba, self.zone_lbas)
            state, action = self.states[zone], request.cdw13 & 0xFF
            if offset or action not in (ZoneAction.RESET, ZoneAction.FINISH):
                request.fail(CommandFailed(Status.INVALID_FIELD))
            elif state in (ZoneState.READ_ONLY, ZoneState.OFFLINE):
                request.fail(CommandFailed(Status.INVALID_ZONE_STATE_TRANSITION, lba=request.first_lba))
            elif request.status == Status.SUCCESS:
                {ZoneAction.RESET: self.reset, ZoneAction.FINISH: self.finish}[ZoneAction(action)](zone)

    def reset(self, zone: int) -> None:
        self.set_state(zone, ZoneState.EMPTY)
        self.pointers[zone] = self.starts[zone]
        self.blocks[self.starts[zone] : self.starts[zone] + self.zone_lbas] = self.unwritten

    def finish(self, zone: int) -> None:
        self.set_state(zone, ZoneState.FULL)

    def report_zones(self, requests):
        for request in requests:
            zone, offset = divmod(request.first_lba, self.zone_lbas)
            assert not offset and request.cdw13 == REPORT_ZONES | REPORT_PARTIAL
            assert (request.cdw12 + 1) * 4 == request.data.nbytes
            count = (request.data.nbytes - ZONE_REPORT_HEADER.itemsize) // ZONE_DESCRIPTOR.itemsize
            count = min(count, len(self.states) - zone)
            header, found = np.zeros(1, ZONE_REPORT_HEADER), np.zeros(count, ZONE_DESCRIPTOR)
            header["num_zones"] = count
            part = slice(zone, zone + count)
            found["type"] = ZONE_SEQUENTIAL
            found["state"] = self.states[part] << 4
            found["capacity"], found["first_lba"] = self.capacities[part], self.starts[part]
            says = np.isin(self.states[part], (ZoneState.EMPTY, *ACTIVE))
            found["write_pointer"] = np.where(says, self.pointers[part].astype(np.uint64), ~np.uint64(0))
            raw = np.concatenate([header.view(np.uint8), found.view(np.uint8)])
            request.data[: len(raw)] = raw
