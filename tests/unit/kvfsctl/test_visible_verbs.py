"""The verbs that show what happens: trace, events, top, stats over time."""

import json

import numpy as np
import pytest

import kvfs
from tests.unit.kvfs.remote.owner import Owner
from tests.unit.kvfsctl.command_line import kvfsctl


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = store.add_model("tiny", num_layers=2, num_query_heads=2, num_kv_heads=1, head_dim=64)
        sequence = store.create_sequence(model, "chat")
        for layer in range(2):
            rows = np.ones((300, 1, 64), np.float32)
            sequence.append(layer, rows, rows)
    return path


@pytest.fixture
def owner(drive, tmp_path):
    """The drive as another process has it, with a folder as of a mount."""
    owner = Owner(drive, tmp_path / "mount")
    owner.process.stdin.write("invite\n")
    owner.process.stdin.flush()
    owner._answer()
    yield owner
    owner.kill()
    owner.process.wait()


def test_trace_of_a_drive(drive, tmp_path):
    """One decode step, through all layers, as a file that viewers open."""
    output = tmp_path / "trace.json"
    result = kvfsctl("trace", drive, "chat", "-o", output, "--json")
    assert result.returncode == 0, result.stderr
    told, trace = json.loads(result.stdout), json.loads(output.read_text())
    assert told["spans"] == len([event for event in trace["traceEvents"] if event["ph"] in "Xb"])
    assert told["layers"].keys() >= {"host", "queue", "drive", "ftl", "kernel"}
    assert told["layers"]["host"] == 2


def test_trace_of_a_live_drive(owner, tmp_path):
    """The process that has the drive is traced from another one: both sides, on one clock."""
    output = tmp_path / "trace.json"
    result = kvfsctl("trace", owner.folder, "chat", "-o", output)
    assert result.returncode == 0, result.stderr
    events = [event for event in json.loads(output.read_text())["traceEvents"] if event["ph"] == "X"]
    clients = [event for event in events if event["cat"] == "client"]
    hosts = [event for event in events if event["cat"] == "host"]
    assert len(clients) == len(hosts) == 2
    for client, host in zip(clients, hosts, strict=True):
        assert client["ts"] <= host["ts"] and host["ts"] + host["dur"] <= client["ts"] + client["dur"]


def test_what_cannot_be_traced(drive, tmp_path):
    """One line each: nothing to look at, no such sequence, nowhere to write."""
    assert "name a sequence" in kvfsctl("trace", drive).stderr
    for arguments in (
        ("trace", drive),
        ("trace", drive, "none", "-o", tmp_path / "t"),
        ("trace", drive, "chat", "-o", tmp_path / "none" / "t"),
        ("top", drive),
        ("events", tmp_path / "none"),
    ):
        result = kvfsctl(*arguments)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr


def test_stats_over_time(drive, owner):
    """As vmstat does: a line for each look, a header now and then; for scripts an object a line."""
    result = kvfsctl("stats", owner.folder, "0.1", "2")
    assert result.returncode == 0, result.stderr
    header, *lines = result.stdout.splitlines()
    assert "attends/s" in header and len(lines) == 2


def test_stats_over_time_as_json(drive):
    result = kvfsctl("stats", drive, "0.1", "3", "--json")
    looks = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(looks) == 3 and all(look["attends_per_second"] == 0 for look in looks)
    assert all((look["schema"], look["verb"]) == (1, "stats") for look in looks)


def test_top(owner):
    result = kvfsctl("top", owner.folder, "0.1", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("what took time") == 2


def test_top_as_json(owner):
    """For scripts the same, a line each."""
    result = kvfsctl("top", owner.folder, "0.1", "2", "--json")
    looks = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(looks) == 2
    for look in looks:
        assert look.keys() >= {"schema", "verb", "time_s", "rates", "work", "drives"}
        assert look["drives"][0]["free_bytes"] > 0


def test_events(drive):
    """Of each a line; with --json an object."""
    result = kvfsctl("events", drive, "--json")
    assert result.returncode == 0
    for line in result.stdout.splitlines():
        assert json.loads(line).keys() >= {"schema", "number", "time_s", "level", "text", "request"}
    assert kvfsctl("events", drive).returncode == 0
