"""SPDK's environment: started once per process, memory that drives can reach.

Memory in huge pages is what PCIe drives need and what is fastest; without any SPDK takes ordinary memory, which
is enough for NVMe/TCP.
"""

import os
import threading
from pathlib import Path

import numpy as np

from spdk_glue import dma, pyspdk
from spdk_glue.status import NvmeError

DEFAULT_MEMORY_MB = 256
_lock = threading.Lock()
_started: dict[str, bool] | None = None  # the options it was started with


class SpdkUnavailable(NvmeError):
    """pyspdk is not built, or SPDK's environment cannot be started; says what to do."""


def library():
    """(ffi, lib) of the bindings. Raises SpdkUnavailable."""
    usable, why_not = pyspdk.available()
    if not usable:
        raise SpdkUnavailable(why_not)
    from spdk_glue.pyspdk._pyspdk import ffi, lib

    return ffi, lib


def last_error(otherwise: str) -> str:
    """What SPDK said last in this thread."""
    ffi, lib = library()
    return ffi.string(lib.pyspdk_last_error()).decode("utf-8", "replace").strip() or otherwise


def start(*, hugepages: bool | None = None, memory_mb: int | None = None, pci: bool = False) -> None:
    """Start SPDK in this process; later calls do nothing if what they ask for is there.

    hugepages: None to use them where enough are free, unless the variable KVFS_SPDK_HUGEPAGES is 0 or 1;
    memory_mb: what SPDK takes at once, 256 unless KVFS_SPDK_MEMORY_MB says otherwise; pci: whether PCIe drives
    will be used. Raises SpdkUnavailable, ValueError.
    """
    global _started
    ffi, lib = library()
    with _lock:
        if _started is not None:
            if pci and not _started["pci"]:
                raise SpdkUnavailable("SPDK runs without PCIe in this process: open PCIe drives before others")
            return
        hugepages, memory_mb = memory_options(hugepages, memory_mb, DEFAULT_MEMORY_MB)
        name = ffi.new("char[]", f"kvfs_{os.getpid()}".encode())
        options = ffi.new(
            "pyspdk_env_options *",
            {"name": name, "memory_mb": memory_mb, "hugepages": hugepages, "pci": pci},
        )
        if lib.pyspdk_env_start(options) < 0:
            where = f"{memory_mb} MB in huge pages" if hugepages else f"{memory_mb} MB without huge pages"
            raise SpdkUnavailable(f"SPDK does not start with {where}: {last_error('see the system log')}")
        _started = {"pci": pci, "hugepages": hugepages}


def memory_options(hugepages: bool | None, memory_mb: int | None, default_mb: int) -> tuple[bool, int]:
    """(whether to use huge pages, MiB to take): as asked for, else as variables of `start` say."""
    memory_mb = memory_mb or int(os.environ.get("KVFS_SPDK_MEMORY_MB", default_mb))
    if hugepages is None and "KVFS_SPDK_HUGEPAGES" in os.environ:
        hugepages = os.environ["KVFS_SPDK_HUGEPAGES"] not in ("", "0")
    if hugepages is None:
        hugepages = free_hugepages_mb() >= memory_mb
    return hugepages, memory_mb


def started_with() -> dict[str, bool] | None:
    """{"pci": ..., "hugepages": ...} once SPDK was started in this process, else None."""
    return _started


def free_hugepages_mb(meminfo: str | os.PathLike = "/proc/meminfo") -> int:
    """Memory in free huge pages of the default size, in MiB."""
    fields = dict(line.split(":", 1) for line in Path(meminfo).read_text().splitlines())
    pages = int(fields.get("HugePages_Free", "0"))
    return pages * int(fields.get("Hugepagesize", "0 kB").split()[0]) // 1024


def allocate(size_bytes: int) -> np.ndarray:
    """uint8 [size_bytes], zeroed, in memory that PCIe drives transfer to and from; freed with its last view.

    Raises MemoryError where SPDK has none left, SpdkUnavailable before `start`.
    """
    ffi, lib = library()
    if _started is None:
        raise SpdkUnavailable("SPDK has not been started in this process")
    if size_bytes <= 0:
        raise ValueError(f"a DMA buffer needs at least one byte, not {size_bytes}")
    alignment = dma.HUGE_PAGE if size_bytes >= dma.HUGE_PAGE else dma.ALIGNMENT
    memory = lib.pyspdk_allocate(size_bytes, alignment)
    if memory == ffi.NULL:
        raise MemoryError(
            f"SPDK has no {size_bytes} bytes left: set KVFS_SPDK_MEMORY_MB higher, reserve huge pages"
        )
    return np.frombuffer(ffi.buffer(ffi.gc(memory, lib.pyspdk_free, size_bytes), size_bytes), np.uint8)
