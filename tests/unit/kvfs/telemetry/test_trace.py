"""Traces, events and logs: one request is found in all of them by its identifier."""

import json
import logging

import pytest

import kvfs
from kvfs.errors import EmptySequence, InvalidArgument, NotPermitted
from kvfs.telemetry.chrome_trace import LAYERS
from kvfs.telemetry.events import EVENTS, MAX_EVENTS
from kvfs.telemetry.json_log import JsonFormatter
from spdk_glue.request_id import current, new_request, request_name
from spdk_glue.trace import TRACE
from tests.unit.kvfs.conftest import random_queries

from .conftest import add_model, attend, fill

COMPLETE, METADATA, BEGIN, END = "XMbe"


def check(trace):
    """Chrome's trace event format, as far as kvfs uses it."""
    assert json.loads(json.dumps(trace)) == trace
    open_waits, ends = set(), {}
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    for event in trace["traceEvents"]:
        assert (
            isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        )
        if event["ph"] == METADATA:
            continue
        assert event["cat"] in LAYERS and event["ts"] >= 0 and (event["pid"], event["tid"]) in named
        track = event["pid"], event["tid"]
        if event["ph"] == COMPLETE:
            stack = ends.setdefault(track, [])
            while stack and stack[-1] <= event["ts"] + 1e-6:
                stack.pop()
            stop = event["ts"] + event["dur"]
            assert not stack or stop <= stack[-1] + 1e-3, f"{event} overlaps the one around it"
            stack.append(stop)
        elif event["ph"] == BEGIN:
            open_waits.add((event["cat"], event["id2"]["local"]))
        else:
            assert event["ph"] == END
            open_waits.remove((event["cat"], event["id2"]["local"]))
    assert not open_waits


def spans(trace):
    return [event for event in trace["traceEvents"] if event["ph"] in (COMPLETE, BEGIN)]


@pytest.fixture
def cold(path):
    """A store whose drive has nothing in its cache, with a sequence long enough for readers and workers."""
    with kvfs.open(path, cache_bytes="8MiB", num_workers=2) as store:
        fill(store, num_tokens=6000)
    with kvfs.open(path, cache_bytes="8MiB", num_workers=2) as store:
        yield store


def test_a_decode_step_through_all_layers(cold):
    """A layer without a span would hide where time goes. One request per layer of the model, the same in all
    layers and threads."""
    sequence = cold.sequence("a")
    sequence.layer_tokens(0)
    cold.start_trace()
    attend(cold, sequence)
    trace = cold.stop_trace()
    check(trace)
    requests = [event["args"]["request"] for event in spans(trace) if event["cat"] == "host"]
    assert len(requests) == len(set(requests)) == 2
    for request in requests:
        layers = {event["cat"] for event in spans(trace) if event["args"]["request"] == request}
        assert layers == {"host", "queue", "drive", "ftl", "media", "kernel"}
    assert len({event["tid"] for event in spans(trace) if event["cat"] in ("media", "kernel")}) > 1


def test_spans_lie_within_their_request(cold):
    """A clock of another kind in one layer would show work before it was asked for."""
    cold.start_trace()
    attend(cold, cold.sequence("a"))
    found = spans(cold.stop_trace())
    for event in found:
        (host,) = (e for e in found if e["cat"] == "host" and e["args"]["request"] == event["args"]["request"])
        assert host["ts"] <= event["ts"] <= host["ts"] + host["dur"]


def test_a_set(drive_set):
    """Drives work on threads of their own: for the same request."""
    sequence = fill(drive_set, num_kv_heads=4)
    drive_set.start_trace()
    attend(drive_set, sequence)
    trace = drive_set.stop_trace()
    check(trace)
    for layer in ("host", "queue", "drive"):
        of_layer = [event for event in spans(trace) if event["cat"] == layer]
        assert len({event["args"]["request"] for event in of_layer}) == 2 and len(of_layer) >= 2


def test_one_at_a_time(store):
    store.start_trace()
    with pytest.raises(InvalidArgument, match="under way"):
        store.start_trace()
    store.stop_trace()
    assert not TRACE.is_on


def test_through_a_mount(served):
    """A live mount is traced by a client, which sees its own side and the owner's."""
    with served.open() as client:
        sequence = fill(client)
        # owner and client are one process here: the client's own trace is the one that the owner has started
        with pytest.raises(InvalidArgument, match="under way"):
            client.start_trace()
        assert not TRACE.is_on
        client._call("start_trace")
        attend(client, sequence)
        found = client._call("stop_trace")
    assert {"host", "client", "drive"} <= {span["layer"] for span in found}


def test_a_client_that_goes_ends_its_trace(served):
    """Or it would cost the owner for ever, and keep others from tracing."""
    client = served.open()
    client._call("start_trace")
    assert TRACE.is_on
    client.close()
    served.server.close()  # waits for the sessions
    assert not TRACE.is_on


def test_others_see_no_work_of_others(served, monkeypatch):
    """Names, events and spans tell what other users do."""
    with served.open() as client:
        fill(client)
        monkeypatch.setattr("kvfs.remote.rights.Client.is_administrator", False)
        for call in (client.newest_sequences, client.events, client.start_trace):
            with pytest.raises(NotPermitted):
                call()
        assert client.telemetry()["prefix"]["tenants"] == []
        assert client.drive_map()


def test_the_error_has_the_request(store, caplog):
    """Who gets an error finds its request in log and trace."""
    sequence = store.create_sequence(add_model(store), "empty")
    store.start_trace()
    with caplog.at_level(logging.INFO, "kvfs"), pytest.raises(EmptySequence) as error:
        store.attend(0, random_queries(), sequence)
    (span,) = spans(store.stop_trace())
    assert span["name"] == "attend" and span["args"]["request"] == error.value.request_id
    assert "attend failed" in caplog.text


def test_the_error_of_a_client_has_the_owners_request(served):
    with served.open() as client:
        sequence = client.create_sequence(add_model(client), "empty")
        with pytest.raises(EmptySequence) as error:
            client.attend(0, random_queries(), sequence)
    assert "-" in error.value.request_id


def test_json_lines():
    """A collector of logs reads one object a line, whatever the message holds."""
    record = logging.LogRecord("kvfs.x", logging.WARNING, "", 0, "two\nlines %s", ('"a"',), None)
    current.request = new_request()
    try:
        line = JsonFormatter().format(record)
        assert "\n" not in line
        found = json.loads(line)
        assert found["text"] == 'two\nlines "a"' and found["request"] == request_name(current.request)
    finally:
        current.request = None
    assert found["level"] == "warning" and found["time"].endswith("+00:00")


def test_events(store):
    """Warnings of all layers are events, with the request that met them; kvfs's own are in the log, too."""
    start = max((event["number"] for event in store.events()), default=0)
    logging.getLogger("ftl.collector").warning("odd  thing\n%d", 7)
    logging.getLogger("ftl.collector").info("not one")
    logging.getLogger("elsewhere").warning("nor this")
    EVENTS.note("drive_added", "drive b was added", drive="b")
    warned, noted = store.events(after=start)
    assert (warned["level"], warned["source"], warned["text"]) == ("warning", "ftl.collector", "odd thing 7")
    assert noted["kind"] == "drive_added" and noted["facts"] == {"drive": "b"}
    assert store.events(after=noted["number"]) == []


def test_warnings_are_seen_without_logging(store, monkeypatch):
    """A program that has set up no logging gets warnings on stderr, once; others as they have set it up."""
    seen = []
    monkeypatch.setattr(logging, "lastResort", logging.NullHandler(logging.WARNING))
    monkeypatch.setattr(logging.lastResort, "handle", seen.append)
    logging.getLogger("kvfs.x").warning("somebody listens")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging.getLogger("kvfs.x").warning("nobody listens")
    assert [record.getMessage() for record in seen] == ["nobody listens"]


def test_events_are_bounded(store):
    for number in range(MAX_EVENTS + 5):
        EVENTS.note("many", str(number))
    assert len(store.events()) == MAX_EVENTS
