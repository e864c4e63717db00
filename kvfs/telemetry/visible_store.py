"""What Store adds so that it can be seen: metrics, the drive's map, sequences, traces, events.

Everything is plain values, as JSON has them, so that it looks the same from the process that owns the drive,
from its clients, and from the HTTP endpoint.
"""

import time

from kvfs.errors import InvalidArgument
from kvfs.objects.counters import sums as sums_of_caches
from kvfs.prefix.counters import sums as sums_of_tenants
from kvfs.space.space_usage import space_usage
from kvfs.telemetry.chrome_trace import chrome_trace, span_dicts
from kvfs.telemetry.events import EVENTS
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import STREAM_COLLECTED, LogPage
from spdk_glue.probes import LATENCY_RECORD, MAX_PROBES, from_log_page
from spdk_glue.status import NvmeStatusError, Status
from spdk_glue.trace import TRACE

TELEMETRY_VERSION = 1
MAX_SEQUENCES = 1000  # that one call shows
OF_THE_STORE = ("prefix", "objects", "eviction")  # among its counters; the others are a drive's


class Visible:
    """What stores of this process have in common."""

    def events(self, after: int = 0) -> list[dict]:
        """The process's events with a higher number: see telemetry.events."""
        return EVENTS.newest(after)

    def start_trace(self) -> None:
        """Note what all layers of this process do from here on. Raises InvalidArgument if one is under way."""
        self._check_open()
        if not TRACE.start():
            raise InvalidArgument("a trace is under way already: one at a time")

    def stop_trace(self) -> dict:
        """The trace since start_trace, as Chrome's JSON (telemetry.chrome_trace)."""
        return chrome_trace(self._stop_trace_spans(), store=self.path)

    def _stop_trace_spans(self) -> list[dict]:
        """The same as plain spans, to be put together with those of another process."""
        return span_dicts(TRACE.stop())


class VisibleStore(Visible):
    """Expects a store's lock, namespace, catalogue, models and `_requests`."""

    def telemetry(self) -> dict:
        """All numbers: what metrics, status page and `kvfsctl top` are made of.

        drives: of each its counters, its space by kind and latencies, see Store.counters, SpaceUsage and
            Probes.as_dicts; a set has several
        """
        with self._lock:
            self._check_open()
            counters = self.counters()
            num_sequences, num_tokens = self._catalogue.totals()
        drive = self._own_drive_telemetry(counters)
        return telemetry_of(
            self.path,
            [{"drive": self.path, "state": "in use", **drive}],
            self._requests,
            {name: counters[name] for name in OF_THE_STORE},
            {"models": len(self._models), "sequences": num_sequences, "tokens": num_tokens},
        )

    def _own_drive_telemetry(self, counters: dict) -> dict:
        """counters: the store's"""
        with self._lock:
            usage = space_usage(self)
        of_drive = {name: value for name, value in counters.items() if name not in OF_THE_STORE}
        return {**self._drive_telemetry(of_drive), "space": {"blocks": usage.blocks, "pages": usage.pages}}

    def _drive_telemetry(self, counters: dict) -> dict:
        probes = self._namespace.probes
        return {
            "counters": counters,
            "commands_outstanding": probes.num_outstanding,
            "latencies": [*probes.all.as_dicts(), *self._drive_latencies()],
        }

    def _drive_latencies(self) -> list[dict]:
        try:
            return from_log_page(self._namespace.log_page(LogPage.LATENCY, LATENCY_RECORD, MAX_PROBES))
        except NvmeStatusError as error:
            if error.status != Status.INVALID_LOG_PAGE:
                raise
            return []  # a drive elsewhere, of an older version

    def drive_map(self) -> list[dict]:
        """Of each drive its superblocks: lists of the same length, see SUPERBLOCK_RECORD. stream: a
        placement identifier, "collected" by garbage collection, or None where it is not known."""
        with self._lock:
            self._check_open()
            found = FlashAdmin(self._namespace).superblocks()
        return [
            {
                "drive": self.path,
                "state": [state.decode() for state in found["state"]],
                "stream": [_stream(stream) for stream in found["stream"].tolist()],
                "valid_pages": found["valid_pages"].tolist(),
                "capacity_pages": found["capacity_pages"].tolist(),
                "erase_count": found["erase_count"].tolist(),
                "newest_program_number": found["newest_program_number"].tolist(),
            }
        ]

    def newest_sequences(self, limit: int = 100) -> list[dict]:
        """The sequences that were made last: name, model, tokens, bytes, created_ns, changed_ns."""
        with self._lock:
            self._check_open()
            models = {model.id: model for model in self._models.values()}
            rows = self._catalogue.newest_sequences(min(limit, MAX_SEQUENCES))
        return [sequence_facts(row, models[row.model_id]) for row in rows if row.model_id in models]


def _stream(stored: int) -> int | str | None:
    """An NVMe placement identifier; "collected": of any; None: not known."""
    return "collected" if stored == STREAM_COLLECTED else stored - 1 if stored else None


def sequence_facts(row, model) -> dict:
    return {
        "name": row.name,
        "model": model.name,
        "num_tokens": row.num_tokens,
        "bytes": row.num_tokens * model.token_bytes,
        "created_ns": row.created_ns,
        "changed_ns": row.changed_ns,
    }


def telemetry_of(path: str, drives: list[dict], requests, of_store: dict, totals: dict) -> dict:
    return {
        "version": TELEMETRY_VERSION,
        "store": path,
        "time_s": time.time(),
        "drives": drives,
        "latencies": requests.latencies(),
        "failures": requests.failures(),
        "totals": totals,
        **of_store,
    }


def nothing_of_tenants() -> dict:
    """What takes the place of counters that name tenants and caches, for who may not know them."""
    return {"prefix": sums_of_tenants([]), "objects": sums_of_caches([], [])}
