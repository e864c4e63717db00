"""The device nodes of an NVMe namespace under Linux: which they are, what the kernel limits, who uses them.

`/dev/ngXnY` takes any command and is the way that io_uring goes; `/dev/nvmeXnY` is the same namespace as a
block device, which file systems and others use. Facts come from /sys and /proc below `root` ("/" but in tests).
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_glue.status import NamespaceInUse
from spdk_glue.transports.url import BadLocation

ROOT = Path("/")
NODE = re.compile(r"(ng|nvme)(\d+n\d+)(p\d+)?")
KERNEL_PAGE = 4096  # the smallest
ONE_SEGMENT_MORE = 1  # than it has pages: memory that begins within one


@dataclass(frozen=True)
class Node:
    """A namespace by its nodes. `block` and `character` are paths, None where there is no such node."""

    character: str | None
    block: str | None
    name: str  # of the block device, nvme0n1, as /sys has it

    @property
    def path(self) -> str:
        """The node that commands go to."""
        return self.character or self.block


@dataclass(frozen=True)
class Use:
    """device: the namespace's or a partition's; what: "mounted at /data"; remedy: what would end it"""

    device: str
    what: str
    remedy: str


def find(location: str, root: Path = ROOT) -> Node:
    """Raises BadLocation for anything but a namespace, saying what would do."""
    path = _below(root, location).resolve()
    if not path.exists():
        raise BadLocation(f"{location}: no such device; kvfsctl nvme list shows the namespaces of this machine")
    match = NODE.fullmatch(path.name)
    if match is None:
        raise BadLocation(f"{location}: not an NVMe namespace such as /dev/ng0n1")
    if match[3]:
        raise BadLocation(f"{location}: a partition; kvfs takes a whole namespace, such as /dev/ng{match[2]}")
    mode = path.stat().st_mode
    if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        raise BadLocation(f"{location}: not a device; NVMe namespaces are devices such as /dev/ng0n1")
    character, block = path.with_name(f"ng{match[2]}"), path.with_name(f"nvme{match[2]}")
    return Node(
        str(character) if character.exists() else None,
        str(block) if block.exists() else None,
        block.name,
    )


def max_transfer_bytes(name: str, root: Path = ROOT) -> int | None:
    """Of one command, so that the kernel takes it wherever its memory lies; None where /sys does not tell.

    A power of two, so that a long transfer is cut where the drive likes it.
    """
    queue = root / "sys/block" / name / "queue"
    limits = [_number(queue / limit) << 10 for limit in ("max_hw_sectors_kb", "max_sectors_kb")]
    segments = _number(queue / "max_segments")
    if segments:
        limits.append(max(segments - ONE_SEGMENT_MORE, 1) * KERNEL_PAGE)
    limits = [limit for limit in limits if limit]
    return 1 << min(limits).bit_length() - 1 if limits else None


def queue_depth(name: str, root: Path = ROOT) -> int | None:
    """Commands that the kernel has under way on one queue."""
    return _number(root / "sys/block" / name / "queue/nr_requests") or None


def uses(name: str, root: Path = ROOT) -> Iterator[Use]:
    """Of a namespace and its partitions: mounts by this process's view, swap, and devices on top of them."""
    place = root / "sys/block" / name
    parts = {name: place} | {found.parent.name: found.parent for found in sorted(place.glob("*/partition"))}
    numbers = {_text(part / "dev") for part in parts.values()} - {""}
    devices = {f"/dev/{part}" for part in parts}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        number, mountpoint, source = fields.split()[2], fields.split()[4], rest.split()[1]
        if number in numbers or source in devices:  # by name too: btrfs has numbers of its own
            mountpoint = mountpoint.replace("\\040", " ")
            yield Use(source, f"mounted at {mountpoint}", f"umount {mountpoint}")
    for line in _text(root / "proc/swaps").splitlines()[1:]:
        device = line.split()[0]
        if device in devices:
            yield Use(device, "in use for swapping", f"swapoff {device}")
    for part, place in parts.items():
        for holder in sorted((place / "holders").glob("*")):
            label = _text(root / "sys/block" / holder.name / "dm/name")
            what = f"held by {holder.name}" + (f" ({label})" if label else "")
            yield Use(f"/dev/{part}", what, "take it out of that (vgchange, dmsetup, mdadm)")


def refuse_if_used(name: str, root: Path = ROOT) -> None:
    """Raises NamespaceInUse."""
    for use in uses(name, root):
        raise NamespaceInUse(f"{use.device} is {use.what}: {use.remedy}, or name another namespace")


def claim(node: Node) -> int | None:
    """Hold the block device alone, as a mounted file system does; None where there is none.

    Raises NamespaceInUse, BadLocation.
    """
    if node.block is None:
        return None
    try:
        return os.open(node.block, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except PermissionError as error:
        raise not_permitted(node.block) from error
    except OSError as error:
        raise NamespaceInUse(
            f"{node.block} cannot be had alone ({os.strerror(error.errno)}):"
            f" end what uses it (lsof {node.block}), or name another namespace"
        ) from error


def open_for_commands(node: Node) -> int:
    """A descriptor. Raises BadLocation."""
    try:
        return os.open(node.path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise not_permitted(node.path) from error
    except OSError as error:
        raise BadLocation(f"{node.path}: {os.strerror(error.errno)}; see `dmesg`") from error


def not_permitted(path: str) -> BadLocation:
    return BadLocation(f"{path}: not permitted; run as root, or give this user the device and CAP_SYS_ADMIN")


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _text(file: Path) -> str:
    """Of a file that may be missing."""
    try:
        return file.read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(file: Path) -> int:
    """Zero where it is missing."""
    return int(_text(file) or 0)
