"""Which namespace a device node is, and who uses it: kvfs must not write over somebody else's data."""

import os
import stat

import pytest

from spdk_glue.linux_nvme import node
from spdk_glue.linux_nvme.node import Node
from spdk_glue.status import NamespaceInUse
from spdk_glue.transports.linux import LinuxTransport
from spdk_glue.transports.url import BadLocation, is_nvme

MOUNTINFO = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


class Machine:
    """Files of /sys, /proc and /dev: namespace 1 of controller 0, 259:0, with a partition 259:1."""

    def __init__(self, root):
        self.root = root
        self.disk = root / "sys/block/nvme0n1"
        self.partition = self.disk / "nvme0n1p1"
        for folder in (self.disk / "queue", self.disk / "holders", self.partition / "holders", root / "dev"):
            folder.mkdir(parents=True)
        self.write("sys/block/nvme0n1/dev", "259:0\n")
        self.write("sys/block/nvme0n1/nvme0n1p1/dev", "259:1\n")
        self.write("sys/block/nvme0n1/nvme0n1p1/partition", "1\n")
        self.write("proc/self/mountinfo", MOUNTINFO)
        self.write("proc/swaps", SWAPS)

    def write(self, path, text):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def refusal(self):
        with pytest.raises(NamespaceInUse) as caught:
            node.refuse_if_used("nvme0n1", self.root)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_unused(machine):
    """Others' mounts and swap are no reason to refuse."""
    machine.write("proc/self/mountinfo", MOUNTINFO + "40 22 259:10 / /data rw - ext4 /dev/nvme0n10 rw\n")
    machine.write("proc/swaps", SWAPS + "/dev/nvme0n10 partition 1 0 -2\n")
    node.refuse_if_used("nvme0n1", machine.root)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "40 22 259:0 / /data rw,relatime - ext4 /dev/nvme0n1 rw",
            "/dev/nvme0n1 is mounted at /data: umount /data, or name another namespace",
        ),
        ("40 22 259:1 / /data rw shared:7 - xfs /dev/nvme0n1p1 rw", "/dev/nvme0n1p1 is mounted at /data"),
        ("40 22 259:1 / /data rw - ext4 /dev/root rw", "/dev/root is mounted at /data"),
        ("40 22 0:35 /@ /data rw - btrfs /dev/nvme0n1p1 rw,space_cache", "is mounted at /data"),
    ],
)
def test_mounted(machine, line, says):
    """By number, since names differ, and by name, since btrfs has numbers of its own."""
    machine.write("proc/self/mountinfo", f"{MOUNTINFO}{line}\n")
    assert says in machine.refusal()


@pytest.mark.parametrize("name", ["nvme0n1", "nvme0n1p1"])
def test_swap(machine, name):
    machine.write("proc/swaps", f"{SWAPS}/dev/{name}\tpartition\t1048572\t0\t-2\n")
    assert machine.refusal().startswith(f"/dev/{name} is in use for swapping: swapoff /dev/{name}, or")


@pytest.mark.parametrize("name", ["nvme0n1", "nvme0n1p1"])
def test_holders(machine, name):
    """A logical volume or an array on it."""
    place = machine.disk if name == "nvme0n1" else machine.partition
    (place / "holders/md0").mkdir()
    assert machine.refusal().startswith(f"/dev/{name} is held by md0: take it out")
    (place / "holders/md0").rename(place / "holders/dm-3")
    machine.write("sys/block/dm-3/dm/name", "vg-root\n")
    assert f"/dev/{name} is held by dm-3 (vg-root)" in machine.refusal()


@pytest.mark.parametrize(
    ("hardware", "soft", "segments", "limit"),
    [
        (2048, 1280, 127, 256 << 10),
        (128, 128, 127, 128 << 10),
        (2147483644, 1280, 65535, 1024 << 10),
        (512, 4, 127, 4 << 10),
        (512, 512, None, 512 << 10),
        (None, None, None, None),
    ],
)
def test_transfer_limit(machine, hardware, soft, segments, limit):
    """What Linux takes whatever the memory: hardware limit, configured limit, and pieces of memory."""
    names = {"max_hw_sectors_kb": hardware, "max_sectors_kb": soft, "max_segments": segments}
    for name, value in names.items():
        if value is not None:
            machine.write(f"sys/block/nvme0n1/queue/{name}", f"{value}\n")
    assert node.max_transfer_bytes("nvme0n1", machine.root) == limit


def test_queue_depth(machine):
    assert node.queue_depth("nvme0n1", machine.root) is None
    machine.write("sys/block/nvme0n1/queue/nr_requests", "1023\n")
    assert node.queue_depth("nvme0n1", machine.root) == 1023


def test_not_namespaces(machine):
    """Each has its line; none may be opened as a file would be."""
    for name in ("ng0n2", "nvme0n1p1", "sda", "nvme0"):
        machine.write(f"dev/{name}", "")
    for location, says in (
        ("/dev/ng9n9", "no such device; kvfsctl nvme list"),
        ("/dev/ng0n2", "not a device"),
        ("/dev/nvme0n1p1", "a partition; kvfs takes a whole namespace, such as /dev/ng0n1"),
        ("/dev/sda", "not an NVMe namespace"),
        ("/dev/nvme0", "not an NVMe namespace"),
    ):
        with pytest.raises(BadLocation, match=says) as caught:
            node.find(location, machine.root)
        assert str(caught.value).startswith(f"{location}: ")
    with pytest.raises(BadLocation, match="not an NVMe namespace"):
        LinuxTransport.open("/dev/null")


def make_device(path, kind):
    try:
        os.mknod(path, 0o600 | kind, os.makedev(1, 3) if kind == stat.S_IFCHR else os.makedev(7, 200))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def test_siblings(machine):
    """Either node leads to both; a stable name leads to its namespace."""
    dev = machine.root / "dev"
    make_device(dev / "nvme0n1", stat.S_IFBLK)
    assert node.find("/dev/nvme0n1", machine.root) == Node(None, str(dev / "nvme0n1"), "nvme0n1")
    make_device(dev / "ng0n1", stat.S_IFCHR)
    wanted = Node(str(dev / "ng0n1"), str(dev / "nvme0n1"), "nvme0n1")
    (dev / "disk/by-id").mkdir(parents=True)
    (dev / "disk/by-id/nvme-Maker_Model_S1").symlink_to("../../nvme0n1")
    for location in ("/dev/nvme0n1", "/dev/ng0n1", "/dev/disk/by-id/nvme-Maker_Model_S1"):
        found = node.find(location, machine.root)
        assert (found, found.path) == (wanted, str(dev / "ng0n1"))
        assert is_nvme(location)
    (dev / "nvme0n1").unlink()
    assert node.find("/dev/ng0n1", machine.root).block is None


def test_no_driver(machine):
    """A node whose driver is not Linux's NVMe driver (here /dev/null's)."""
    make_device(machine.root / "dev/ng0n1", stat.S_IFCHR)
    with pytest.raises(BadLocation, match="not a device of Linux's NVMe driver"):
        LinuxTransport.open(machine.root / "dev/ng0n1")


def test_locations():
    for text in ("/dev/ng0n1", "/dev/nvme12n3", "/dev/disk/by-id/nvme-Maker_Model_S1"):
        assert is_nvme(text)
    for text in ("/dev/nvme0", "/dev/nvme0n1p1", "/dev/sda", "/dev/disk/by-id/ata-x", "drive.kvfs"):
        assert not is_nvme(text)
