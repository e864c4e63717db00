"""Flash by location: the path of a file, or an NVMe namespace (see spdk_glue/transports/url.py).

A namespace has no lock of its own, so whoever opens one holds a name in Linux's abstract socket space that
every way to that namespace leads to. It keeps out other processes of this machine; a drive that several hosts
reach has to be given to one of them by whoever administers it.
"""

import errno
import os
import socket

import numpy as np

from ftl.drive_layout import HEADERS_BYTES
from ftl.errors import DriveBusy, NamespaceHoldsData
from ftl.geometry import Geometry
from ftl.media import FlashMedia
from ftl.media_file import FileMedia
from ftl.media_namespace import NamespaceMedia, is_zoned
from ftl.media_zoned import is_written
from spdk_glue.namespace import BlockNamespace
from spdk_glue.transports.url import is_nvme, open_transport

LOOKED_AT_BYTES = 1 << 20  # of a namespace that is to be formatted: headers of drives, file systems, partitions


class LockedNamespace(BlockNamespace):
    """A namespace that is this process's alone while it is open."""

    def __init__(self, location):
        """Raises DriveBusy, NvmeError and its relatives, OSError."""
        super().__init__(open_transport(location))
        try:
            self._held = lock_namespace(self, location)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._held.close()


def lock_namespace(namespace: BlockNamespace, location) -> socket.socket:
    """Make a namespace this process's alone until the socket is closed. Raises DriveBusy."""
    name = f"kvfs:{namespace.serial_number}:{namespace.nsid}"
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        holder.bind(f"\0{name}")
    except OSError as error:
        holder.close()
        if error.errno == errno.EADDRINUSE:
            raise DriveBusy(location, None) from error
        raise
    return holder


def open_media(location: str | os.PathLike, read_only: bool = False) -> FlashMedia:
    """The flash at a location. Raises FlashError, NvmeError and its relatives, OSError."""
    if not is_nvme(location):
        return FileMedia.open(location, read_only)
    return media_on(LockedNamespace(location), read_only)


def media_on(namespace: LockedNamespace, read_only: bool = False) -> FlashMedia:
    """The flash on a namespace, which it closes in the end, and where it fails. Raises as open_media."""
    try:
        return NamespaceMedia.open(namespace, read_only)
    except BaseException:
        namespace.close()
        raise


def create_media(
    location: str | os.PathLike,
    geometry: Geometry | None = None,
    size_bytes: int | None = None,
    overwrite: bool = False,
    **options: int,
) -> FlashMedia:
    """Erased flash: in a new file of `size_bytes`, or over an NVMe namespace, all of it for None.

    geometry: instead of the one that goes with the size and the options (see Geometry.for_capacity)
    overwrite: also a namespace that holds data; a file is never overwritten

    Raises FlashError (NamespaceHoldsData), FileExistsError, ValueError, NvmeError and its relatives, OSError.
    """
    if not is_nvme(location):
        return FileMedia.create(location, geometry or Geometry.for_capacity(size_bytes, **options))
    namespace = LockedNamespace(location)
    try:
        if not overwrite:
            _check_empty(namespace, location)
        geometry = geometry or NamespaceMedia.geometry_for(namespace, size_bytes, **options)
        return NamespaceMedia.create(namespace, geometry)
    except BaseException:
        namespace.close()
        raise


def _check_empty(namespace: BlockNamespace, location) -> None:
    if is_zoned(namespace):
        if is_written(namespace):
            raise NamespaceHoldsData(location)
        return
    count = min(namespace.num_lbas, max(HEADERS_BYTES, LOOKED_AT_BYTES) // namespace.block_bytes)
    if np.any(namespace.read(0, count)):
        raise NamespaceHoldsData(location)
