"""A machine with NVMe devices below a folder: /sys, /proc and /dev as Linux shows them."""

SIZE_SECTORS = 1 << 21  # 1 GiB


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class FakeMachine:
    """root: what stands for `/`."""

    def __init__(self, root):
        self.root = root
        write(root / "proc/self/mountinfo", "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n")
        write(root / "proc/swaps", "Filename\t\tType\tSize\tUsed\tPriority\n")
        (root / "sys/block").mkdir(parents=True)

    def namespace(self, controller: int, nsid: int = 1, block_bytes: int = 512, **attributes):
        """A namespace of a controller of its own; attributes: files of its folder. Its folder."""
        owner = self.root / f"sys/devices/pci0000:00/0000:0{controller}:00.0/nvme/nvme{controller}"
        for name, text in {
            "model": f"ACME Flash {controller}          ",
            "serial": f"S{controller:04}  ",
            "firmware_rev": "1.0",
            "address": f"0000:0{controller}:00.0",
            "transport": "pcie",
        }.items():
            write(owner / name, text + "\n")
        name = f"nvme{controller}n{nsid}"
        place = owner / name
        for file, text in {
            "size": str(SIZE_SECTORS),
            "nsid": str(nsid),
            "ro": "0",
            "dev": f"259:{controller}",
            "queue/logical_block_size": str(block_bytes),
            "queue/zoned": "none",
            **attributes,
        }.items():
            write(place / file, text + "\n")
        (place / "holders").mkdir()
        (place / "device").symlink_to(owner)
        (self.root / "sys/block" / name).symlink_to(place)
        (self.root / "sys/class/nvme-generic" / f"ng{controller}n{nsid}").mkdir(parents=True)
        return place

    def partition(self, place, number: int):
        """A partition of a namespace's folder. Its folder."""
        part = place / f"{place.name}p{number}"
        write(part / "partition", f"{number}\n")
        write(part / "dev", f"259:{100 + number}\n")
        (part / "holders").mkdir()
        return part

    def mount(self, number: str, source: str, mountpoint: str):
        with (self.root / "proc/self/mountinfo").open("a") as file:
            file.write(f"30 21 {number} / {mountpoint} rw shared:2 - xfs {source} rw\n")

    def pcie_controller(self, address: str, driver: str | None, group: str | None = None):
        place = self.root / "sys/bus/pci/devices" / address
        write(place / "class", "0x010802\n")
        write(place / "vendor", "0x1b36\n")
        write(place / "device", "0x0010\n")
        if driver is not None:
            (place / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
        if group is not None:
            (place / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{group}")
