"""Starting an embedded drive: the one module of kvfs that reaches below the NVMe seam."""

import os
from pathlib import Path

from accel.drive import CollectorOptions, Drive, DriveConfig, Geometry, flash_errors
from kvfs.errors import DriveBusy, DriveExists, MediaFailure, NamespaceHoldsData, NotADrive
from spdk_glue.status import NvmeError
from spdk_glue.transports.url import is_nvme

__all__ = ["CollectorOptions", "Drive", "DriveConfig", "Geometry", "close_drive", "format_drive", "open_drive"]


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


def open_drive(path: str | os.PathLike, config: DriveConfig) -> Drive:
    """Open the drive in a file or on a namespace; its errors become kvfs's."""
    try:
        return Drive.open(path, config)
    except flash_errors.DriveBusy as error:
        raise DriveBusy(path, error.pid) from error
    except (flash_errors.NotADrive, flash_errors.TruncatedDrive, flash_errors.FormatVersionTooNew) as error:
        raise NotADrive(path, _reason(error)) from error
    except flash_errors.FlashError as error:
        raise MediaFailure(f"{path}: {error}") from error
    except NvmeError as error:
        raise MediaFailure(str(error)) from error
    except FileNotFoundError as error:
        raise NotADrive(path, "no such file; make a drive with kvfs.format or kvfsctl format") from error
    except OSError as error:
        raise MediaFailure(f"{path}: {error.strerror}") from error


def close_drive(drive: Drive, path: str | os.PathLike) -> None:
    """Close a drive; what it could not write any more becomes MediaFailure."""
    try:
        drive.close()
    except flash_errors.FlashError as error:
        raise MediaFailure(f"{path}: {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, flash_errors.NotADrive):
        return f"not a kvfs drive ({error.why})"
    if isinstance(error, flash_errors.TruncatedDrive):
        return f"truncated: {error.found} bytes where the drive has {error.expected}"
    return f"format version {error.found}, but this kvfs reads up to {error.supported}: use a newer kvfs"
