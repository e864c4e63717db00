"""The host's side of what an administrator asks of a kvfs drive: health, maintenance, checks of its map."""

import numpy as np

from spdk_glue import command
from spdk_glue.command import Maintenance
from spdk_glue.identify import (
    FLASH_CHECK_HEADER,
    FLASH_FINDING,
    FLASH_HEALTH_LOG,
    SMART_LOG,
    SUPERBLOCK_RECORD,
    LogPage,
)
from spdk_glue.namespace import Namespace


class FlashAdmin:
    """Over one namespace. Every method raises NvmeStatusError where the drive refuses or fails."""

    def __init__(self, namespace: Namespace):
        self._namespace = namespace

    def health(self) -> np.void:
        """FLASH_HEALTH_LOG: counters since the drive was opened, superblocks by state, wear."""
        return self._namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]

    def smart(self) -> np.void:
        return self._namespace.log_page(LogPage.SMART, SMART_LOG)[0]

    def superblocks(self) -> np.ndarray:
        """SUPERBLOCK_RECORD [num_superblocks]."""
        count = int(self.health()["num_superblocks"])
        return self._namespace.log_page(LogPage.SUPERBLOCKS, SUPERBLOCK_RECORD, count)

    def collect(self, max_superblocks: int = 0) -> int:
        """Collect garbage now, 0 for as long as that gains something; how many superblocks were."""
        return self._namespace.admin(command.flash_maintenance(Maintenance.COLLECT, max_superblocks))

    def renew(self) -> int:
        """Write anew what only parity could give back; how many superblocks held such pages."""
        return self._namespace.admin(command.flash_maintenance(Maintenance.RENEW))

    def drop_cache(self) -> int:
        """Let the drive's read cache forget what nobody reads just now; how many lines of it held something."""
        return self._namespace.admin(command.flash_maintenance(Maintenance.DROP_CACHE))

    def check(self) -> tuple[int, np.ndarray]:
        """Have the drive compare its map with its flash: (number of findings, FLASH_FINDING of the first)."""
        count = self._namespace.admin(command.flash_maintenance(Maintenance.CHECK))
        header = self._namespace.log_page(LogPage.FLASH_CHECK, FLASH_CHECK_HEADER)[0]
        size = FLASH_CHECK_HEADER.itemsize + int(header["num_records"]) * FLASH_FINDING.itemsize
        page = self._namespace.log_page(LogPage.FLASH_CHECK, np.dtype("u1"), size)
        return count, page[FLASH_CHECK_HEADER.itemsize :].view(FLASH_FINDING)
