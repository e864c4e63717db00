"""kvfsctl doctor: each check on machines that have what it looks for and on such that have not."""

import errno
import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_nvme_sysfs import FakeMachine, write

from kvfsctl import doctor
from kvfsctl import doctor_hardware as hardware
from kvfsctl import doctor_software as software
from kvfsctl.doctor_check import MISSING, OK, OPTIONAL, Machine

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """With nothing in it."""
    return Machine(root=tmp_path, folder=tmp_path, which=lambda name: None, is_root=False)


def marks(findings):
    return [finding.mark for finding in findings]


def only(findings):
    (finding,) = findings
    assert (finding.todo == "") == (finding.mark == OK)
    return finding


def test_this_machine():
    """As a user runs it: the tests run here, so nothing that kvfs needs is missing."""
    result = subprocess.run(
        [sys.executable, "-m", "kvfsctl", "doctor", "--json"], capture_output=True, text=True
    )
    document = json.loads(result.stdout)
    assert (result.returncode, document["schema"], document["num_missing"]) == (0, 1, 0), result
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["kvfs"]["mark"] == found["Python"]["mark"] == OK
    assert all(finding["todo"] for finding in document["findings"] if finding["mark"] != OK)
    table = subprocess.run([sys.executable, "-m", "kvfsctl", "doctor"], capture_output=True, text=True)
    assert table.returncode == 0 and "what to do" in table.stdout


def test_exit_code_and_broken_checks(machine, capsys):
    """1 where something is missing; a check that cannot run does not hide the others."""

    def broken_check(machine):
        raise ImportError("No module named 'apsw'")

    findings = list(doctor.examine(machine, [broken_check, software.python]))
    assert marks(findings) == [OPTIONAL, OK] and "apsw" in findings[0].found
    assert doctor.show(findings, json_output=False) == 0
    old = list(doctor.examine(replace(machine, python=(3, 10, 1)), [software.python]))
    assert marks(old) == [MISSING]
    assert doctor.show(old, json_output=False) == 1
    assert "3.10.1" in capsys.readouterr().out


def test_runs_without_packages():
    """Who needs it most lacks a package: doctor says so instead of a traceback."""
    code = """
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "apsw"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
sys.argv = ["kvfsctl", "doctor", "--json"]
runpy.run_module("kvfsctl", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "", result
    found = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found["kvfs"]["mark"] == MISSING and "No module named" in found["kvfs"]["found"]


def test_kernel(machine):
    assert only(software.kernel(machine)).mark == MISSING
    write(machine.root / "proc/sys/kernel/osrelease", "6.1.0\n")
    assert "6.1.0" in only(software.kernel(machine)).found


def test_packages(machine):
    wanted = ["numpy>=1.26", 'torch==2.13.0; extra == "transformers"', 'pytest; extra == "test"', "rich>=13"]
    versions = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "rich": "13.0"}
    with_versions = replace(machine, version=versions.get)
    assert [one.found for one in software.packages(with_versions, wanted)] == [
        "numpy 2.4.6, rich 13.0",
        "torch 2.13.0+cpu",
    ]
    versions |= {"numpy": "1.25.9", "torch": "2.12.0", "rich": None}
    numpy, torch, rich = software.packages(with_versions, wanted)
    assert (numpy.mark, numpy.found) == (MISSING, "1.25.9, wanted >=1.26")
    assert numpy.todo == "kvfs needs it: pip install 'numpy>=1.26'"
    assert torch.mark == OPTIONAL and "torch==2.13.0" in torch.todo
    assert (rich.mark, rich.found) == (MISSING, "not installed")


@pytest.mark.parametrize(
    ("version", "limits", "holds"),
    [
        ("1.26", ">=1.26.0", True),
        ("1.9", ">=1.10", False),
        ("5.30", "<6,>=5.19", True),
        ("6.0.1", "<6,>=5.19", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("1", "", True),
        ("4.0rc1", ">=4.0", True),
    ],
)
def test_versions(version, limits, holds):
    assert software.is_within(version, limits) is holds


def test_every_requirement_is_read():
    """A requirement of another form than is expected here would not be looked for."""
    for requirement in software.requirements():
        name, limits, _ = software.REQUIREMENT.match(requirement).groups()
        assert requirement.startswith(name) and software.is_within("0", limits) in (True, False)
    assert any(requirement.startswith("numba") for requirement in software.requirements())


def test_io_uring(machine):
    assert only(software.io_uring(machine, lambda: True)).mark == OK
    assert "container" in only(software.io_uring(machine, lambda: False)).todo
    write(machine.root / "proc/sys/kernel/io_uring_disabled", "2\n")
    assert "sysctl kernel.io_uring_disabled=0" in only(software.io_uring(machine, lambda: False)).todo


def test_fuse(machine):
    assert marks(software.fuse(machine)) == [OPTIONAL, OPTIONAL]
    write(machine.root / "dev/fuse")
    assert marks(software.fuse(replace(machine, which=lambda name: f"/usr/bin/{name}"))) == [OK, OK]


def test_spdk_and_fio(machine):
    missing = only(software.spdk(machine, lambda: (False, "pyspdk was not built")))
    assert missing.mark == OPTIONAL and "pyspdk was not built" in missing.todo
    assert only(software.spdk(machine, lambda: (True, ""))).mark == OK
    assert only(software.fio(machine)).mark == OPTIONAL
    assert only(software.fio(replace(machine, which=lambda name: "/usr/bin/fio"))).mark == OK


def test_cpu(machine):
    assert only(hardware.cpu(machine, lambda: "portable")).mark == OPTIONAL
    write(machine.root / "proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sse2 fma avx2 f16c\n")
    assert only(hardware.cpu(machine, lambda: "AVX2")).found == "avx2, fma, f16c; kernels: AVX2"
    for node in range(2):
        (machine.root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    assert "2 NUMA nodes" in only(hardware.cpus(machine)).found


def test_memory(machine):
    """The least limit of the groups above counts, of either version."""
    write(machine.root / "proc/meminfo", f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    assert only(hardware.memory(machine)).found == "16.0 GiB, 8.0 GiB available, no limit by control groups"
    write(machine.root / "proc/self/cgroup", "0::/user/job\n")
    write(machine.root / "sys/fs/cgroup/user/job/memory.max", "max\n")
    write(machine.root / "sys/fs/cgroup/user/memory.max", f"{2 * GIB}\n")
    assert hardware.control_group_limit(machine) == 2 * GIB
    assert only(hardware.memory(machine)).mark == OK
    write(machine.root / "proc/self/cgroup", "4:cpu,memory:/box\n0::/\n")
    write(machine.root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{(1 << 63) - 4096}\n")
    assert hardware.control_group_limit(machine) is None
    write(machine.root / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{GIB // 2}\n")
    assert hardware.control_group_limit(machine) == GIB // 2
    assert only(hardware.memory(machine)).mark == OPTIONAL


def test_huge_pages(machine):
    meminfo = "HugePages_Total: {}\nHugePages_Free: {}\nHugepagesize: 2048 kB\n"
    write(machine.root / "proc/meminfo", meminfo.format(100, 28))
    reserved, transparent = hardware.huge_pages(machine)
    assert "sysctl vm.nr_hugepages=200" in reserved.todo  # what is in use stays in use
    assert transparent.mark == OPTIONAL
    write(machine.root / "proc/meminfo", meminfo.format(256, 128))
    for chosen, mark in (("always [madvise] never", OK), ("always madvise [never]", OPTIONAL)):
        write(machine.root / "sys/kernel/mm/transparent_hugepage/enabled", chosen + "\n")
        assert marks(hardware.huge_pages(machine)) == [OK, mark]


def test_vfio(machine):
    assert "modprobe vfio-pci" in only(hardware.vfio(machine)).todo
    write(machine.root / "dev/vfio/vfio")
    (machine.root / "sys/kernel/iommu_groups/0").mkdir(parents=True)
    assert only(hardware.vfio(machine)).mark == OK


def test_nvme(machine):
    assert only(hardware.nvme(machine)).found == "none"
    fake = FakeMachine(machine.root)
    fake.namespace(1, ro="1")
    assert only(hardware.nvme(machine)).mark == OPTIONAL
    fake.pcie_controller("0000:02:00.0", "vfio-pci")
    assert only(hardware.nvme(machine)).found == "2, of which kvfs can take spdk:0000:02:00.0"


def test_direct_io(machine):
    def refuse(number):
        def attempt(folder):
            raise OSError(number, "no")

        return attempt

    assert only(hardware.direct_io(machine, lambda folder: None)).mark == OK
    assert "ext4" in only(hardware.direct_io(machine, refuse(errno.EINVAL))).todo
    assert "cannot write" in only(hardware.direct_io(machine, refuse(errno.EACCES))).found
    only(hardware.direct_io(machine))  # whatever file system this is
    assert list(machine.folder.iterdir()) == []


def test_limits(machine):
    assert only(hardware.control_groups(machine, lambda: True)).mark == OK
    assert "systemd-run" in only(hardware.control_groups(machine, lambda: False)).todo
    assert only(hardware.memlock(machine, 8 << 20)).mark == OPTIONAL
    assert only(hardware.memlock(replace(machine, is_root=True), 8 << 20)).mark == OK
    assert only(hardware.memlock(machine, resource.RLIM_INFINITY)).found == "unlimited"
