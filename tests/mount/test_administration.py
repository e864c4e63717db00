"""A mounted drive is looked after through its socket: the same verbs and output as of one that is not."""

import json
import signal

import numpy as np
import pytest

import kvfs
from kvfs import errors
from kvfs.administration.remote_care import remote_cares
from kvfs.mount.mountpoints import mount_at
from tests.unit.kvfsctl.command_line import kvfsctl as in_process
from tests.unit.kvfsctl.drive_verbs import DRIVE_VERBS, command_line

SHAPE = ("--layers", "1", "--query-heads", "2", "--kv-heads", "1", "--head-dim", "64")


def fields(verb: tuple, place, code: int = 0) -> dict:
    """A verb's JSON without what names the place."""
    done = in_process(*verb[:1], place, *verb[1:], "--json")
    assert (done.returncode, done.stderr) == (code, ""), done
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    return {name: value for name, value in document.items() if name not in ("drive", "place")}


def shape(value):
    """Names and types: what a script relies on where numbers differ."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value)


@pytest.fixture
def filled(drive):
    with kvfs.open(drive, cache_bytes="8MiB", worker="reference") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
        rows = np.random.default_rng(0).standard_normal((600, 1, 64), np.float32)
        store.create_sequence(model, "chat").append(0, rows, rows)
    return drive


VERBS = [
    ("ls",),
    ("tree",),
    ("info",),
    ("inspect", "chat"),
    ("inspect", "--lba", "3"),
    ("wear",),
    ("gc",),
    ("scrub",),
    ("check",),
]


def test_the_same_verbs_and_output(filled, servers, tmp_path):
    """What is said of a drive that is mounted has the fields that are said of one that is not."""
    from .conftest import KVFSCTL

    before = {verb: fields(verb, filled) for verb in VERBS}
    mountpoint = tmp_path / "mount"
    servers([*KVFSCTL, "mount", "--foreground", filled, mountpoint], mountpoint)
    for verb in VERBS:
        for place in (filled, mountpoint):
            found = fields(verb, place)
            assert shape(found) == shape(before[verb]), verb
    assert fields(("check",), filled)["num_sequences"] == 1
    assert fields(("ls",), mountpoint)["sequences"][0]["num_tokens"] == 600
    assert fields(("flush",), filled)["is_mounted"] is True
    status = fields(("status",), filled)["drives"]
    assert [(one["state"], one["complaints"], one["mountpoint"]) for one in status] == [
        ("mounted", [], str(mountpoint))
    ]
    repair = in_process("check", filled, "--repair")
    assert repair.returncode == 1 and "kvfsctl umount" in repair.stderr
    assert in_process("gc", filled, "--collection", "greedy").returncode == 2
    for verb in ("pin", "unpin"):
        assert fields((verb, "chat"), mountpoint)["sequences"] == ["chat"]
        assert in_process(verb, mountpoint, "chat").stdout == f"{verb}ned chat\n"
    with kvfs.open(mountpoint) as store:
        sequence = store.sequence("chat")
        store.attend(0, np.ones((1, 1, 2, 64), np.float32), sequence, causal=False)
    assert fields(("drop",), filled)["dropped"][0]["cache_lines"] > 0
    assert fields(("drop",), filled)["dropped"][0]["cache_lines"] == 0
    with kvfs.open(mountpoint) as store:
        (care,) = remote_cares(store).values()
        for wrong in (-1, "many", 1 << 60):
            with pytest.raises(errors.InvalidArgument):
                care.owner(wrong)
        with pytest.raises(errors.InvalidArgument):
            store._call("care", verb="__init__", drive=str(filled), arguments={})
        with pytest.raises(errors.InvalidArgument):
            store._call("care", verb="collect", drive=str(filled), arguments={"nonsense": 1})
        with pytest.raises(errors.InvalidArgument):
            store._call("care", verb="health", drive="another", arguments={})


def test_a_dead_server(filled, servers, tmp_path):
    """Behind a mountpoint whose server was killed: status says so with its code, the drive is used directly."""
    from .conftest import KVFSCTL

    mountpoint = tmp_path / "mount"
    server = servers([*KVFSCTL, "mount", "--foreground", filled, mountpoint], mountpoint)
    server.stop(signal.SIGKILL)
    done = in_process("status", mountpoint)
    assert done.returncode == 4 and "server is gone: kvfsctl umount" in done.stdout
    for words in DRIVE_VERBS.keys() - {("status",), ("format",)}:
        gone = in_process(*command_line(words, DRIVE_VERBS[words], mountpoint, tmp_path))
        assert gone.returncode in (1, 2) and "Traceback" not in gone.stderr, gone
        if gone.returncode == 1:
            assert gone.stderr.startswith("kvfsctl: ") and gone.stderr.count("\n") == 1, gone
    for verb in ("ls", "df", "info", "check", "scrub", "wear", "gc", "flush", "drop", "tree", "stats", "top"):
        assert "is gone" in in_process(verb, mountpoint).stderr, verb
    assert fields(("ls",), filled)["sequences"][0]["name"] == "chat"
    assert in_process("umount", mountpoint).returncode == 0 and not mount_at(mountpoint)
    again = in_process("umount", mountpoint)
    assert again.returncode == 1 and again.stderr.count("\n") == 1, again
