"""What a check of `kvfsctl doctor` is given and what it gives back."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

OK = "ok"
MISSING = "missing"  # kvfs does not work without it
OPTIONAL = "optional"  # something is not there that parts of kvfs, or its speed, would like


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and, unless all is well, what would help."""

    name: str
    mark: str
    found: str
    todo: str = ""


def verdict(name: str, is_good: bool, found: str, todo: str, otherwise: str = OPTIONAL) -> Finding:
    return Finding(name, OK, found) if is_good else Finding(name, otherwise, found, todo)


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """Where to look: this machine, or one that a test makes up.

    root: for /proc, /sys and /dev; folder: where drives would be kept; version: of an installed package, None
    where it is not; which: the path of a program
    """

    root: Path = Path("/")
    folder: Path = Path(".")
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    version: Callable[[str], str | None] = installed_version
    which: Callable[[str], str | None] = shutil.which
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    def text(self, path: str) -> str:
        """Of a file below the root; empty where it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo: bytes, or a number of pages."""
        found = {}
        for line in self.text("proc/meminfo").splitlines():
            name, _, rest = line.partition(":")
            value, *unit = rest.split()
            found[name] = int(value) * (1024 if unit == ["kB"] else 1)
        return found
