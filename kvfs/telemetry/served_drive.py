"""What can be seen of a drive that is served to other hosts: the drive's side, since the stores are theirs."""

import os
import threading

from kvfs.counters import drive_counters
from kvfs.embedded_drive import Drive
from kvfs.telemetry.events import EVENTS
from kvfs.telemetry.requests import Requests
from kvfs.telemetry.visible_store import VisibleStore, nothing_of_tenants, telemetry_of
from spdk_glue.namespace import Namespace


class VisibleDrive(VisibleStore):
    """Of a drive that is embedded here, as MetricsServer wants a store. Nothing of what hosts call theirs:
    models, sequences, tenants, and how long their requests took them."""

    def __init__(self, path: str | os.PathLike, drive: Drive):
        self.path = os.fspath(path)
        self._namespace = Namespace(drive.transport)
        self._lock = threading.Lock()
        self._requests = Requests()  # of which there are none here
        EVENTS.attach()

    def close(self) -> None:
        """The drive stays open."""
        self._namespace.close_queue_pairs()

    def _check_open(self) -> None:
        """Who serves the drive closes it after this."""

    def telemetry(self) -> dict:
        """As Store.telemetry."""
        with self._lock:
            namespace = self._namespace
            used_lbas = sum(count for _, count in namespace.allocated())
            counters = {
                **drive_counters(namespace),
                "link": {},
                "space": {
                    "capacity_bytes": namespace.num_lbas * namespace.block_bytes,
                    "free_bytes": (namespace.num_lbas - used_lbas) * namespace.block_bytes,
                },
                "memory": {},
                "sealing": {},
            }
            drive = {"drive": self.path, "state": "served", **self._drive_telemetry(counters)}
        totals = dict.fromkeys(("models", "sequences", "tokens"))
        return telemetry_of(self.path, [drive], self._requests, nothing_of_tenants(), totals)

    def newest_sequences(self, limit: int = 100) -> list[dict]:
        return []
