"""From a location to the transport that reaches it.

| location | transport |
|---|---|
| `spdk:0000:01:00.0` | SPDK's driver in this process, by PCIe address |
| `spdk:trtype:TCP traddr:127.0.0.1 trsvcid:4420 subnqn:nqn.2026-11.io:x` | the same, by transport id |
| `nvme+tcp://127.0.0.1:4420/nqn.2026-11.io.x?nsid=1` | NVMe/TCP of our own, see fabrics/initiator/address.py |
| `/dev/ng0n1`, `/dev/nvme0n1`, `/dev/disk/by-id/nvme-...` | Linux passthrough |

`inproc:FILE`, a drive that this process embeds, is opened by who embeds it.
"""

import os
import re
from typing import TYPE_CHECKING

from spdk_glue.status import BadLocation

if TYPE_CHECKING:
    from spdk_glue.namespace import Transport

SPDK_SCHEME = "spdk:"
TCP_SCHEME = "nvme+tcp:"
LINUX_DEVICE = re.compile(r"/dev/((ng|nvme)\d+n\d+|disk/by-id/nvme-[^/]+)")


def is_nvme(location: str | os.PathLike) -> bool:
    """Whether a location names an NVMe namespace rather than a file."""
    text = os.fspath(location)
    return text.startswith((SPDK_SCHEME, TCP_SCHEME)) or LINUX_DEVICE.fullmatch(text) is not None


def is_path(location: str | os.PathLike) -> bool:
    """Whether a location is one of the file system: a file, or a device of Linux's."""
    return not os.fspath(location).startswith((SPDK_SCHEME, TCP_SCHEME))


def open_transport(location: str | os.PathLike, alone: bool = True) -> "Transport":
    """Connect to the namespace at a location. Raises NvmeError and its relatives, OSError.

    alone: refuse one that Linux uses, and keep Linux from using it; not for who only looks
    """
    text = os.fspath(location)
    if text.startswith(SPDK_SCHEME):
        from spdk_glue.transports.spdk import SpdkTransport  # only now: SPDK may not be installed

        return SpdkTransport.connect(text.removeprefix(SPDK_SCHEME))
    if text.startswith(TCP_SCHEME):
        from spdk_glue.transports.tcp import TcpTransport

        return TcpTransport.connect(text)
    if LINUX_DEVICE.fullmatch(text):
        from spdk_glue.transports.linux import LinuxTransport

        return LinuxTransport.open(text, alone)
    raise BadLocation(f"{text}: not spdk:..., nvme+tcp://... or an NVMe namespace such as /dev/ng0n1")
