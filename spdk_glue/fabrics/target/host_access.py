"""Which hosts may connect to a target, how each proves who it is, and what it may do.

The access file is TOML. It holds no secret, only the names of the files that do, relative to its own folder:

    [[host]]
    nqn = "nqn.2014-08.org.nvmexpress:uuid:7a9e53a4-0a2e-4b3c-9a8e-0f4a2f3b6c11"
    key_file = "host-a.key"             # the host proves itself with it; see `kvfsctl nvme gen-dhchap-key`
    controller_key_file = "drive.key"   # the drive proves itself with it to hosts that ask for that
    hashes = ["sha512", "sha384"]       # that may be agreed on, by preference
    dh_groups = ["ffdhe4096"]
    reauthenticate_seconds = 3600       # the host has to prove itself again so often, on every queue
    read_only = true                    # no command of this host changes anything

Only `nqn` must be there. A host without a key file need not prove anything, and a target with such a host
listens on loopback alone.
"""

import ipaddress
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from spdk_glue.fabrics.authentication import (
    BadKey,
    ControllerAuthenticator,
    Credentials,
    DhGroup,
    Hash,
    KeyFileError,
    Policy,
    read_key_file,
)
from spdk_glue.fabrics.authentication.dhchap import DEFAULT_GROUPS, DEFAULT_HASHES
from spdk_glue.fabrics.records import BadNqn, check_nqn
from spdk_glue.fabrics.trusted_file import WRITABLE_BY_OWNER_ALONE, read_trusted_file
from spdk_glue.status import NvmeError

_NEEDS_KEY = ("controller_key_file", "hashes", "dh_groups", "reauthenticate_seconds")
_FIELDS = {"nqn": str, "key_file": str, "controller_key_file": str, "hashes": list, "dh_groups": list}
_FIELDS |= {"read_only": bool, "reauthenticate_seconds": int}
_FILE_BYTES_MAX = 1 << 20


class HostAccessError(NvmeError):
    """An access file that cannot be used: path, and why."""

    def __init__(self, path: str | os.PathLike, why: str):
        self.path = os.fspath(path)
        self.why = why
        super().__init__(self.path, why)

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


class UnauthenticatedListener(NvmeError):
    """A target that others than this machine could reach, and that somebody may use without a proof."""


@dataclass(frozen=True)
class AllowedHost:
    """credentials: None for one that need not prove itself; else it must, on every queue, and again after
    reauthenticate_seconds, where that is not None."""

    nqn: str
    credentials: Credentials | None = None
    read_only: bool = False
    reauthenticate_seconds: int | None = None

    def authenticator(self, subsystem_nqn: str) -> ControllerAuthenticator | None:
        """For one queue that this host has just connected; None: none is needed."""
        if self.credentials is None:
            return None
        return ControllerAuthenticator(subsystem_nqn, self.nqn, self.credentials)


class HostAccess:
    """The hosts of a target by NQN; hosts None: any, without a proof."""

    def __init__(self, hosts: Mapping[str, AllowedHost] | None):
        self._hosts = hosts

    @classmethod
    def anyone(cls) -> "HostAccess":
        return cls(None)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "HostAccess":
        """From an access file and the key files that it names. Raises HostAccessError."""
        try:
            document = tomllib.loads(_read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise HostAccessError(path, f"not TOML: {error}") from None
        tables = document.pop("host", None)
        if document:
            raise HostAccessError(path, f"unknown: {', '.join(sorted(document))}; it holds [[host]] tables")
        if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
            raise HostAccessError(path, "it names no host: put a [[host]] table with an nqn there")
        hosts = {}
        for position, table in enumerate(tables, 1):
            nqn = table.get("nqn", f"number {position}")
            try:
                host = _host(table, Path(path).parent)
            except (BadKey, BadNqn, KeyFileError, ValueError) as error:
                raise HostAccessError(path, f"host {nqn}: {error}") from None
            if host.nqn in hosts:
                raise HostAccessError(path, f"host {nqn}: there twice")
            hosts[host.nqn] = host
        return cls(hosts)

    def allowed(self, host_nqn: str) -> AllowedHost | None:
        """None: this host may not connect."""
        if self._hosts is None:
            return AllowedHost(host_nqn)
        return self._hosts.get(host_nqn)

    def check_listen(self, addresses: Iterable[str]) -> None:
        """That a target may listen on these IP addresses. Raises UnauthenticatedListener."""
        reachable = [address for address in addresses if not is_loopback(address)]
        if not reachable:
            return
        if self._hosts is None:
            raise UnauthenticatedListener(
                f"{reachable[0]} can be reached from other machines: say with --host-access which hosts may"
                " connect, and with which key"
            )
        for host in self._hosts.values():
            if host.credentials is None:
                raise UnauthenticatedListener(
                    f"{reachable[0]} can be reached from other machines: host {host.nqn} needs a key_file in"
                    " the access file"
                )


def is_loopback(address: str) -> bool:
    """Of an IP address as text; the wildcard addresses and an IPv6 address with a scope are not."""
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _read_text(path: str | os.PathLike) -> str:
    # who can write it decides who may connect
    content = read_trusted_file(path, WRITABLE_BY_OWNER_ALONE, _FILE_BYTES_MAX, HostAccessError)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise HostAccessError(path, "not TOML: it is not UTF-8") from None


def _host(table: dict, folder: Path) -> AllowedHost:
    """Raises BadKey, BadNqn, KeyFileError, ValueError."""
    for name, value in table.items():
        if name not in _FIELDS:
            raise ValueError(f"{name} is unknown, it may have {', '.join(_FIELDS)}")
        if type(value) is not _FIELDS[name]:
            raise ValueError(f"{name} is not a {_FIELDS[name].__name__}")
    if "nqn" not in table:
        raise ValueError("it has no nqn")
    nqn, read_only = check_nqn(table["nqn"]), table.get("read_only", False)
    if "key_file" not in table:
        for name in _NEEDS_KEY:
            if name in table:
                raise ValueError(f"{name} without a key_file")
        return AllowedHost(nqn, None, read_only)
    policy = Policy(
        _choices(table, "hashes", Hash) or DEFAULT_HASHES,
        _choices(table, "dh_groups", DhGroup) or DEFAULT_GROUPS,
    )
    key = read_key_file(folder / table["key_file"])
    controller_key = None
    if "controller_key_file" in table:
        controller_key = read_key_file(folder / table["controller_key_file"])
    seconds = table.get("reauthenticate_seconds")
    if seconds is not None and seconds < 1:
        raise ValueError(f"reauthenticate_seconds is a number from 1 on, not {seconds}")
    return AllowedHost(nqn, Credentials(key, controller_key, policy), read_only, seconds)


def _choices(table: dict, name: str, kind: type[IntEnum]) -> tuple | None:
    if name not in table:
        return None
    known = {member.name.lower(): member for member in kind}
    for choice in table[name]:
        if not isinstance(choice, str) or choice not in known:
            raise ValueError(f"{choice!r} in {name}; there are {', '.join(known)}")
    if not table[name]:
        raise ValueError(f"{name} is empty")
    return tuple(known[choice] for choice in table[name])
