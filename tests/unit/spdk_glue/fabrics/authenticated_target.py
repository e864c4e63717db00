"""Our own target over a drive in memory, with an access file, for tests of who gets in."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spdk_glue.fabrics.authentication import Key, write_key_file
from spdk_glue.fabrics.target.host_access import HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.server import Server
from spdk_glue.fabrics.target.subsystem import ServedDrive, Subsystems
from tests.unit.spdk_glue.memory_drive import MemoryDrive

DRIVE_NQN = "nqn.2026-11.io.kvfs:drive"


def host_name(number: int) -> str:
    return f"nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{number:012x}"


def drive_in_memory() -> MemoryDrive:
    drive = MemoryDrive(block_bytes=4096)
    drive.controller["nn"], drive.namespace["ncap"] = 1, drive.num_lbas  # SPDK looks at both
    return drive


@dataclass
class AuthenticatedTarget:
    """lines: of the access file; drive: behind the target; server: the latest that runs"""

    folder: Path
    lines: list[str] = field(default_factory=list)
    drive: MemoryDrive = field(default_factory=drive_in_memory)
    server: Server | None = None

    def new_key(self, name: str, key: Key | None = None) -> Path:
        """A key file in the target's folder."""
        path = self.folder / name
        write_key_file(path, key or Key.generate())
        return path

    def allow(self, nqn: str, **options: object) -> None:
        """options: of the access file; texts, lists of texts, numbers and booleans"""

        def toml(value):
            if isinstance(value, list):
                return f"[{', '.join(map(toml, value))}]"
            return str(value).lower() if isinstance(value, int) else f'"{value}"'

        options = {"nqn": nqn} | options
        self.lines += ["[[host]]", *(f"{name} = {toml(value)}" for name, value in options.items())]

    @contextmanager
    def serving(self, host: str = "127.0.0.1", limits: Limits | None = None):
        """Raises HostAccessError, UnauthenticatedListener."""
        path = self.folder / "access.toml"
        path.write_text("\n".join(self.lines))
        path.chmod(0o600)
        subsystems = Subsystems(ServedDrive(self.drive.device), HostAccess.read(path), limits, DRIVE_NQN)
        before, self.server = self.server, Server(subsystems, host, 0)
        try:
            yield self
        finally:
            self.server.close()
            self.server = before

    @property
    def port(self) -> int:
        return self.server.address[1]

    def address(self, **options: object) -> str:
        """For our own initiator; options of the address, `_` for `-`."""
        given = "&".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
        return f"nvme+tcp://127.0.0.1:{self.port}/{DRIVE_NQN}?{given}"
