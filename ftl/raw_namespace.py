"""What all flash on raw NVMe namespaces shares: what errors call a drive, and how its errors become the
media's."""

import errno
import logging
from contextlib import contextmanager

import numpy as np

from ftl.errors import backing_error
from spdk_glue.dma import EXTENT
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeError, NvmeStatusError, Status

log = logging.getLogger(__name__)


def name_of(namespace: BlockNamespace) -> str:
    """What errors call a namespace: its drive's serial number."""
    return f"NVMe drive {namespace.serial_number}"


def capacity_of(namespace: BlockNamespace) -> int:
    """Bytes."""
    return namespace.num_lbas * namespace.block_bytes


@contextmanager
def media_errors(namespace: BlockNamespace, offset: int):
    """Raise MediaIoError for what the drive fails inside; offset: in bytes, where the drive names no block."""
    try:
        yield
    except NvmeStatusError as error:
        number = errno.ENOSPC if error.status == Status.CAPACITY_EXCEEDED else errno.EIO
        if error.lba is not None:
            offset = error.lba * namespace.block_bytes
        raise backing_error(number, name_of(namespace), offset) from error
    except NvmeError as error:
        log.error("%s: %s", name_of(namespace), error)
        raise backing_error(errno.EIO, name_of(namespace), offset) from error


def joined(
    addresses: np.ndarray, offsets: np.ndarray, size: int, places: np.ndarray | None = None
) -> np.ndarray:
    """EXTENT, as few as possible: pieces of `size` bytes that follow each other in memory and in the namespace
    are one. places: int64 [n], keeps those apart that differ in it."""
    apart = (np.diff(offsets) != size) | (np.diff(addresses) != size)
    if places is not None:
        apart |= np.diff(places) != 0
    starts = np.flatnonzero(np.concatenate([[True], apart]))
    extents = np.empty(len(starts), EXTENT)
    extents["address"], extents["offset"] = addresses[starts], offsets[starts]
    extents["length"] = np.diff(np.append(starts, len(offsets))) * size
    return extents
