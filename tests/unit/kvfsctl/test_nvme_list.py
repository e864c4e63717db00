"""What Linux has of NVMe, and what of it kvfs may take, on machines that are folders."""

import json

import pytest
from fake_nvme_sysfs import FakeMachine, write

from kvfs.nvme.linux_devices import namespaces, pcie_controllers, why_in_use
from kvfsctl import nvme_list


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


def test_namespaces(machine):
    """Facts of a drive: wrong ones, and the wrong drive is formatted."""
    machine.namespace(1, block_bytes=4096, nuse="1000")
    machine.namespace(10)
    machine.namespace(2)
    found = namespaces(machine.root)
    assert [one.device for one in found] == ["/dev/nvme1n1", "/dev/nvme2n1", "/dev/nvme10n1"]
    first, second, _ = found
    assert (first.generic, first.controller, first.address) == ("/dev/ng1n1", "nvme1", "0000:01:00.0")
    assert (first.model, first.serial, first.firmware) == ("ACME Flash 1", "S0001", "1.0")
    assert (first.size_bytes, first.block_bytes, first.used_bytes) == (1 << 30, 4096, 4_096_000)
    assert (second.block_bytes, second.used_bytes) == (512, None)
    assert first.in_use == () and first.why_not is None


def test_several_paths(machine):
    """Native multipath: the namespace hangs below a subsystem, and its paths are no namespaces."""
    subsystem = machine.root / "sys/devices/virtual/nvme-subsystem/nvme-subsys3"
    write(subsystem / "model", "ACME Shared\n")
    write(subsystem / "serial", "S9\n")
    write(subsystem / "firmware_rev", "2.0\n")
    write(subsystem / "nvme3" / "address", "traddr=192.0.2.1,trsvcid=4420\n")
    write(subsystem / "nvme3" / "transport", "tcp\n")
    place = subsystem / "nvme3n1"
    write(place / "size", "2048\n")
    (place / "device").symlink_to(subsystem)
    (machine.root / "sys/block/nvme3n1").symlink_to(place)
    (machine.root / "sys/block/nvme3c3n1").mkdir()
    (one,) = namespaces(machine.root)
    assert (one.model, one.serial, one.controller, one.transport) == ("ACME Shared", "S9", "nvme3", "tcp")
    assert one.generic is None and one.location == "/dev/nvme3n1"


def test_in_use(machine):
    """Mounts, swap and holders, of partitions too: a drive in use that is offered is a drive lost."""
    mounted = machine.namespace(1)
    machine.mount("259:1", "/dev/nvme1n1", "/mnt/my\\040data")
    part = machine.partition(machine.namespace(2), 1)
    machine.mount("0:45", "/dev/nvme2n1p1", "/btrfs")  # with a device number of its own
    (part / "holders/dm-0").mkdir()
    machine.partition(machine.namespace(3), 2)
    with (machine.root / "proc/swaps").open("a") as file:
        file.write("/dev/nvme3n1p2 partition 1024 0 -2\n")
    machine.partition(machine.namespace(4), 1)
    found = {one.device: one for one in namespaces(machine.root)}
    assert mounted.name == "nvme1n1"
    assert found["/dev/nvme1n1"].in_use == ("mounted at /mnt/my data",)
    assert found["/dev/nvme2n1"].in_use == ("mounted at /btrfs", "held by dm-0")
    assert found["/dev/nvme3n1"].in_use == ("in use for swapping",)
    assert found["/dev/nvme4n1"].in_use == () and found["/dev/nvme4n1"].why_not == "has 1 partition"
    assert why_in_use("/dev/nvme1n1", machine.root) == "mounted at /mnt/my data"
    assert why_in_use("/dev/ng1n1", machine.root) == "mounted at /mnt/my data"  # the way around the block layer
    assert "mounted at /btrfs" in why_in_use("spdk:0000:02:00.0", machine.root)
    assert why_in_use("/dev/nvme4n1", machine.root) is None
    assert why_in_use("drive.kvfs", machine.root) is None


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"ro": "1"}, "read-only"),
        ({"metadata_bytes": "8"}, "formatted with 8 bytes of metadata per block"),
        ({"queue/logical_block_size": "16384"}, "blocks of more than 4096 bytes"),
    ],
)
def test_what_kvfs_cannot_take(machine, attributes, why):
    machine.namespace(1, **attributes)
    assert namespaces(machine.root)[0].why_not == why


def test_controllers_for_spdk(machine):
    """Those bound to a driver for user space, or to none; not the kernel's, nor another process's."""
    machine.pcie_controller("0000:01:00.0", "nvme")
    machine.pcie_controller("0000:02:00.0", "vfio-pci", "7")
    machine.pcie_controller("0000:03:00.0", None)
    machine.pcie_controller("0000:04:00.0", "vfio-pci", "8")
    machine.pcie_controller("0000:05:00.0", "xen")
    write(machine.root / "sys/bus/pci/devices/0000:06:00.0/class", "0x030000\n")
    (machine.root / "proc/77/fd").mkdir(parents=True)
    (machine.root / "proc/77/fd/5").symlink_to("/dev/vfio/8")
    found = pcie_controllers(machine.root)
    assert [one.location for one in found] == [f"spdk:0000:0{i}:00.0" for i in (2, 3, 4, 5)]
    free, driverless, busy, other = found
    assert (free.vendor, free.device, free.why_not) == (0x1B36, 0x0010, None)
    assert driverless.why_not == "without a driver: driverctl set-override 0000:03:00.0 vfio-pci"
    assert busy.why_not == "in use by process 77"
    assert other.why_not == "bound to xen"


def test_list(machine, capsys):
    """The verb: a table, JSON, and a line where there is nothing."""
    nvme_list.show(nvme_list.rows(machine.root), json_output=False)
    assert "no NVMe devices" in capsys.readouterr().out
    machine.namespace(1, nuse="2048")
    machine.mount("259:1", "/dev/nvme1n1", "/data")
    machine.pcie_controller("0000:02:00.0", "vfio-pci", "7")
    rows = nvme_list.rows(machine.root)
    nvme_list.show(rows, json_output=True)
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["verb"]) == (1, "nvme list")
    namespace, controller = document["devices"]
    assert namespace["location"] == "/dev/ng1n1" and namespace["used_bytes"] == 1 << 20
    assert namespace["in_use"] == ["mounted at /data"] and not namespace["can_take"]
    assert controller["location"] == "spdk:0000:02:00.0" and controller["can_take"]
    nvme_list.show(rows, json_output=False)
    assert "ACME" in capsys.readouterr().out
