"""Reservations beyond a target's life: a small file beside the drive.

A host that uses a drive connects again when its target was started anew; without this another could take the
drive meanwhile, and the first would find its next write refused.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
SUFFIX = ".reservations"


@dataclass(frozen=True)
class ReservationState:
    """keys: by host identifier, 16 bytes; holder: one of them; kind: see reservation.ReservationType"""

    keys: dict[bytes, int]
    holder: bytes | None
    kind: int
    generation: int


class ReservationFile:
    """Of one drive, known by its serial number: another drive at the same path has no reservations."""

    def __init__(self, path: str | os.PathLike, serial_number: str):
        self._path = Path(path)
        self._serial_number = serial_number

    def read(self) -> ReservationState | None:
        """None where there are none."""
        try:
            found = json.loads(self._path.read_text())
            if found["drive"] != self._serial_number:
                return None
            holder = found["holder"]
            return ReservationState(
                {_host_id(host): int(key) for host, key in found["keys"].items()},
                None if holder is None else _host_id(holder),
                int(found["type"]),
                int(found["generation"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("%s cannot be used, so that any host may take the drive: %s", self._path, error)
            return None

    def write(self, state: ReservationState) -> None:
        """Durable when this returns. Raises OSError."""
        if not state.keys:
            self._path.unlink(missing_ok=True)
            return
        record = {
            "drive": self._serial_number,
            "generation": state.generation,
            "type": state.kind,
            "holder": None if state.holder is None else state.holder.hex(),
            "keys": {host_id.hex(): key for host_id, key in state.keys.items()},
        }
        part = self._path.with_name(f".{self._path.name}.part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


def _host_id(text: str) -> bytes:
    host_id = bytes.fromhex(text)
    if len(host_id) != 16:
        raise ValueError(f"a host identifier of {len(host_id)} bytes")
    return host_id
