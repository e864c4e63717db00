"""A store's drive looked over while it is open."""

import apsw

from kvfs.block_owners import BlockOwners
from kvfs.check import (
    Report,
    check_allocator,
    check_catalogue,
    check_extents,
    check_flash,
    check_payloads,
)
from kvfs.errors import CatalogueDamaged
from spdk_glue.flash_admin import FlashAdmin


class CheckedStore:
    """What Store adds for it."""

    def check(self) -> list[str]:
        """What is damaged, one line each: the drive's map, the catalogue, its blocks, every page on flash.

        A drive that is damaged further than opens is looked into by kvfs.inspection.
        """
        with self._lock:
            self._check_open()
            self.flush()
            report = Report()
            try:
                self._check_rows(report)
                check_payloads(self._namespace, self._owners().owner, report)
            except (apsw.Error, CatalogueDamaged) as error:  # too damaged to be looked into further
                report.add("catalogue", f"catalogue: {error}")
            return [problem.text for problem in report.problems if problem.is_damage]

    def _owners(self) -> BlockOwners:
        return BlockOwners(self._volume, self._catalogue, self._namespace.block_bytes)

    def _check_rows(self, report: Report) -> None:
        """All but the pages' payloads."""
        owners = self._owners()
        check_flash(FlashAdmin(self._namespace), owners.owner, report)
        check_catalogue(self._catalogue, owners, report)
        in_memory = self._extents_in_memory()
        first = self._volume.first_data_lba
        named = check_extents(self._namespace, owners, first, in_memory, report)
        check_allocator(self._allocator.free_extents, named, report)
