"""A set's file: a name for all its drives together.

    # kvfsctl mount pool.kvfs-set /mnt/kv
    drives = ["a.kvfs", "/mnt/second/b.kvfs", "spdk:0000:02:00.0"]

Paths are relative to the file. What is in it is for finding the drives; whether they belong together they say
themselves. Whoever has the set open holds a lock on the file, as on the file of a drive.
"""

import fcntl
import json
import os
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from kvfs.errors import DriveBusy, MediaFailure, NotADrive
from spdk_glue.transports.url import is_nvme

SUFFIX = ".kvfs-set"
_NOTE = "# A kvfs store over several drives: kvfsctl mount {name} MOUNTPOINT\n"


def is_set_file(path) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(SUFFIX)


def read(path: str | os.PathLike) -> list[str]:
    """The locations of the drives. Raises NotADrive."""
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise NotADrive(path, "no such file; make a set with kvfsctl format") from error
    except (OSError, UnicodeDecodeError) as error:
        raise NotADrive(path, f"cannot be read: {error}") from error
    try:
        drives = tomllib.loads(text).get("drives")
    except tomllib.TOMLDecodeError as error:
        raise NotADrive(path, f"not a set's file: {error}") from error
    if not isinstance(drives, list) or not drives or not all(isinstance(drive, str) for drive in drives):
        raise NotADrive(path, 'not a set\'s file: it says drives = ["...", "..."], at least one')
    return [drive if is_nvme(drive) else os.path.join(path.parent, drive) for drive in drives]


def write(path: str | os.PathLike, locations: Sequence[str]) -> None:
    """Replace the file, at once. Raises MediaFailure."""
    path = Path(path)
    folder = path.absolute().parent
    drives = ", ".join(json.dumps(_relative(location, folder)) for location in locations)
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{path.name}.", delete=False) as part:
            part.write(f"{_NOTE.format(name=path.name)}drives = [{drives}]\n")
            part.flush()
            os.fsync(part.fileno())
        os.chmod(part.name, 0o644)
        os.replace(part.name, path)
    except OSError as error:
        raise MediaFailure(f"{path}: {error.strerror}") from error


def _relative(location: str, folder: Path) -> str:
    """As short as it stays right if all is moved together."""
    if is_nvme(location):
        return location
    absolute = os.path.abspath(location)
    return os.path.relpath(absolute, folder) if Path(absolute).is_relative_to(folder) else absolute


class SetFileLock:
    """Held on a set's file while the set is open here. Raises DriveBusy, MediaFailure."""

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._descriptor = self._locked()

    def _locked(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MediaFailure(f"{self._path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DriveBusy(self._path, None) from error
        return descriptor

    def replaced(self) -> None:
        """The file was written anew: what is locked has to be the one that others find."""
        old, self._descriptor = self._descriptor, self._locked()
        os.close(old)

    def close(self) -> None:
        os.close(self._descriptor)
