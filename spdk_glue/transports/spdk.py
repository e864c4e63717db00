"""The transport over SPDK's driver: PCIe, NVMe/TCP and vfio-user."""

import re

import numpy as np

from spdk_glue import dma
from spdk_glue.pyspdk import environment
from spdk_glue.pyspdk.controller import MAX_QUEUE_DEPTH, Controller
from spdk_glue.queue_pair import QueuePair
from spdk_glue.status import ConnectionLost, NvmeError
from spdk_glue.transports.reconnecting import AdminConnection, IoConnection

PCIE_ADDRESS = re.compile(r"([0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)
NAMESPACE_KEY = re.compile(r"(?:^|\s)ns[:=](\d+)(?=\s|$)")
HOSTNQN_KEY = re.compile(r"(?:^|\s)hostnqn[:=](\S+)")
SOCKET_TRANSFER_BYTES = 128 << 10


class SpdkTransport:
    """See namespace.Transport. Owns the controller."""

    counters = None

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

    @property
    def is_connected(self) -> bool:
        return not self._controller.is_lost

    def create_queue_pair(self, depth: int = 256) -> QueuePair:
        if depth > MAX_QUEUE_DEPTH:
            raise ValueError(f"this transport's queues are at most {MAX_QUEUE_DEPTH} deep, not {depth}")
        while True:
            self._controller.wait_connected()
            try:
                native = self._controller.create_queue_pair(depth, self._namespace)
            except ConnectionLost:
                continue  # just now: wait_connected gives up when it is time
            return QueuePair(IoConnection(self._controller, native), native.depth)

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        return False  # no way is shorter than a command

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        return False

    def close(self) -> None:
        self._controller.close()
