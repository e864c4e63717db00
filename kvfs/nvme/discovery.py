"""Drives on the wire: what leads to them, and which a target has."""

from spdk_glue.fabrics.initiator import discovery
from spdk_glue.fabrics.initiator.address import SCHEME, Address, is_address
from spdk_glue.fabrics.initiator.discovery import Found

__all__ = ["Found", "discover", "is_address"]


def discover(target: str) -> list[Found]:
    """target: HOST:PORT, or nvme+tcp://HOST:PORT with options.

    Raises BadLocation, ConnectionRefused, NvmeError.
    """
    return discovery.discover(Address.parse(target if is_address(target) else f"{SCHEME}//{target}"))
