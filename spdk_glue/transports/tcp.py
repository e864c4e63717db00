"""The transport over NVMe/TCP of our own: `nvme+tcp://HOST:PORT/NQN`, see fabrics/initiator/address.py."""

import numpy as np

from spdk_glue.fabrics.initiator.address import Address
from spdk_glue.fabrics.initiator.controller import MAX_QUEUE_DEPTH, Controller
from spdk_glue.fabrics.initiator.discovery import the_only_subsystem
from spdk_glue.fabrics.records import DISCOVERY_NQN
from spdk_glue.queue_pair import QueuePair
from spdk_glue.status import NvmeError
from spdk_glue.transports.inproc import LinkCounters
from spdk_glue.transports.reconnecting import AdminConnection, IoConnection

SOCKET_TRANSFER_BYTES = 128 << 10  # see host_io.c: eight of them are on their way at once


class TcpTransport:
    """See namespace.Transport. Owns the controller."""

    def __init__(self, controller: Controller, nsid: int | None = None):
        """nsid: None for the first namespace. Raises NvmeError."""
        self._controller = controller
        found = {facts.nsid: facts for facts in controller.namespaces()}
        if not found:
            raise NvmeError(f"{controller.transport_id} has no active namespace")
        if nsid is not None and nsid not in found:
            have = ", ".join(map(str, found))
            raise NvmeError(f"{controller.transport_id} has no namespace {nsid} (it has: {have})")
        self.nsid = min(found) if nsid is None else nsid
        self._namespace = found[self.nsid]
        self.max_transfer_bytes = min(controller.max_transfer_bytes, SOCKET_TRANSFER_BYTES)
        self.admin = QueuePair(AdminConnection(controller), depth=1)

    @classmethod
    def connect(cls, text: str, **options) -> "TcpTransport":
        """By the drive's address; options: see Controller.

        Raises BadLocation, ConnectionRefused, AuthenticationFailed, KeyFileError, NvmeError.
        """
        where = Address.parse(text)
        if where.subnqn == DISCOVERY_NQN:
            where = the_only_subsystem(where)
        controller = Controller(where, **options)
        try:
            return cls(controller, where.nsid)
        except BaseException:
            controller.close()
            raise

    @property
    def counters(self) -> LinkCounters:
        """Of the wire, as they are now: headers, digests and repetitions are among the bytes."""
        account = self._controller.account
        return LinkCounters(account.commands, account.bytes_to_target, account.bytes_from_target)

    @property
    def is_connected(self) -> bool:
        return self._controller.generation is not None

    def create_queue_pair(self, depth: int = 256) -> QueuePair:
        if depth > MAX_QUEUE_DEPTH:
            raise ValueError(f"this transport's queues are at most {MAX_QUEUE_DEPTH} deep, not {depth}")
        native = self._controller.create_queue_pair(depth, self._namespace)
        return QueuePair(TcpConnection(self._controller, native), native.depth)

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        return False  # no way is shorter than a command

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        return False

    def close(self) -> None:
        self._controller.close()


class TcpConnection(IoConnection):
    """Whose command identifiers are ours to choose: those of a transfer follow one another."""

    _next_cid = 0

    def transfer(
        self, entries: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, depth: int
    ) -> np.ndarray:
        entries["cid"] = np.arange(self._next_cid, self._next_cid + len(entries))
        self._next_cid = self._next_cid + len(entries) & 0xFFFF
        return self._run(entries, addresses, lengths, depth)
