"""What SPDK's target is to be: where it listens, who may connect, and the calls that make it so."""

import ipaddress
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spdk_glue.fabrics.authentication import read_key_file
from spdk_glue.fabrics.records import check_nqn
from spdk_glue.fabrics.target.host_access import HostAccess, HostAccessError, is_loopback

BDEV_NAME = "kvfs"
DEFAULT_PORT = 4420
MAX_IO_BYTES = 1 << 20
# Fewer than SPDK's own numbers: 1,024 buffers of 128 KiB are all queues of a host with a MiB under way in each.
IOBUF_OPTIONS = {"small_pool_count": 4096, "large_pool_count": 1024}
BDEV_OPTIONS = {"bdev_io_pool_size": 16383, "bdev_io_cache_size": 256, "bdev_auto_examine": False}
# What SPDK would make of several reads and writes: the block device knows whose those of a host are, not these.
MASKED = {"masked_oncs": ["nvmcmps", "nvmcpys"], "masked_fuses": ["fcws"]}
TRANSPORTS = {"tcp": "TCP", "rdma": "RDMA", "vfio-user": "VFIOUSER"}


@dataclass(frozen=True)
class Listener:
    """transport: TCP, RDMA or VFIOUSER; address: numeric, or the folder of a vfio-user socket."""

    transport: str
    address: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> "Listener":
        """Of HOST:PORT, rdma:HOST:PORT or vfio-user:FOLDER. Raises ValueError."""
        name, colon, rest = text.partition(":")
        if name not in TRANSPORTS or not colon:
            name, rest = "tcp", text
        if name == "vfio-user":
            if not Path(rest).is_dir():
                raise ValueError(f"no folder for a vfio-user socket: {rest}")
            return cls("VFIOUSER", os.path.abspath(rest))
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"an address to listen on is HOST:PORT, not {rest!r}")
        host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"SPDK listens on numeric addresses only, not on {host!r}") from None
        return cls(TRANSPORTS[name], host, int(port))

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine reach it."""
        return self.transport == "VFIOUSER" or is_loopback(self.address)

    @property
    def rpc_address(self) -> dict[str, str]:
        address = {"trtype": self.transport, "traddr": self.address, "trsvcid": str(self.port)}
        if self.transport != "VFIOUSER":
            address["adrfam"] = f"IPv{ipaddress.ip_address(self.address).version}"
        return address

    def __str__(self) -> str:
        if self.transport == "VFIOUSER":
            return f"vfio-user:{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{'rdma:' if self.transport == 'RDMA' else ''}{host}:{self.port}"


@dataclass(frozen=True)
class AllowedHost:
    """A host that may connect: by its NQN, and with a key file by DH-HMAC-CHAP.

    key_file: the host's key; controller_key_file: the target's own, if the host asks for it
    """

    nqn: str
    key_file: Path | None = None
    controller_key_file: Path | None = None

    def __post_init__(self):
        check_nqn(self.nqn)
        for file in filter(None, (self.key_file, self.controller_key_file)):
            read_key_file(file)  # SPDK's words for a bad one are few
        if self.controller_key_file and not self.key_file:
            raise ValueError(f"{self.nqn}: a controller key file needs the host's key file, too")


@dataclass(frozen=True)
class TargetConfig:
    """nqn: None for the drive's own name; hosts: who may connect; with none, anybody on this machine.

    is_polling: the reactors take their CPUs whole instead of sleeping while nothing comes, which vfio-user
    needs: its doorbells are memory; cpus: of the reactors, None for the first that this process may use;
    hugepages, memory_mb: None for what pyspdk.environment.start says of them.
    """

    listeners: tuple[Listener, ...]
    nqn: str | None = None
    hosts: tuple[AllowedHost, ...] = ()
    is_polling: bool = False
    cpus: tuple[int, ...] | None = None
    hugepages: bool | None = None
    memory_mb: int | None = None

    def __post_init__(self):
        if self.nqn is not None:
            check_nqn(self.nqn)
        if not self.listeners:
            raise ValueError("a target listens on at least one address")
        foreign = [listener for listener in self.listeners if not listener.is_local]
        if foreign and (not self.hosts or any(host.key_file is None for host in self.hosts)):
            raise ValueError(
                f"{foreign[0]} can be reached from other machines: name the hosts that may connect, each with"
                " a key file"
            )
        if self.cpus is not None and not set(self.cpus) <= os.sched_getaffinity(0):
            raise ValueError(f"this process may not use all of the CPUs {sorted(self.cpus)}")

    @property
    def polls(self) -> bool:
        return self.is_polling or any(listener.transport == "VFIOUSER" for listener in self.listeners)

    def calls(self, nqn: str, serial_number: str, model_number: str) -> Iterator[tuple[str, dict]]:
        """(method, parameters) of the RPCs that set up a running SPDK, in order."""
        for transport in dict.fromkeys(listener.transport for listener in self.listeners):
            options = {}
            if transport != "VFIOUSER":  # which takes what a PCIe drive would
                options = {"max_io_size": MAX_IO_BYTES, "in_capsule_data_size": 4096}
            yield "nvmf_create_transport", {"trtype": transport, **MASKED, **options}
        subsystem = {
            "nqn": nqn,
            "allow_any_host": not self.hosts,
            "serial_number": serial_number,
            "model_number": model_number,
            "max_namespaces": 1,
        }
        yield "nvmf_create_subsystem", subsystem
        yield "nvmf_subsystem_add_ns", {"nqn": nqn, "namespace": {"bdev_name": BDEV_NAME, "nsid": 1}}
        for index, host in enumerate(self.hosts):
            allowed = {"nqn": nqn, "host": host.nqn}
            for kind, file in (("dhchap_key", host.key_file), ("dhchap_ctrlr_key", host.controller_key_file)):
                if file is not None:
                    allowed[kind] = f"{kind}_{index}"
                    path = os.path.abspath(file)
                    yield "keyring_file_add_key", {"name": allowed[kind], "path": path}
            yield "nvmf_subsystem_add_host", allowed
        for listener in self.listeners:
            yield "nvmf_subsystem_add_listener", {"nqn": nqn, "listen_address": listener.rpc_address}


def hosts_of_access_file(path: str | os.PathLike) -> tuple[AllowedHost, ...]:
    """The hosts that an access file names: see spdk_glue/fabrics/target/host_access.py.

    Raises HostAccessError, also for what SPDK cannot hold a single host to.
    """
    HostAccess.read(path)  # says what is wrong with it
    hosts = []
    for table in tomllib.loads(Path(path).read_text())["host"]:
        for name in ("hashes", "dh_groups", "read_only", "reauthenticate_seconds"):
            if name in table:
                raise HostAccessError(
                    path, f"host {table['nqn']}: SPDK's target has no {name} for one host alone"
                )
        files = (table.get(name) for name in ("key_file", "controller_key_file"))
        hosts.append(AllowedHost(table["nqn"], *(file and Path(path).parent / file for file in files)))
    return tuple(hosts)
