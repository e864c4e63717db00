"""A memory limit on a process by a control group, version 1 or 2: pages of files that it reads count, too.

What a process held before it joined stays charged to where it was (memory.rst, "Memory Ownership"), so a
process that imports its libraries first has the whole limit for what it keeps afterwards.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REMOVAL_SECONDS = 5  # processes that have ended may still be listed


@dataclass(frozen=True)
class MemoryCap:
    """A control group with a limit. `join` is for the process to be limited."""

    folder: Path
    peak_file: str

    def join(self) -> None:
        """Move the calling process there, with all its threads."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """The most that was charged at once; None on a kernel that does not tell."""
        path = self.folder / self.peak_file
        return int(path.read_text()) if path.exists() else None


def _candidates() -> Iterator[tuple[Path, bool]]:
    """(folder in which a group may be made, is version 2): the process's own, and those above."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mountpoint, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in own.items() if "memory" in names.split(",")), "")
        elif kind == "cgroup2":
            path = own.get("", "")
        else:
            continue
        place = Path(mountpoint) / path
        while place.is_relative_to(mountpoint):
            yield place, kind == "cgroup2"
            place = place.parent


def _limit(folder: Path, limit_bytes: int, is_version_2: bool) -> MemoryCap:
    """Raises OSError where this group has no memory controller, or may not be limited."""
    if is_version_2:
        (folder / "memory.max").write_text(str(limit_bytes))
        swap, peak_file = folder / "memory.swap.max", "memory.peak"
        swap_limit = 0
    else:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        swap, peak_file = folder / "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes"
        swap_limit = limit_bytes
    if swap.exists():
        swap.write_text(str(swap_limit))
    return MemoryCap(folder, peak_file)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + REMOVAL_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                return  # an empty group costs nothing
            time.sleep(0.05)


@contextmanager
def memory_cap(name: str, limit_bytes: int) -> Iterator[MemoryCap | None]:
    """A group of this name with this limit, removed in the end; None where this user can make none."""
    made = None
    for place, is_version_2 in _candidates():
        folder = place / f"{name}-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            made = _limit(folder, limit_bytes, is_version_2)
            break
        except OSError:
            folder.rmdir()
    try:
        yield made
    finally:
        if made is not None:
            _remove(made.folder)
