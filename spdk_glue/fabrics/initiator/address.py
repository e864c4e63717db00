"""Where a drive on the wire is, and as whom to go there: `nvme+tcp://HOST:PORT/NQN?OPTION=...&...`

Without an NQN it is the target's only drive, as its discovery service tells (discovery.py).

| option | meaning |
|---|---|
| `nsid=N` | another namespace than the first |
| `hostnqn=NQN` | the host's name; else that of /etc/nvme/hostnqn, or one of this machine's own |
| `header-digest=on`, `data-digest=on` | CRC32C over headers, over data |
| `key-file=FILE` | the host's key, with which it proves who it is |
| `controller-key-file=FILE` | the controller's: it has to prove itself, too |
| `reauthenticate=SECONDS` | prove it again so often on every queue; else when the target asks for it |

Keys are never part of it, only the names of the files that hold them.
"""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from spdk_glue.fabrics.records import DISCOVERY_NQN, UUID_PREFIX, BadNqn, check_nqn, hostnqn_of
from spdk_glue.status import BadLocation

SCHEME = "nvme+tcp:"
DEFAULT_PORT = 4420
HOSTNQN_FILE, HOSTID_FILE = Path("/etc/nvme/hostnqn"), Path("/etc/nvme/hostid")
MACHINE_ID = Path("/etc/machine-id")
KEY_FILE = Path("/etc/nvme/kvfs-host-key")  # where there is one, and the address names none
OPTIONS = (
    *("nsid", "hostnqn", "header-digest", "data-digest"),
    *("key-file", "controller-key-file", "reauthenticate"),
)
SWITCH = {"on": True, "off": False}


def is_address(location: str | os.PathLike) -> bool:
    return os.fspath(location).startswith(SCHEME)


@dataclass(frozen=True)
class Address:
    """See parse. nsid: None for the subsystem's first namespace."""

    host: str
    port: int
    subnqn: str
    nsid: int | None = None
    hostnqn: str | None = None
    header_digest: bool = False
    data_digest: bool = False
    key_file: str | None = None
    controller_key_file: str | None = None
    reauthenticate_seconds: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises BadLocation with what is wrong."""
        # what a pathlib.Path leaves of it
        if text.startswith(SCHEME + "/") and not text.startswith(SCHEME + "//"):
            text = text.replace(SCHEME + "/", SCHEME + "//", 1)
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise BadLocation(f"{text}: {error}") from error
        if not text.startswith(SCHEME + "//") or not parts.hostname:
            raise BadLocation(f"{text}: not nvme+tcp://HOST:PORT/NQN")
        if parts.username is not None or parts.fragment:
            raise BadLocation(f"{text}: no user, password or # belongs in the address of a drive")
        given = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(given)
        unknown = [name for name in options if name not in OPTIONS]
        if unknown or len(options) != len(given):
            raise BadLocation(f"{text}: options are {', '.join(OPTIONS)}, each once")
        try:
            subnqn = check_nqn(unquote(parts.path.removeprefix("/")) or DISCOVERY_NQN)
            hostnqn = options.get("hostnqn")
            return cls(
                host=parts.hostname,
                port=DEFAULT_PORT if port is None else port,
                subnqn=subnqn,
                nsid=_whole_number(options, "nsid", 0xFFFFFFFE),
                hostnqn=None if hostnqn is None else check_nqn(hostnqn),
                header_digest=_switch(options, "header-digest"),
                data_digest=_switch(options, "data-digest"),
                key_file=options.get("key-file"),
                controller_key_file=options.get("controller-key-file"),
                reauthenticate_seconds=_whole_number(options, "reauthenticate", 1 << 31),
            )
        except (BadNqn, ValueError) as error:
            raise BadLocation(f"{text}: {error}") from error

    def __str__(self) -> str:
        """What parse takes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        options = {
            "nsid": self.nsid,
            "hostnqn": self.hostnqn,
            "header-digest": "on" if self.header_digest else None,
            "data-digest": "on" if self.data_digest else None,
            "key-file": self.key_file,
            "controller-key-file": self.controller_key_file,
            "reauthenticate": self.reauthenticate_seconds,
        }
        given = urlencode({name: value for name, value in options.items() if value is not None}, safe="/:")
        text = f"{SCHEME}//{host}:{self.port}/{quote(self.subnqn, safe=':')}"
        return f"{text}?{given}" if given else text

    @property
    def target(self) -> str:
        """For messages: without the options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}//{host}:{self.port}/{self.subnqn}"

    def identity(self) -> tuple[uuid.UUID, str]:
        """(host identifier, host NQN): the same whenever this host comes. Raises BadLocation."""
        if self.hostnqn is not None:
            return _host_id_of(self.hostnqn), self.hostnqn
        configured = _first_line(HOSTNQN_FILE)
        if configured is not None:
            try:
                text = _first_line(HOSTID_FILE)
                return _host_id_of(configured) if text is None else uuid.UUID(text), check_nqn(configured)
            except ValueError as error:
                raise BadLocation(f"{HOSTNQN_FILE}, {HOSTID_FILE}: {error}") from error
        machine = _first_line(MACHINE_ID) or f"{uuid.getnode():x}"
        # not the machine's identifier itself, which its owner may want to keep from the network
        host_id = uuid.UUID(bytes=hashlib.sha256(f"kvfs host {machine}".encode()).digest()[:16], version=4)
        return host_id, hostnqn_of(host_id)


def _whole_number(options: dict[str, str], name: str, most: int) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise ValueError(f"{name} is a number from 1 on, not {text!r}")
    return int(text)


def _switch(options: dict[str, str], name: str) -> bool:
    text = options.get(name, "off")
    if text not in SWITCH:
        raise ValueError(f"{name} is on or off, not {text!r}")
    return SWITCH[text]


def _host_id_of(hostnqn: str) -> uuid.UUID:
    """A name has one identifier: a target refuses one name with two."""
    if hostnqn.startswith(UUID_PREFIX):
        return uuid.UUID(hostnqn.removeprefix(UUID_PREFIX))
    return uuid.uuid5(uuid.NAMESPACE_URL, hostnqn)


def _first_line(path: Path) -> str | None:
    """None where there is no such file, or nothing in it."""
    try:
        return path.read_text().strip().partition("\n")[0] or None
    except OSError:
        return None
