"""What can be seen of a store through its mount: the client's side, and the calls of the owner's.

Numbers are for all, but tenants and caches only to who may name them. Traces, events and the names of sequences
tell of other users' work: they are the drive's owner's, and root's.
"""

import os

from kvfs.errors import InvalidArgument
from kvfs.objects import remote_objects
from kvfs.telemetry.chrome_trace import chrome_trace, span_dicts
from kvfs.telemetry.visible_store import OF_THE_STORE
from spdk_glue.trace import TRACE


class RemoteVisibleStore:
    """What RemoteStore adds. Expects `_call`, `path` and `_connection`."""

    def telemetry(self) -> dict:
        """See Store.telemetry."""
        return self._call("telemetry")

    def drive_map(self) -> list[dict]:
        """See Store.drive_map."""
        return self._call("drive_map")

    def newest_sequences(self, limit: int = 100) -> list[dict]:
        """See Store.newest_sequences. Raises NotPermitted."""
        return self._call("newest_sequences", limit=limit)

    def events(self, after: int = 0) -> list[dict]:
        """Of the process that owns the drive: see Store.events. Raises NotPermitted."""
        return self._call("events", after=after)

    def start_trace(self) -> None:
        """As Store.start_trace, of this process and of the one that owns the drive. Raises NotPermitted."""
        self._call("start_trace")
        if not TRACE.start():
            self._call("stop_trace")
            raise InvalidArgument("a trace of this process is under way already")

    def stop_trace(self) -> dict:
        """As Store.stop_trace, of both processes: they share a host, and so a clock."""
        own = span_dicts(TRACE.stop())
        return chrome_trace([*own, *self._call("stop_trace")], store=self.path, client=os.getpid())


# the owner's side


def telemetry(session) -> dict:
    known = remote_objects.counters(session)
    return {**session.store.telemetry(), **{name: known[name] for name in OF_THE_STORE}}


def drive_map(session) -> list[dict]:
    return session.store.drive_map()


def newest_sequences(session, limit: int) -> list[dict]:
    session.client.check_sees_others()
    return session.store.newest_sequences(limit)


def events(session, after: int) -> list[dict]:
    session.client.check_sees_others()
    return session.store.events(after)


def start_trace(session) -> None:
    session.client.check_sees_others()
    session.store.start_trace()
    session.is_tracing = True


def stop_trace(session) -> list[dict]:
    """Of a client that goes without this, its session does it."""
    if not session.is_tracing:
        raise InvalidArgument("no trace of this connection is under way")
    session.is_tracing = False
    return session.store._stop_trace_spans()


CALLS = (telemetry, drive_map, newest_sequences, events, start_trace, stop_trace)
