"""A drive elsewhere that speaks our attention commands: flash, cache and workers are there, the store is here.

Whatever reaches its namespace will do; over a network that is nvme+tcp://, to a `kvfsctl serve`.
"""

from spdk_glue.identify import CAPABILITIES_SIGNATURE
from spdk_glue.kvfs_drive import attention_of
from spdk_glue.namespace import BlockNamespace, Transport
from spdk_glue.reservation import Reservation


def is_kvfs_drive(namespace: BlockNamespace) -> bool:
    """Whether the controller computes attention, rather than being a medium for flash of ours."""
    return namespace.controller["attention"]["signature"] == CAPABILITIES_SIGNATURE


class AttachedDrive:
    """What a store uses of a drive: its transport. Owns the namespace, which is this host's alone meanwhile."""

    def __init__(self, namespace: BlockNamespace):
        """Closes the namespace where it raises: OtherAttentionVersion, or NamespaceReserved by another host."""
        self._namespace = namespace
        self._reservation = Reservation(namespace)
        try:
            attention_of(namespace.controller)
            self._reservation.acquire()
        except BaseException:
            namespace.close()
            raise

    @property
    def transport(self) -> Transport:
        return self._namespace.transport

    def is_empty(self) -> bool:
        """Whether nothing is written where a store would begin."""
        return not self._namespace.read(0, 1).any()

    def erase(self) -> None:
        """Give back every block."""
        self._namespace.deallocate([(0, self._namespace.num_lbas)])

    def close(self) -> None:
        """Without waiting for a target that is gone: it sees itself that this host is."""
        try:
            if self.transport.is_connected:
                self._reservation.release()
        finally:
            self._namespace.close()
