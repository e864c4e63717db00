"""Making an empty drive with an empty store on it."""

import os
from collections.abc import Callable, Sequence

from kvfs.drive_set.locations import Location, is_set, locations_of
from kvfs.drive_set.opening import check_formattable, join_new
from kvfs.embedded_drive import (
    AttachedDrive,
    Drive,
    DriveConfig,
    Geometry,
    attach_drive,
    close_drive,
    format_drive,
    open_drive,
)
from kvfs.errors import InvalidArgument, NamespaceHoldsData
from kvfs.metadata import Catalogue
from kvfs.metadata_vfs import Volume
from kvfs.sizes import parse_size
from kvfs.store import Store
from spdk_glue.namespace import Namespace
from spdk_glue.transports.url import is_nvme

DEFAULT_FILE_SIZE = "1GiB"
FORMAT_CONFIG = DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="reference")


def format(
    path: Location | Sequence[Location],
    size: int | str | None = None,
    *,
    geometry: Geometry | None = None,
    page_size: int = 4096,
    spare_percent: int = 7,
    parity: bool = False,
    overwrite: bool = False,
) -> None:
    """Make an empty drive in a new file, or on an NVMe namespace; or several, that are one store.

    path: of the file, or a location: "spdk:0000:01:00.0", "spdk:trtype:TCP traddr:...", "/dev/ng0n1",
        "nvme+tcp://HOST:PORT/NQN" (what is a kvfs drive there already gets an empty store); a list of them for
        a set of drives, each of this size
    size: bytes, or text such as "8GiB"; a file is sparse and grows as it is written. None: 1 GiB in a file, all
        of a namespace
    geometry: the flash's channels, dies, planes and blocks; None: by size and the options that follow
    spare_percent: of the flash, 1 to 50, kept from the logical blocks so that collection stays cheap
    parity: a die's worth of each row is parity, so that a lost page, or die, can be given back
    overwrite: also a namespace that holds data; a file is never overwritten

    Raises DriveExists, NamespaceHoldsData, DriveBusy, MediaFailure, InvalidArgument; for a list also NotInSet.
    """
    own_flash = {"size": size, "geometry": geometry, "page_size": page_size, "spare_percent": spare_percent}
    own_flash["parity"] = parity
    if is_set(path):
        _format_set(locations_of(path), lambda location: format(location, overwrite=overwrite, **own_flash))
        return
    attached = _attach(path)
    if attached is not None:
        defaults = format.__kwdefaults__ | {"size": None}
        given = [name for name, value in own_flash.items() if value != defaults[name]]
        _format_attached(attached, path, overwrite, given)
        return
    try:
        options = {"page_size": page_size, "spare_percent": spare_percent, "parity": int(parity)}
        if size is None and not is_nvme(path):
            size = DEFAULT_FILE_SIZE
        format_drive(path, size if size is None else parse_size(size), geometry, overwrite, **options)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    drive = open_drive(path, FORMAT_CONFIG)
    try:
        format_volume(drive, path)
    except ValueError as error:
        drive.close()
        if not is_nvme(path):
            os.unlink(path)
        raise InvalidArgument(str(error)) from error
    drive.close()


def _attach(path) -> AttachedDrive | None:
    """The kvfs drive that a location leads to, if what is there is one rather than a medium."""
    return attach_drive(path) if is_nvme(path) else None


def _format_attached(drive: AttachedDrive, path, overwrite: bool, given: list[str]) -> None:
    """Make an empty store on a drive that is elsewhere: its flash is made by who serves it."""
    try:
        if given:
            raise InvalidArgument(f"{path}: a drive already, {', '.join(given)} cannot be chosen any more")
        if not overwrite and not drive.is_empty():
            raise NamespaceHoldsData(path)
        drive.erase()
        format_volume(drive, path)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    finally:
        close_drive(drive, path)


def _format_set(locations: list[str], format_one: Callable[[str], None]) -> None:
    """All of them or, of files, none."""
    check_formattable(locations)
    made = []
    try:
        for location in locations:
            format_one(location)
            made.append(location)
        join_new(locations, _open_new)
    except BaseException:
        for location in made:
            if not is_nvme(location):
                os.unlink(location)
        raise


def _open_new(location: str) -> Store:
    return Store(open_drive(location, FORMAT_CONFIG), location, worker="reference", in_set=True)


def format_volume(drive: Drive | AttachedDrive, path, metadata_lbas: tuple[int, int] | None = None) -> None:
    """Make an empty store on an open drive. metadata_lbas: blocks for the database and its log.

    Raises ValueError if the drive is too small.
    """
    namespace = Namespace(drive.transport)
    volume = Volume.format(namespace, metadata_lbas)
    Catalogue(volume, namespace.block_bytes, path, create=True).close()
