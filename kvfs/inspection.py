"""A drive opened to be looked into. Nothing on it changes unless it is asked for, and damage is no obstacle.

A Store gives back at once what a killed process left behind, and refuses a catalogue that contradicts itself;
whoever wants to see such things opens the drive here.
"""

import os
from collections.abc import Callable

import apsw

from kvfs.block_owners import BlockOwners, Owner, catalogue_owner
from kvfs.check import (
    Progress,
    Report,
    check_catalogue,
    check_extents,
    check_flash,
    check_parity,
    check_payloads,
)
from kvfs.embedded_drive import CollectorOptions, DriveConfig, open_drive
from kvfs.errors import InvalidArgument, KvfsError
from kvfs.metadata import Catalogue
from kvfs.metadata_vfs import Volume
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeError

CACHE_BYTES = 8 << 20
UNREADABLE = (apsw.Error, NvmeError, KvfsError, TypeError, ValueError)  # what a damaged catalogue may raise


class Inspection:
    """volume, catalogue, owners: None where they cannot be read; `why` says why. Use as a context manager."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        read_only: bool = True,
        collection: str = "greedy",
        progress: Callable[[int, int], None] | None = None,
    ):
        """collection, progress: see kvfs.open. Raises NotADrive, DriveBusy, MediaFailure, InvalidArgument."""
        self.path = path
        self.read_only = read_only
        try:
            options = CollectorOptions(policy=collection)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        # no threads: nothing happens on the drive but what is asked here
        config = DriveConfig(CACHE_BYTES, 1, "reference", 0, read_only, options, progress=progress)
        self._drive = open_drive(path, config)
        try:
            self.namespace = Namespace(self._drive.transport)
            self.flash = FlashAdmin(self.namespace)
            self.volume: Volume | None = None
            self.catalogue: Catalogue | None = None
            self.owners: BlockOwners | None = None
            self.why = ""
            self._read_catalogue()
        except BaseException:
            self._drive.close()
            raise

    def _read_catalogue(self) -> None:
        try:
            self.volume = Volume.open(self.namespace, self.path)
            self.catalogue = Catalogue(self.volume, self.namespace.block_bytes, self.path)
            self.look_again()
        except UNREADABLE as error:
            self.why = str(error)

    def look_again(self) -> None:
        """Read the catalogue's rows once more, after they were changed."""
        self.owners = BlockOwners(self.volume, self.catalogue, self.namespace.block_bytes)

    def owner(self, lba: int) -> Owner:
        """Whose a block is, as far as can be told."""
        if self.owners is not None:
            return self.owners.owner(lba)
        if self.volume is None:
            return Owner("unknown", "the volume header cannot be read")
        if lba < self.volume.first_data_lba:
            return catalogue_owner(self.volume, self.namespace.block_bytes, lba)
        return Owner("unknown", "the catalogue cannot be read")

    def check(self, progress: Progress | None = None) -> Report:
        """Everything that can be looked at: see check.py. Changes nothing."""
        report = Report()
        if self.why:
            report.add("catalogue", f"catalogue: {self.why}")
        check_flash(self.flash, self.owner, report)
        if self.owners is not None:
            try:
                check_catalogue(self.catalogue, self.owners, report)
                first = self.volume.first_data_lba
                check_extents(self.namespace, self.owners, first, (), report)
            except UNREADABLE as error:
                report.add("catalogue", f"catalogue: {error}")
        check_payloads(self.namespace, self.owner, report, progress)
        check_parity(self.flash, report)
        return report

    def __enter__(self) -> "Inspection":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Changes that were not made durable are gone."""
        if self.catalogue is not None:
            self.catalogue.abandon()
            self.catalogue = None
        self._drive.close()
