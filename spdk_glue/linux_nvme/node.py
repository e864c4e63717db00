"""The device nodes of an NVMe namespace under Linux: which they are, what the kernel limits, who uses them.

`/dev/ngXnY` takes any command and is the way that io_uring goes; `/dev/nvmeXnY` is the same namespace as a
block device, which file systems and others use. Facts come from /sys and /proc below `root` ("/" but in tests).
"""

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_glue.status import NvmeError
from spdk_glue.transports.url import BadLocation

NODE = re.compile(r"(ng|nvme)(\d+n\d+)(p\d+)?")
KERNEL_PAGE = 4096  # the smallest
ONE_SEGMENT_MORE = 1  # than it has pages: memory that begins within one


class NamespaceInUse(NvmeError):
    """Somebody else's data are, or may be, on the namespace; says whose, and how to proceed."""


@dataclass(frozen=True)
class Node:
    """A namespace by its nodes. `block` and `character` are paths, None where there is no such node."""

    character: str | None
    block: str | None
    block_name: str  # nvme0n1, as /sys has it

    @property
    def path(self) -> str:
        """The node that commands go to."""
        return self.character or self.block


def find(location: str, root: Path = Path("/")) -> Node:
    """Raises BadLocation for anything but a namespace, saying what would do."""
    path = _below(root, location).resolve()
    if not path.exists():
        raise BadLocation(f"{location}: no such device; `nvme list` shows the namespaces of this machine")
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


def _below(root: Path, path: str | Path) -> Path:
    return root / str(path).lstrip("/")


def _block_folder(name: str, root: Path) -> Path:
    return _below(root, "sys/class/block") / name


def _number(folder: Path, name: str) -> int | None:
    try:
        return int((folder / name).read_text())
    except FileNotFoundError:
        return None


def max_transfer_bytes(name: str, root: Path = Path("/")) -> int | None:
    """Of one command, so that the kernel takes it wherever its memory lies; None where /sys does not tell.

    A power of two, so that a long transfer is cut where the drive likes it.
    """
    queue = _block_folder(name, root) / "queue"
    limits = [_number(queue, entry) for entry in ("max_hw_sectors_kb", "max_sectors_kb")]
    limits = [limit << 10 for limit in limits if limit]
    segments = _number(queue, "max_segments")
    if segments:
        limits.append(max(segments - ONE_SEGMENT_MORE, 1) * KERNEL_PAGE)
    return 1 << min(limits).bit_length() - 1 if limits else None


def queue_depth(name: str, root: Path = Path("/")) -> int | None:
    """Commands that the kernel has under way on one queue."""
    return _number(_block_folder(name, root) / "queue", "nr_requests")


def refuse_if_used(name: str, root: Path = Path("/")) -> None:
    """Raises NamespaceInUse where a namespace or part of it is mounted, swap, or part of another device."""
    for use in _uses(name, root):
        raise NamespaceInUse(f"{use}, or name another namespace")


def _uses(name: str, root: Path) -> Iterator[str]:
    """What is said of each use, and how to end it."""
    folder = _block_folder(name, root)
    parts = {name: folder} | {entry.parent.name: entry.parent for entry in sorted(folder.glob("*/partition"))}
    numbers = {(part / "dev").read_text().strip() for part in parts.values() if (part / "dev").exists()}
    nodes = {f"/dev/{part}" for part in parts}
    for line in _lines(root, "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        number, place = fields.split()[2], fields.split()[4]
        source = rest.split()[1]
        if number in numbers or source in nodes:
            yield f"{source} is mounted at {place}: unmount it (umount {place})"
    for line in _lines(root, "proc/swaps")[1:]:
        if line.split()[0] in nodes:
            yield f"{line.split()[0]} is used as swap: switch it off (swapoff {line.split()[0]})"
    for part, place in parts.items():
        for holder in sorted((place / "holders").glob("*")):
            label = _below(root, f"sys/class/block/{holder.name}/dm/name")
            called = f" ({label.read_text().strip()})" if label.exists() else ""
            yield f"/dev/{part} is part of {holder.name}{called}: take it out (dmsetup, vgchange, mdadm)"


def _lines(root: Path, path: str) -> list[str]:
    """Of a file of /proc; spaces in names are written \\040 there."""
    try:
        text = _below(root, path).read_text(errors="surrogateescape")
    except FileNotFoundError:
        return []
    return text.splitlines()


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


def open_alone(node: Node) -> int:
    """A descriptor for commands. Raises NamespaceInUse where another process of ours has one, BadLocation."""
    try:
        fd = os.open(node.path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise not_permitted(node.path) from error
    except OSError as error:
        raise BadLocation(f"{node.path}: {os.strerror(error.errno)}; see `dmesg` and `nvme list`") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # where there is no block device to claim
    except BlockingIOError as error:
        os.close(fd)
        raise NamespaceInUse(
            f"{node.path} is open in another kvfs: end that, or name another namespace"
        ) from error
    return fd


def not_permitted(path: str) -> BadLocation:
    return BadLocation(f"{path}: not permitted; run as root, or give this user the device and CAP_SYS_ADMIN")
