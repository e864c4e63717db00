"""Blocks for who writes: free ones, or such as become free once what gave them up is durable."""

from itertools import takewhile

from kvfs.allocator import Extent
from kvfs.errors import OutOfSpace
from kvfs.metadata import GroupRow
from spdk_glue.identify import FLASH_HEALTH_LOG, LogPage

PLENTY = 16  # times what is taken in advance


class BlocksOfStore:
    """What Store adds for it. Expects a store's allocator, catalogue, objects, derived data and files."""

    def _allocate(self, num_lbas: int) -> int:
        first_lba = self._allocator.allocate(num_lbas)
        if first_lba is None and self._may_free:
            self._sync()  # what was freed may be reused once that is durable
            first_lba = self._allocator.allocate(num_lbas)
        while first_lba is None and self._sealing.make_room(num_lbas):
            self._sync()
            first_lba = self._allocator.allocate(num_lbas)
        if first_lba is None:
            block_bytes = self._namespace.block_bytes
            raise OutOfSpace(num_lbas * block_bytes, self._allocator.largest_free_lbas * block_bytes)
        return first_lba

    def _allocate_some(self, num_lbas: int, behind: int | None) -> list[Extent]:
        """As _allocate, in as many pieces as it takes; best from LBA `behind` on."""
        extents = self._allocator.allocate_some(num_lbas, behind)
        if extents is None and self._may_free:
            self._sync()
            extents = self._allocator.allocate_some(num_lbas, behind)
        while extents is None and self._sealing.make_room(num_lbas):
            self._sync()
            extents = self._allocator.allocate_some(num_lbas, behind)
        if extents is None:
            block_bytes = self._namespace.block_bytes
            raise OutOfSpace(num_lbas * block_bytes, self._allocator.largest_free_lbas * block_bytes)
        return extents

    @property
    def _may_free(self) -> bool:
        return self._allocator.has_held or self._catalogue.batch.has_changes or self._objects.has_freed

    @property
    def _num_data_lbas(self) -> int:
        return self._namespace.num_lbas - self._volume.first_data_lba

    @property
    def _plenty_of_lbas(self) -> int:
        """How much may be taken in advance."""
        return self._allocator.free_lbas // PLENTY

    def _allocate_now(self, count: int, group_lbas: int) -> list[GroupRow]:
        """As many groups, up to `count`, as there is room for without freeing any."""
        bases = (self._allocator.allocate(group_lbas) for _ in range(count))
        return [GroupRow(None, base, group_lbas) for base in takewhile(lambda base: base is not None, bases)]

    def _allocate_groups(self, count: int, group_lbas: int) -> list[GroupRow]:
        groups: list[GroupRow] = []
        try:
            for _ in range(count):
                groups.append(GroupRow(None, self._allocate(group_lbas), group_lbas))
        except OutOfSpace:
            for group in groups:
                self._allocator.give_back(group.base_lba, group.num_lbas)
            raise
        return groups

    def _extents_in_memory(self) -> list[Extent]:
        """Handed out or held back, and named by no row."""
        new = [
            (group.base_lba, group.num_lbas)
            for sequence in self._sequences.values()
            for group in sequence._groups
            if group.id is None
        ]
        files = self._files.extents_in_memory() if self._files is not None else []
        sealed = self._sealing.extents_in_memory()
        return new + files + self._objects.extents_in_memory() + sealed + self._allocator.held_extents

    def _reclaim_unit_bytes(self) -> int:
        """What the drive erases at once."""
        health = self._namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]
        return int(health["num_pages"]) // int(health["num_superblocks"]) * int(health["page_size"])
