"""Starting an embedded drive, or attaching one that is elsewhere: the one module of kvfs that reaches below the
NVMe seam."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel.drive import (
    MIN_CACHE_BYTES,
    CollectorOptions,
    Drive,
    DriveConfig,
    Geometry,
    LockedNamespace,
    flash_errors,
    holds_flash,
    io_uring_works,
    lock_namespace,
    media_on,
)
from accel.workers.target import host_target_name
from kvfs.attached_drive import AttachedDrive, is_kvfs_drive
from kvfs.errors import (
    DriveBusy,
    DriveExists,
    InvalidArgument,
    MediaFailure,
    NamespaceHoldsData,
    NotADrive,
)
from spdk_glue.namespace import BlockNamespace, Transport
from spdk_glue.reservation import NamespaceReserved
from spdk_glue.status import NvmeError, OtherAttentionVersion
from spdk_glue.transports import url
from spdk_glue.transports.url import is_nvme

__all__ = [
    "MIN_CACHE_BYTES",
    "AttachedDrive",
    "CollectorOptions",
    "Drive",
    "DriveConfig",
    "Geometry",
    "attach_drive",
    "close_drive",
    "format_drive",
    "hold_alone",
    "holds_flash",
    "host_target_name",
    "io_uring_works",
    "open_drive",
    "open_transport",
]

INPROC_SCHEME = "inproc:"
NVME_DEVICES = ("/dev/nvme", "/dev/ng")
ADMIN_CACHE_BYTES = 8 << 20


def format_drive(
    path: str | os.PathLike,
    size_bytes: int | None,
    geometry: Geometry | None,
    overwrite: bool = False,
    **options: int,
) -> None:
    """Make an empty drive of at most `size_bytes` in a new file or on a namespace: see Drive.format."""
    if Path(path).exists() and not is_nvme(path):
        raise DriveExists(path)
    try:
        Drive.format(path, geometry, size_bytes=size_bytes, overwrite=overwrite, **options)
    except FileExistsError as error:
        raise DriveExists(path) from error
    except flash_errors.NamespaceHoldsData as error:
        raise NamespaceHoldsData(path) from error
    except flash_errors.DriveBusy as error:
        raise DriveBusy(path, error.pid) from error
    except OSError as error:
        raise MediaFailure(f"{path}: {error.strerror}") from error
    except NvmeError as error:
        raise MediaFailure(str(error)) from error
    except flash_errors.FlashError as error:
        if not is_nvme(path):
            Path(path).unlink(missing_ok=True)
        raise MediaFailure(str(error)) from error


def open_drive(path: str | os.PathLike, config: DriveConfig) -> Drive | AttachedDrive:
    """Open the drive in a file or on a namespace, or one that is elsewhere; its errors become kvfs's.

    config is for a drive that is embedded here: whoever serves one elsewhere has given it its own.
    """
    with _own_errors(path):
        if not is_nvme(path):
            return Drive.open(path, config)
        namespace = LockedNamespace(path)
        if is_kvfs_drive(namespace):
            return AttachedDrive(namespace)
        return Drive.over(media_on(namespace, config.read_only), config)


def attach_drive(location: str | os.PathLike) -> AttachedDrive | None:
    """The kvfs drive at an NVMe location; None where there is something else. Raises as open_drive."""
    with _own_errors(location):
        namespace = LockedNamespace(location)
        if is_kvfs_drive(namespace):
            return AttachedDrive(namespace)
        namespace.close()
        return None


@contextmanager
def _own_errors(path: str | os.PathLike) -> Iterator[None]:
    """Errors of a drive become kvfs's."""
    try:
        yield
    except NamespaceReserved as error:
        raise DriveBusy(path, None, str(error.host_id)) from error
    except flash_errors.DriveBusy as error:
        raise DriveBusy(path, error.pid) from error
    except (flash_errors.NotADrive, flash_errors.TruncatedDrive, flash_errors.FormatVersionTooNew) as error:
        raise NotADrive(path, _reason(error)) from error
    except flash_errors.FlashError as error:
        raise MediaFailure(f"{path}: {error}") from error
    except OtherAttentionVersion as error:
        raise NotADrive(path, str(error)) from error
    except NvmeError as error:
        raise MediaFailure(str(error)) from error
    except FileNotFoundError as error:
        raise NotADrive(path, "no such file; make a drive with kvfs.format or kvfsctl format") from error
    except OSError as error:
        raise MediaFailure(f"{path}: {error.strerror}") from error


def close_drive(drive: Drive | AttachedDrive, path: str | os.PathLike) -> None:
    """Close a drive; what it could not write any more becomes MediaFailure."""
    try:
        drive.close()
    except (flash_errors.FlashError, NvmeError) as error:
        raise MediaFailure(f"{path}: {error}") from error


@contextmanager
def open_transport(location: str | os.PathLike, read_only: bool = False) -> Iterator[Transport]:
    """The transport to an NVMe namespace, see spdk_glue/transports/url.py, or to the drive in a file.

    The drive in a file, with or without `inproc:` before it, is embedded here meanwhile, without threads.
    read_only: such a drive is not changed by being opened; others may be in use by Linux meanwhile.

    Raises what open_drive raises, NvmeError, InvalidArgument where this installation lacks the transport.
    """
    location = os.fspath(location)
    if not is_nvme(location) and not location.startswith(NVME_DEVICES):
        path = location.removeprefix(INPROC_SCHEME)
        drive = open_drive(path, DriveConfig(ADMIN_CACHE_BYTES, 1, "reference", 0, read_only))
        try:
            yield drive.transport
        finally:
            close_drive(drive, path)
        return
    try:
        transport = url.open_transport(location, alone=not read_only)
    except ImportError as error:
        raise InvalidArgument(f"{location}: {error}; kvfsctl doctor says what is missing") from error
    except OSError as error:
        raise MediaFailure(f"{location}: {error.strerror or error}") from error
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def hold_alone(namespace: BlockNamespace, location: str | os.PathLike) -> Iterator[None]:
    """Keep kvfs of other processes off a namespace of `open_transport`. Raises DriveBusy."""
    if not is_nvme(location):
        yield  # the drive in a file has a lock of its own
        return
    try:
        lock = lock_namespace(namespace, location)
    except flash_errors.DriveBusy as error:
        raise DriveBusy(location, error.pid) from error
    with lock:
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, flash_errors.NotADrive):
        return f"not a kvfs drive ({error.why})"
    if isinstance(error, flash_errors.TruncatedDrive):
        return f"truncated: {error.found} bytes where the drive has {error.expected}"
    return f"format version {error.found}, but this kvfs reads up to {error.supported}: use a newer kvfs"
