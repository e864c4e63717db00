"""The transport over SPDK's driver: PCIe, NVMe/TCP and vfio-user.

What a lost connection interrupted is sent again once it is back, if doing it twice is the same as once; all
else is reported. Writes that no Flush had made durable may be gone when the drive comes back, since it may have
lost power meanwhile: if it has a volatile cache, every later Flush fails, and who relies on one has to recover.
"""

import re
from collections.abc import Sequence

import numpy as np

from spdk_glue import dma
from spdk_glue import status as nvme_status
from spdk_glue.command import COMPLETION_ENTRY, IoOpcode
from spdk_glue.pyspdk import environment
from spdk_glue.pyspdk.controller import MAX_QUEUE_DEPTH, Controller
from spdk_glue.pyspdk.controller import QueuePair as SpdkQueuePair
from spdk_glue.queue_pair import Buffer, QueuePair, places
from spdk_glue.status import ConnectionLost, NvmeError, Status

PCIE_ADDRESS = re.compile(r"([0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)
NAMESPACE_KEY = re.compile(r"(?:^|\s)ns[:=](\d+)(?=\s|$)")
HOSTNQN_KEY = re.compile(r"(?:^|\s)hostnqn[:=](\S+)")
SOCKET_TRANSFER_BYTES = 128 << 10
REPEATABLE = [
    IoOpcode.FLUSH,
    IoOpcode.WRITE,
    IoOpcode.READ,
    IoOpcode.COMPARE,
    IoOpcode.DATASET_MANAGEMENT,
    IoOpcode.VERIFY,
]


class SpdkTransport:
    """See namespace.Transport. Owns the controller."""

    def __init__(self, controller: Controller, nsid: int):
        self._controller = controller
        found = {facts.nsid: facts for facts in controller.namespaces()}
        if nsid not in found:
            have = ", ".join(map(str, found)) or "none"
            raise NvmeError(f"{controller.transport_id} has no namespace {nsid} (it has: {have})")
        self._namespace = found[nsid]
        self.nsid = nsid
        self.max_transfer_bytes = controller.max_transfer_bytes
        if not controller.moves_by_dma:  # see pyspdk.c: eight of them are on their way at once
            self.max_transfer_bytes = min(self.max_transfer_bytes, SOCKET_TRANSFER_BYTES)
        self.admin = QueuePair(AdminConnection(controller), depth=1)
        if controller.moves_by_dma:
            dma.use_allocator(environment.allocate)

    @classmethod
    def connect(cls, text: str) -> "SpdkTransport":
        """Connect by a PCIe address or a transport id, with `ns:N` for another namespace than the first.

        Raises SpdkUnavailable, ConnectionRefused, NvmeError.
        """
        nsid = NAMESPACE_KEY.search(text)
        hostnqn = HOSTNQN_KEY.search(text)
        transport_id = HOSTNQN_KEY.sub("", NAMESPACE_KEY.sub("", text)).strip()
        if PCIE_ADDRESS.fullmatch(transport_id):
            transport_id = f"trtype:PCIe traddr:{transport_id}"
        controller = Controller(transport_id, hostnqn=hostnqn and hostnqn[1])
        try:
            namespaces = controller.namespaces()
            if not namespaces:
                raise NvmeError(f"{transport_id} has no active namespace")
            return cls(controller, int(nsid[1]) if nsid else namespaces[0].nsid)
        except BaseException:
            controller.close()
            raise

    def create_queue_pair(self, depth: int = 256) -> QueuePair:
        if depth > MAX_QUEUE_DEPTH:
            raise ValueError(f"this transport's queues are at most {MAX_QUEUE_DEPTH} deep, not {depth}")
        while True:
            self._controller.wait_connected()
            try:
                native = self._controller.create_queue_pair(depth, self._namespace)
            except ConnectionLost:
                continue  # just now: wait_connected gives up when it is time
            return QueuePair(SpdkConnection(self._controller, native), native.depth)

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        return False  # no way is shorter than a command

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        return False

    def close(self) -> None:
        self._controller.close()


class AdminConnection:
    """See queue_pair.Connection: one command at a time."""

    def __init__(self, controller: Controller):
        self._controller = controller
        self._arrived: list[np.ndarray] = []

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        """Admin commands are not sent twice: a lost connection is reported."""
        self._controller.wait_connected()
        completions = [self._controller.admin(entries[i : i + 1], buffer) for i, buffer in enumerate(buffers)]
        found = np.concatenate(completions)
        found["cid"] = entries["cid"]
        return found

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._arrived.append(self.execute(entries, buffers))

    def poll(self, wait: bool) -> np.ndarray:
        arrived, self._arrived = self._arrived, []
        return np.concatenate(arrived) if arrived else np.empty(0, COMPLETION_ENTRY)

    def close(self) -> None:
        """Nothing: the controller has it."""


class SpdkConnection:
    """See queue_pair.Connection."""

    def __init__(self, controller: Controller, native: SpdkQueuePair):
        self._controller = controller
        self._native = native

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        self._check_flush(entries)
        completions, was_lost = self._native.transfer(entries, addresses, lengths, depth)
        while was_lost:
            left = np.flatnonzero(nvme_status.decode(completions["status"]) == Status.ABORTED_SQ_DELETION)
            if not np.isin(entries["opcode"][left], REPEATABLE).all():
                raise ConnectionLost(
                    f"{self._controller.transport_id}: the connection was lost during a command that is not "
                    "sent twice: whether it was done is not known"
                )
            self._controller.wait_connected()
            self._check_flush(entries[left])
            completions[left], was_lost = self._native.transfer(
                entries[left], addresses[left], lengths[left], depth
            )
        self._check_flush(entries)
        return completions

    def _check_flush(self, entries: np.ndarray) -> None:
        if (entries["opcode"] == IoOpcode.FLUSH).any() and self._controller.may_have_lost_writes:
            raise ConnectionLost(
                f"{self._controller.transport_id}: the connection was lost after writes that were not flushed, "
                "and the drive may have lost them: open it again"
            )

    def execute(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> np.ndarray:
        return self.transfer(entries, *places(buffers), len(entries))

    def submit(self, entries: np.ndarray, buffers: Sequence[Buffer]) -> None:
        self._check_flush(entries)
        addresses, lengths = places(buffers)
        started = 0
        while started < len(entries):  # SPDK may be short of requests for a moment
            part = slice(started, None)
            started += self._native.submit(entries[part], addresses[part], lengths[part])

    def poll(self, wait: bool) -> np.ndarray:
        return self._native.poll(wait)

    def close(self) -> None:
        self._native.close()
