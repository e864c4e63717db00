"""Checks of `kvfsctl doctor`: CPU, memory, NVMe devices, the folder's file system, limits."""

import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

from kvfsctl.doctor_check import OK, OPTIONAL, Finding, Machine, verdict

KERNEL_FEATURES = ("avx2", "fma", "f16c", "avx512f", "neon", "asimd")
SPDK_MEMORY_BYTES = 256 << 20  # what SPDK takes at once: see spdk_glue/pyspdk/environment.py
MEMORY_MIN_BYTES = 1 << 30
MEMLOCK_MIN_BYTES = 512 << 20
NO_LIMIT_V1 = 1 << 60  # a control group of version 1 without a limit has nearly 2**63
BLOCK = 4096


def cpu(machine: Machine, path: Callable[[], str] | None = None) -> list[Finding]:
    """What attention kernels use of it."""
    if path is None:
        from kvfs.machine import host_target_name as path
    lines = machine.text("proc/cpuinfo").splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    has = [feature for feature in KERNEL_FEATURES if feature in flags]
    chosen = path()
    found = f"{', '.join(has) or 'no vector extension'}; kernels: {chosen}"
    todo = "faster attention: a CPU with AVX2, FMA and F16C (of a virtual machine: the host's CPU model)"
    return [verdict("CPU", not chosen.startswith("portable"), found, todo)]


def cpus(machine: Machine) -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    nodes = len(list((machine.root / "sys/devices/system/node").glob("node[0-9]*"))) or 1
    present = machine.text("sys/devices/system/cpu/online").strip()
    found = f"{usable} to use (online: {present or 'not known'}), {nodes} NUMA node{'s' if nodes > 1 else ''}"
    return [Finding("CPUs", OK, found)]


def memory(machine: Machine) -> list[Finding]:
    from kvfs.sizes import format_size

    info = machine.meminfo()
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    limit = control_group_limit(machine)
    found = f"{format_size(total)}, {format_size(available)} available"
    found += f", limited to {format_size(limit)}" if limit else ", no limit by control groups"
    enough = min(available, limit or available) >= MEMORY_MIN_BYTES
    return [verdict("memory", enough, found, "1 GiB to use: a larger control group, or a smaller cache_bytes")]


def control_group_limit(machine: Machine) -> int | None:
    """Bytes: the least limit of this process's group and those above it."""
    limits = []
    for line in machine.text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, file = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            text = machine.text(f"{top}/{folder}/{file}").strip()
            if text.isdigit() and int(text) < NO_LIMIT_V1:
                limits.append(int(text))
    return min(limits, default=None)


def huge_pages(machine: Machine) -> list[Finding]:
    from kvfs.sizes import format_size

    info = machine.meminfo()
    total, free, size = (info.get(name, 0) for name in ("HugePages_Total", "HugePages_Free", "Hugepagesize"))
    found = f"{total} of {format_size(size)}, {free} free"
    wanted = -(-SPDK_MEMORY_BYTES // (size or 2 << 20))
    todo = f"for SPDK on PCIe: sysctl vm.nr_hugepages={total + max(0, wanted - free)}"
    transparent = machine.text("sys/kernel/mm/transparent_hugepage/enabled")
    chosen = transparent.partition("[")[2].partition("]")[0] or "not in this kernel"
    help_transparent = "faster: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    return [
        verdict("huge pages", free * size >= SPDK_MEMORY_BYTES, found, todo),
        verdict("transparent huge pages", chosen in ("always", "madvise"), chosen, help_transparent),
    ]


def vfio(machine: Machine) -> list[Finding]:
    """Whether SPDK could have a PCIe drive of this machine."""
    groups = machine.root / "sys/kernel/iommu_groups"
    has_iommu = groups.is_dir() and any(groups.iterdir())
    has_vfio = (machine.root / "dev/vfio/vfio").exists()
    found = f"{'an' if has_iommu else 'no'} IOMMU, {'' if has_vfio else 'no '}/dev/vfio"
    steps = ([] if has_iommu else ["switch the IOMMU on in the firmware"]) + (
        [] if has_vfio else ["modprobe vfio-pci"]
    )
    todo = f"for SPDK on PCIe: {', '.join(steps)}"
    return [verdict("VFIO", has_iommu and has_vfio, found, todo)]


def nvme(machine: Machine) -> list[Finding]:
    from kvfs.nvme.linux_devices import namespaces, pcie_controllers

    found = [*namespaces(machine.root), *pcie_controllers(machine.root)]
    free = [one.location for one in found if one.why_not is None]
    if not found:
        return [Finding("NVMe devices", OPTIONAL, "none", "nothing: drives are kept in files")]
    text = f"{len(found)}, of which kvfs can take {', '.join(free) or 'none'}"
    return [verdict("NVMe devices", bool(free), text, "kvfsctl nvme list says why not")]


def direct_io(machine: Machine, attempt: Callable[[Path], None] | None = None) -> list[Finding]:
    """Whether drives in files of the folder bypass the page cache."""
    name, folder = "direct I/O", machine.folder.resolve()
    try:
        (attempt or write_directly)(machine.folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            todo = "keep drives on ext4, XFS or Btrfs: through the page cache they are slower"
            return [Finding(name, OPTIONAL, f"{folder}: the file system has none", todo)]
        found = f"{folder}: cannot write there: {error.strerror}"
        return [Finding(name, OPTIONAL, found, "run it in the folder where drives are to be")]
    return [Finding(name, OK, f"works in {folder}")]


def write_directly(folder: Path) -> None:
    """Raises OSError where that fails; nothing is left behind."""
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, mmap.mmap(-1, BLOCK), 0)
    finally:
        os.close(descriptor)


def control_groups(machine: Machine, can_cap: Callable[[], bool] | None = None) -> list[Finding]:
    works = (can_cap or _can_cap_memory)()
    found = "memory can be capped" if works else "no group with a memory limit can be made"
    todo = "for bench decode: run as root, or systemd-run --user --scope -p Delegate=yes kvfsctl ..."
    return [verdict("control groups", works, found, todo)]


def _can_cap_memory() -> bool:
    from kvfs_bench.memory_cap import memory_cap

    with memory_cap("kvfs-doctor", MEMORY_MIN_BYTES) as cap:
        return cap is not None


def memlock(machine: Machine, limit: int | None = None) -> list[Finding]:
    """limit: bytes, resource.RLIM_INFINITY, or None to ask."""
    from kvfs.sizes import format_size

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    unlimited = limit == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else format_size(limit)
    if machine.is_root:
        found += ", which root may exceed"
    good = unlimited or machine.is_root or limit >= MEMLOCK_MIN_BYTES
    todo = "for SPDK without root: ulimit -l unlimited (memlock in /etc/security/limits.conf)"
    return [verdict("locked memory", good, found, todo)]


CHECKS = [cpu, cpus, memory, huge_pages, direct_io, nvme, vfio, memlock, control_groups]
