"""What names a set of drives: its file, or the locations of all."""

import os
from collections.abc import Sequence

from kvfs.drive_set import set_file
from kvfs.errors import InvalidArgument, NotInSet
from spdk_glue.fabrics.initiator.address import Address, is_address
from spdk_glue.status import BadLocation
from spdk_glue.transports.url import is_nvme

Location = str | os.PathLike[str]  # of one drive: a file, a folder, "spdk:...", "nvme+tcp://..."


def is_set(path) -> bool:
    """Whether this names a set of drives: its file, or several locations."""
    return set_file.is_set_file(path) or (
        isinstance(path, Sequence) and not isinstance(path, str | bytes | os.PathLike)
    )


def locations_of(path) -> list[str]:
    """Raises NotADrive, NotInSet, InvalidArgument."""
    if set_file.is_set_file(path):
        found = set_file.read(path)
    else:
        try:
            found = [os.fspath(location) for location in path]
        except TypeError as error:
            raise InvalidArgument(f"a set of drives is named by their locations: {error}") from error
    try:
        found = [str(Address.parse(text)) if is_address(text) else text for text in found]
    except BadLocation as error:
        raise InvalidArgument(str(error)) from error
    known: dict[str, str] = {}
    for location in found:
        real = location if is_nvme(location) else os.path.realpath(location)
        if real in known:
            raise NotInSet(location, f"named twice, as {known[real]} too: a set has each drive once")
        known[real] = location
    if not found:
        raise NotInSet("a set of drives", "names none: it takes at least one")
    return found
