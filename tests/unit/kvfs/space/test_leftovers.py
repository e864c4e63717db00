"""What processes leave that are really killed: who goes by himself, who is only shown, who stays."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import kvfs
from kvfs import owner_process
from kvfs.administration import leftovers as machine
from kvfs.errors import InvalidArgument
from kvfs.owner_process import OwnerState, is_owner, owner_state, this_process
from kvfs.sequence_attributes import OWNER
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl

from ..conftest import add_model
from ..remote.owner import Served
from ..remote.test_server import wait_until

_LEAVE = """
    import sys, numpy as np, kvfs
    from kvfs.owner_process import this_process
    options = {} if len(sys.argv) > 2 else {"worker": "reference", "cache_bytes": "8MiB"}
    store = kvfs.open(sys.argv[1], **options)
    model = store.add_model("m", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
    rows = np.ones((300, 1, 64), np.float32)
    kept = store.create_sequence(model, "kept")
    going = store.create_sequence(model, "going", {"user.kvfs.owner": this_process()})
    for sequence in (kept, going):
        sequence.append(0, rows, rows)
    fork = kept.fork("going-fork")
    fork.set_attribute("user.kvfs.owner", this_process())
    going.fork("kept-fork")
    named = kept.fork("answer")
    named.set_attribute("user.kvfs.owner", this_process())
    named.remove_attribute("user.kvfs.owner")
    store.flush()
    print("left", flush=True)
    sys.stdin.read()
"""
KEPT = {"answer", "kept", "kept-fork"}


def leave(place, *arguments):
    """A process that has made sequences there, and waits to be killed."""
    command = [sys.executable, "-c", textwrap.dedent(_LEAVE), str(place), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "left\n"
    return process


def kill(process):
    process.kill()
    process.communicate()


def names(store):
    return {row.name for row in store.catalogue_rows()}


def test_killed_with_the_drive_open(path):
    """What it works on goes when the drive is opened again, forks of it that were not temporary stay."""
    kill(leave(path))
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert names(store) == KEPT
        assert np.array_equal(store.sequence("kept-fork").read(0)[0], np.ones((300, 1, 64)))
        assert store.check() == []


def test_killed_client(path, tmp_path):
    """What a client works on goes with it, while the owner of the drive goes on."""
    with (
        kvfs.open(path, cache_bytes="8MiB", num_workers=2) as store,
        Served(store, tmp_path / "mount") as served,
    ):
        client = leave(served.invite(), "client")
        assert names(store) == KEPT | {"going", "going-fork"}
        assert store.leftovers() == []  # it runs
        kill(client)
        wait_until(lambda: names(store) == KEPT)
        assert store.check() == []


def other(value: bytes, place: int, text: str) -> bytes:
    fields = value.decode().split(" ")
    fields[place] = text
    return " ".join(fields).encode()


def test_whose_process():
    """One that runs must never pass for gone: its work would be deleted under it."""
    mine = this_process()
    assert is_owner(mine) and owner_state(mine) is OwnerState.ALIVE
    assert owner_state(other(mine, 0, "elsewhere")) is OwnerState.UNKNOWN
    assert owner_state(other(mine, 1, "another-boot")) is OwnerState.GONE
    assert owner_state(other(mine, 2, "1")) is OwnerState.UNKNOWN  # another container
    assert owner_state(other(mine, 4, "1")) is OwnerState.GONE  # its number, given again
    ended = subprocess.Popen(["true"])
    started = owner_process._start_time(ended.pid) or "1"
    of_ended = other(other(mine, 3, str(ended.pid)), 4, started)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert owner_state(of_ended) is OwnerState.GONE  # a zombie
    ended.wait()
    assert owner_state(of_ended) is OwnerState.GONE


@pytest.mark.parametrize("value", [b"", b"me", b"host boot 1 x 3", b"a b 1 2 3 4", b"a b 1 2 ", b"\xff" * 9])
def test_wrong_owners_are_refused(store, model, value):
    """One that nobody can look for would never be found again."""
    with pytest.raises(InvalidArgument, match=r"user\.kvfs\.owner"):
        store.create_sequence(model, "s", {OWNER: value})


@pytest.fixture
def no_machine(monkeypatch):
    """Without what was left on the machine that the tests run on."""
    monkeypatch.setattr(machine, "machine_leftovers", list)


def test_verb(path, no_machine):
    """What may be in use elsewhere goes with --unknown alone, and nothing without having been asked for."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        store.create_sequence(model, "far", {OWNER: other(this_process(), 0, "elsewhere")})
        store.create_sequence(model, "mine", {OWNER: this_process()})
    shown = json.loads(kvfsctl("leftovers", path, "--json").stdout)
    assert [each["name"] for each in shown["sequences"]] == ["far"]
    assert not shown["sequences"][0]["is_certain"] and not shown["is_cleaned"]
    text = kvfsctl("leftovers", path).stdout
    assert (
        text.startswith("sequence far of 0 tokens: process ") and "host elsewhere cannot be looked for" in text
    )
    assert kvfsctl("leftovers", path, "--clean", "--yes").returncode == 0
    assert_asks("leftovers", path, "--clean", "--unknown")
    assert "would remove sequence far" in kvfsctl("leftovers", path, "--clean", "--unknown", "--dry-run").stdout
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert names(store) == {"far", "mine"}
    assert "removed sequence far" in kvfsctl("leftovers", path, "--clean", "--unknown", "--yes").stdout
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert names(store) == {"mine"}
    assert kvfsctl("leftovers", path).stdout == "nothing was left\n"


_LISTEN = """
    import sys, socket
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    print("listens", flush=True)
    sys.stdin.read()
"""


def test_sockets_of_killed_servers(tmp_path, monkeypatch):
    """A name is taken away once nobody listens there, and not before."""
    monkeypatch.setattr(machine, "socket_folders", lambda: [tmp_path])
    monkeypatch.setattr(machine, "mounts", list)
    path = tmp_path / "0123.sock"
    command = [sys.executable, "-c", textwrap.dedent(_LISTEN), str(path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listens\n"
    assert machine.machine_leftovers() == []
    kill(server)
    assert [each.path for each in machine.machine_leftovers()] == [str(path)]
    assert kvfsctl("leftovers").stdout == f"socket {path}: its server is gone\n"
    assert_asks("leftovers", "--clean")
    assert path.exists()
    assert kvfsctl("leftovers", "--clean", "--yes").stdout == f"removed socket {path}: its server is gone\n"
    assert not path.exists()
