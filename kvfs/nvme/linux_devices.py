"""What Linux knows of NVMe without asking any drive: namespaces, what uses them, controllers it has given away.

Everything is read below a root, `/` but in tests: /sys, /proc, and /dev to see whether a device is claimed.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_glue.linux_nvme import node
from spdk_glue.transports.url import SPDK_SCHEME

ROOT = Path("/")
SECTOR_BYTES = 512  # in which sysfs counts, whatever the block is
NVME_CLASS = "0x010802"  # PCI class code: NVM Express I/O controller
USER_SPACE_DRIVERS = ("vfio-pci", "uio_pci_generic", "igb_uio")
NAMESPACE_NAME = re.compile(r"nvme(\d+)n(\d+)")  # not nvme0c0n1: one path of several to nvme0n1
LARGEST_BLOCK = 4096


@dataclass(frozen=True)
class LinuxNamespace:
    """A namespace of a controller that Linux drives.

    generic: its character device for commands, where the kernel has one; address: PCI, or of a fabric;
    used_bytes: None where the kernel does not tell; in_use: by what, a phrase each
    """

    device: str
    generic: str | None
    controller: str
    address: str
    transport: str
    model: str
    serial: str
    firmware: str
    nsid: int
    size_bytes: int
    block_bytes: int
    metadata_bytes: int
    used_bytes: int | None
    is_zoned: bool
    is_read_only: bool
    num_partitions: int
    in_use: tuple[str, ...]

    @property
    def location(self) -> str:
        """What kvfs opens it by."""
        return self.generic or self.device

    @property
    def why_not(self) -> str | None:
        """Why kvfs cannot take it; None if it can."""
        if self.in_use:
            return self.in_use[0]
        if self.num_partitions:
            return f"has {self.num_partitions} partition{'s' if self.num_partitions > 1 else ''}"
        if self.is_read_only:
            return "read-only"
        if self.metadata_bytes:
            return f"formatted with {self.metadata_bytes} bytes of metadata per block"
        if self.block_bytes > LARGEST_BLOCK:
            return f"blocks of more than {LARGEST_BLOCK} bytes"
        return None


@dataclass(frozen=True)
class PcieController:
    """An NVMe controller on PCIe that Linux's nvme driver does not have."""

    address: str
    vendor: int
    device: int
    driver: str | None
    iommu_group: str | None
    in_use: tuple[str, ...]

    @property
    def location(self) -> str:
        return SPDK_SCHEME + self.address

    @property
    def why_not(self) -> str | None:
        if self.in_use:
            return self.in_use[0]
        if self.driver is None:
            return f"without a driver: driverctl set-override {self.address} vfio-pci"
        if self.driver not in USER_SPACE_DRIVERS:
            return f"bound to {self.driver}"
        return None


def namespaces(root: Path = ROOT) -> list[LinuxNamespace]:
    """By name."""
    found = []
    for place in _entries(root / "sys/block"):
        if NAMESPACE_NAME.fullmatch(place.name):
            found.append(_namespace(root, place))
    return sorted(found, key=lambda one: [int(part) for part in re.findall(r"\d+", one.device)])


def _namespace(root: Path, place: Path) -> LinuxNamespace:
    owner = place / "device"  # the controller, or the subsystem where several controllers may reach it
    controller = _controller_of(root, place)
    block_bytes = int(_text(place / "queue/logical_block_size", "512"))
    used = _text(place / "nuse")
    generic = place.name.replace("nvme", "ng", 1)
    partitions = _partitions(place)
    return LinuxNamespace(
        device=f"/dev/{place.name}",
        generic=f"/dev/{generic}" if (root / "sys/class/nvme-generic" / generic).exists() else None,
        controller=controller.name,
        address=_text(controller / "address"),
        transport=_text(controller / "transport"),
        model=_text(owner / "model") or _text(controller / "model"),
        serial=_text(owner / "serial") or _text(controller / "serial"),
        firmware=_text(owner / "firmware_rev") or _text(controller / "firmware_rev"),
        nsid=int(_text(place / "nsid", "1")),
        size_bytes=int(_text(place / "size", "0")) * SECTOR_BYTES,
        block_bytes=block_bytes,
        metadata_bytes=int(_text(place / "metadata_bytes", "0")),
        used_bytes=int(used) * block_bytes if used else None,
        is_zoned=_text(place / "queue/zoned", "none") != "none",
        is_read_only=_text(place / "ro") == "1",
        num_partitions=len(partitions),
        in_use=tuple(_uses(root, place, partitions)),
    )


def _controller_of(root: Path, place: Path) -> Path:
    """Where sysfs describes the controller, the first of several."""
    owner = (place / "device").resolve()
    if re.fullmatch(r"nvme\d+", owner.name):
        return owner
    paths = sorted(entry for entry in _entries(owner) if re.fullmatch(r"nvme\d+", entry.name))
    number = NAMESPACE_NAME.fullmatch(place.name)[1]
    return paths[0] if paths else root / f"sys/class/nvme/nvme{number}"


def _partitions(place: Path) -> list[Path]:
    return [entry for entry in _entries(place) if (entry / "partition").exists()]


def _uses(root: Path, place: Path, partitions: list[Path]) -> Iterator[str]:
    found = [use.what for use in node.uses(place.name, root)]
    yield from found
    devices = [f"dev/{part.name}" for part in (place, *partitions)]
    if not found and any(_is_claimed(root / device) for device in devices):
        yield "claimed, perhaps by a file system of another mount namespace"


def _is_claimed(device: Path) -> bool:
    """Whether the kernel refuses a block device to who wants it alone."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def pcie_controllers(root: Path = ROOT) -> list[PcieController]:
    """NVMe controllers that the nvme driver does not have, by address."""
    found = []
    for place in sorted(_entries(root / "sys/bus/pci/devices")):
        driver = _link_name(place / "driver")
        if _text(place / "class") == NVME_CLASS and driver != "nvme":
            group = _link_name(place / "iommu_group")
            holders = _processes_with(root, f"/dev/vfio/{group}") if group else ()
            found.append(
                PcieController(
                    address=place.name,
                    vendor=int(_text(place / "vendor", "0"), 16),
                    device=int(_text(place / "device", "0"), 16),
                    driver=driver,
                    iommu_group=group,
                    in_use=tuple(f"in use by process {pid}" for pid in holders),
                )
            )
    return found


def _processes_with(root: Path, device: str) -> list[int]:
    """Those that have a device open, of the processes that this user may look into."""
    return sorted(
        int(process.name)
        for process in _entries(root / "proc")
        if process.name.isdigit() and any(_target(entry) == device for entry in _entries(process / "fd"))
    )


def why_in_use(location: str, root: Path = ROOT) -> str | None:
    """By what a namespace is in use, as far as Linux knows; None if by nothing, or Linux does not have it."""
    for one in namespaces(root):
        if location in (one.device, one.generic) and one.in_use:
            return ", ".join(one.in_use)
        if location == SPDK_SCHEME + one.address and one.in_use:
            return f"{one.device} is {', '.join(one.in_use)}"
    return None


def _entries(folder: Path) -> list[Path]:
    """Of a folder that may be missing, or another user's."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _text(file: Path, otherwise: str = "") -> str:
    try:
        return file.read_text(errors="replace").strip() or otherwise
    except OSError:
        return otherwise


def _link_name(link: Path) -> str | None:
    target = _target(link)
    return os.path.basename(target) if target else None


def _target(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except OSError:
        return None
