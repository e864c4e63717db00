"""What only some drives have: command sets other than NVM, zones, and placement of data.

What a namespace has of it is found out by who asks for it, and no drive gets a command that it does not know.
"""

import numpy as np

from spdk_glue import command, dma
from spdk_glue.command import (
    HANDLE_STATUS_DESCRIPTOR,
    HANDLE_STATUS_HEADER,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    CommandSet,
    Feature,
    ZoneAction,
)
from spdk_glue.identify import (
    CTRATT_FLEXIBLE_DATA_PLACEMENT,
    IDENTIFY_ZONED_NAMESPACE,
    NAMESPACE_DESCRIPTOR,
    NAMESPACE_DESCRIPTOR_COMMAND_SET,
    Cns,
)
from spdk_glue.status import NvmeStatusError, Status

ZONES_REPORTED = 1023  # at once: with the header 64 KiB


class OptionalCommands:
    """A part of BlockNamespace, which has what is used here."""

    _zoned: tuple[np.void, int] | None = None

    def command_set(self) -> int:
        """Of the namespace: a CommandSet, or one that is not known here."""
        data = np.zeros(4096, np.uint8)
        try:
            self.admin(command.identify(Cns.NAMESPACE_DESCRIPTORS, self.nsid), data)
        except NvmeStatusError as error:
            if error.status != Status.INVALID_FIELD:
                raise
            return CommandSet.NVM  # a drive from before there were others
        start = 0
        while start + NAMESPACE_DESCRIPTOR.itemsize < len(data) and data[start]:
            kind, length = data[start : start + 2].tolist()
            start += NAMESPACE_DESCRIPTOR.itemsize
            if kind == NAMESPACE_DESCRIPTOR_COMMAND_SET:
                return int(data[start])
            start += length
        return CommandSet.NVM

    def placement_identifiers(self) -> np.ndarray:
        """uint16: what Write takes as placement identifiers; none where there is no flexible data placement, or
        it is not enabled."""
        none = np.empty(0, np.uint16)
        if not int(self.controller["ctratt"]) & CTRATT_FLEXIBLE_DATA_PLACEMENT or not self.endurance_group:
            return none
        feature = command.get_features(Feature.FLEXIBLE_DATA_PLACEMENT, self.endurance_group)
        if not self.admin(feature) & command.FDP_ENABLED:
            return none
        count = 0
        while True:  # with no room for descriptors at first, to learn how many there are
            data = dma.allocate(HANDLE_STATUS_HEADER.itemsize + count * HANDLE_STATUS_DESCRIPTOR.itemsize)
            self._run(command.reclaim_unit_handle_status(data.nbytes), [data])
            header = data[: HANDLE_STATUS_HEADER.itemsize].view(HANDLE_STATUS_HEADER)
            found = int(header["num_descriptors"][0])
            if found <= count:
                descriptors = data[HANDLE_STATUS_HEADER.itemsize :].view(HANDLE_STATUS_DESCRIPTOR)
                return descriptors["placement_id"][:found].copy()
            count = found

    # zones

    def zoned(self) -> tuple[np.void, int]:
        """(IDENTIFY_ZONED_NAMESPACE record, LBAs from the start of a zone to the start of the next) of a zoned
        namespace."""
        if self._zoned is None:
            record, cns = IDENTIFY_ZONED_NAMESPACE, Cns.COMMAND_SET_NAMESPACE
            found = self._identify(cns, record, self.nsid, CommandSet.ZONED)
            self._zoned = found, int(found["lbafe"][self.format_index]["zsze"])
        return self._zoned

    def zones(self, first_lba: int = 0, max_zones: int | None = None) -> np.ndarray:
        """ZONE_DESCRIPTOR [n]: the zones from the one with `first_lba` on, up to a number of them."""
        _, zone_lbas = self.zoned()
        wanted = -(-(self.num_lbas - first_lba) // zone_lbas)
        wanted = wanted if max_zones is None else min(wanted, max_zones)
        size = self.max_transfer_lbas * self.block_bytes - ZONE_REPORT_HEADER.itemsize
        at_once = min(ZONES_REPORTED, size // ZONE_DESCRIPTOR.itemsize)
        found = np.empty(0, ZONE_DESCRIPTOR)
        while len(found) < wanted:
            count = min(at_once, wanted - len(found))
            data = dma.allocate(ZONE_REPORT_HEADER.itemsize + count * ZONE_DESCRIPTOR.itemsize)
            entry = command.report_zones(first_lba + len(found) * zone_lbas, data.nbytes)
            self._run(entry, [data])
            count = int(data[: ZONE_REPORT_HEADER.itemsize].view(ZONE_REPORT_HEADER)["num_zones"][0])
            if not count:
                break
            found = np.append(found, data[ZONE_REPORT_HEADER.itemsize :].view(ZONE_DESCRIPTOR)[:count])
        return found

    def reset_zone(self, first_lba: int) -> None:
        """Empty a zone: its blocks are gone, and it is written from its start again."""
        self._run(command.manage_zone(first_lba, ZoneAction.RESET), [None])

    def finish_zone(self, first_lba: int) -> None:
        """Make a zone full, whatever was written of it: it is not active any more."""
        self._run(command.manage_zone(first_lba, ZoneAction.FINISH), [None])
