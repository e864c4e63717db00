"""The Linux passthrough transport: commands for a namespace of the kernel's own NVMe driver.

They go to `/dev/ngXnY` through an io_uring for each queue pair, and by ioctl where Linux has no such ring
(before 5.19, forbidden, or only a block device there). Queues and command identifiers are the kernel's, so the
drive's error log does not know ours. Who is to write holds the block device beside it alone, so that nobody
mounts it meanwhile.
"""

import errno
import fcntl
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from spdk_glue import command, dma
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.identify import FLBAS_EXTENDED, FLBAS_FORMAT, IDENTIFY_NAMESPACE, Cns
from spdk_glue.linux_nvme import node
from spdk_glue.linux_nvme.api import Device, Ring, check_lengths, error_of, ioctl_transfer
from spdk_glue.queue_pair import Buffer, QueuePair, places
from spdk_glue.status import BadLocation, NvmeStatusError, decode

NVME_IOCTL_ID = 0x4E40
ADMIN_DEPTH = 32
MAX_QUEUE_DEPTH = 1024
DEFAULT_TRANSFER_BYTES = 128 << 10  # what every kernel takes, should /sys not tell


class LinuxTransport:
    """A connection to one namespace. use_uring=False forces ioctl (tests compare both)."""

    is_connected = True
    counters = None

    def __init__(self, device: Device, nsid: int, queue_depth: int, use_uring: bool = True):
        self.nsid = nsid
        self.max_transfer_bytes = device.max_transfer_bytes
        self._device = device
        self._queue_depth = queue_depth
        self._resources = ExitStack()
        self._connections: list[RingConnection | IoctlConnection] = []
        self.admin = QueuePair(IoctlConnection(device, is_admin=True), ADMIN_DEPTH)
        self.uses_uring = use_uring and self._ring_works()

    @staticmethod
    def open(location: str | os.PathLike, alone: bool = True, use_uring: bool = True) -> "LinuxTransport":
        """Reach a namespace by a device node.

        alone: nothing else may use it; without that, only what changes nothing may be sent

        Raises BadLocation where there is no namespace to be had, NamespaceInUse, ConnectionLost, OSError.
        """
        found = node.find(os.fspath(location))
        with ExitStack() as resources:
            if alone:
                node.refuse_if_used(found.name)
                held = node.claim(found)
                if held is not None:
                    resources.callback(os.close, held)
            fd = node.open_for_commands(found)
            resources.callback(os.close, fd)
            nsid = _namespace_id(fd, found.path)
            limit = node.max_transfer_bytes(found.name) or DEFAULT_TRANSFER_BYTES
            block_bytes = _block_bytes(Device(fd, found.path, 1, limit), nsid)
            depth = node.queue_depth(found.name) or MAX_QUEUE_DEPTH
            device = Device(fd, found.path, block_bytes, limit)
            transport = LinuxTransport(device, nsid, depth, use_uring)
            transport._resources = resources.pop_all()
        return transport

    def _ring_works(self) -> bool:
        """Whether a Read of one block comes through a ring: neither its creation nor the kernel's age tells."""
        entry, data = command.read(0, 1), dma.allocate(self._device.block_bytes)
        entry["nsid"] = self.nsid
        try:
            connection = RingConnection(self._device, depth=1)
        except NotImplementedError:
            return False
        try:
            connection.execute(entry, [data])
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def create_queue_pair(self, depth: int = 256) -> QueuePair:
        """As deep as wanted, or as the kernel's own queues are."""
        if depth > MAX_QUEUE_DEPTH:
            raise ValueError(f"this transport's queues are at most {MAX_QUEUE_DEPTH} deep, not {depth}")
        depth = min(depth, self._queue_depth)
        connection = RingConnection(self._device, depth) if self.uses_uring else IoctlConnection(self._device)
        self._connections.append(connection)
        return QueuePair(connection, depth)

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        return False

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        return False

    def close(self) -> None:
        """Waits for what is under way."""
        with self._resources:
            for connection in self._connections:
                connection.close()
            self.admin.close()


def _namespace_id(fd: int, path: str) -> int:
    try:
        return fcntl.ioctl(fd, NVME_IOCTL_ID)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        raise BadLocation(f"{path}: not a device of Linux's NVMe driver") from error


def _block_bytes(device: Device, nsid: int) -> int:
    """That a Read moves for each block: with its metadata, where they follow it."""
    entry, data = command.identify(Cns.NAMESPACE, nsid), np.zeros(IDENTIFY_NAMESPACE.itemsize, np.uint8)
    try:
        completion = IoctlConnection(device, is_admin=True).execute(entry, [data])[0]
    except PermissionError as error:
        raise node.not_permitted(device.path) from error
    if completion["status"]:
        raise NvmeStatusError(int(entry["opcode"][0]), decode(int(completion["status"])), nsid=nsid)
    geometry = data.view(IDENTIFY_NAMESPACE)[0]
    lba_format = geometry["lbaf"][int(geometry["flbas"]) & FLBAS_FORMAT]
    metadata_bytes = int(lba_format["ms"]) if int(geometry["flbas"]) & FLBAS_EXTENDED else 0
    return (1 << int(lba_format["lbads"])) + metadata_bytes


class RingConnection:
    """A queue pair's io_uring. Raises NotImplementedError where Linux has none for NVMe."""

    def __init__(self, device: Device, depth: int):
        self._ring = Ring(device, depth)
        self._depth = depth
        self._under_way: dict[int, Buffer] = {}  # by cid: kept alive, whatever becomes of the queue pair

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._ring.submit(entries, *places(buffers))
        self._under_way |= zip(entries["cid"].tolist(), buffers, strict=True)

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        return self._ring.transfer(entries, *places(buffers), self._depth)

    def poll(self, wait: bool) -> np.ndarray:
        completions = self._ring.poll(wait)
        for cid in completions["cid"].tolist():
            del self._under_way[cid]
        return completions

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        return self._ring.transfer(entries, addresses, lengths, depth)

    def close(self) -> None:
        self._ring.close()
        self._under_way.clear()


class IoctlConnection:
    """A queue pair whose commands each sleep in an ioctl. What is submitted runs on a thread of its own."""

    def __init__(self, device: Device, is_admin: bool = False):
        self._device = device
        self._is_admin = is_admin
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: deque[Future] = deque()

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvfs-nvme")
        check_lengths(self._device, self._is_admin, entries, *places(buffers))
        self._under_way.append(self._thread.submit(self.execute, entries.copy(), list(buffers)))

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        return ioctl_transfer(self._device, self._is_admin, entries, *places(buffers), len(entries))

    def poll(self, wait: bool) -> np.ndarray:
        arrived = [np.empty(0, COMPLETION_ENTRY)]
        if wait and not self._under_way:
            raise error_of(errno.ENODATA, self._device, "a submitted command")
        while self._under_way and (wait or self._under_way[0].done()):
            arrived.append(self._under_way.popleft().result())
            wait = False
        return np.concatenate(arrived)

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        return ioctl_transfer(self._device, self._is_admin, entries, addresses, lengths, depth)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
