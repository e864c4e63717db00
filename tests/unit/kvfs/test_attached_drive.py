"""A store on a drive that another process serves over NVMe/TCP; here that process is this one."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

import kvfs
from accel import admin_commands
from kvfs import attention_request
from kvfs.errors import DriveBusy, InvalidArgument, MediaFailure, NamespaceHoldsData, NotADrive
from kvfs.serving import serve
from spdk_glue.fabrics.initiator import address
from spdk_glue.namespace import BlockNamespace
from spdk_glue.request_id import current
from spdk_glue.reservation import HOLDS, REGISTRANT_GONE, NamespaceReserved, Reservation
from spdk_glue.status import NvmeStatusError, Status
from spdk_glue.trace import TRACE
from spdk_glue.transports.tcp import TcpTransport

from .conftest import add_model, random_kv, random_queries

FIRST, SECOND = "nqn.2026-11.io.kvfs:first-host", "nqn.2026-11.io.kvfs:second-host"


@pytest.fixture
def drive_file(tmp_path):
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB")
    return path


@pytest.fixture
def location(drive_file):
    """Of the drive in the file, on the wire."""
    with serve(drive_file, "127.0.0.1:0", cache_bytes="8MiB", num_workers=2) as (server, subsystems):
        yield f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}"


def kvfsctl(*arguments):
    command = [sys.executable, "-m", "kvfsctl", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def attend_twice(location, seed=0):
    """Writes a sequence of 700 tokens, attends, opens again, attends: the four answers."""
    keys, values = random_kv(700, seed)
    answers = []
    with kvfs.open(location) as store:
        sequence = store.create_sequence(add_model(store), "s")
        for layer in range(sequence.model.num_layers):
            sequence.append(layer, keys, values)
        answers += store.attend(1, random_queries(), [sequence])
        sequence.flush()
    with kvfs.open(location) as store:
        answers += store.attend(1, random_queries(), [store.sequence("s")])
        assert store.check() == []
    return answers


def test_attention_is_that_of_the_embedded_drive(location, tmp_path):
    """To the bit: the same commands to the same workers, whatever carries them."""
    embedded = tmp_path / "other.kvfs"
    kvfs.format(embedded, "48MiB")
    for found, wanted in zip(attend_twice(location), attend_twice(embedded), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("num_tokens", [600, 20_000])  # what is answered in one flight, and by threads
def test_the_drives_spans_have_the_hosts_request(location, num_tokens):
    """The identifier crosses the wire: the drive knows of it by nothing else."""
    with kvfs.open(location) as store:
        sequence = store.create_sequence(add_model(store), "s")
        keys, values = random_kv(num_tokens)
        sequence.append(0, keys, values)
        sequence.flush()
        for _ in range(2):  # from flash, then from the cache
            TRACE.start()
            try:
                store.attend(0, random_queries(), [sequence], causal=False)
            finally:
                spans = TRACE.stop()
            (request,) = {span.request for span in spans if (span.layer, span.name) == ("host", "attend")}
            drives = {span.request for span in spans if span.layer in ("drive", "kernel")}
            assert request is not None and drives == {request}
    assert current.request is None


def test_what_was_stored_is_in_the_drive(drive_file):
    """The store is the drive's: a host that embeds it later finds all of it."""
    keys, values = random_kv(300)
    with serve(drive_file, "127.0.0.1:0", cache_bytes="8MiB") as (server, subsystems):
        location = f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}"
        with kvfs.open(location) as store:
            sequence = store.create_sequence(add_model(store), "s")
            for layer in range(sequence.model.num_layers):
                sequence.append(layer, keys, values)
            wanted = store.attend(0, random_queries(), [sequence])
    with kvfs.open(drive_file) as store:
        found = store.attend(0, random_queries(), [store.sequence("s")])
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)  # the last tokens were in host memory


def test_counters_come_from_both_sides(location):
    """Flash and attention are counted there, the wire here."""
    with kvfs.open(location) as store:
        before = store.counters()
        sequence = store.create_sequence(add_model(store), "s")
        keys, values = random_kv(300)
        for layer in range(sequence.model.num_layers):
            sequence.append(layer, keys, values)
        sequence.flush()
        store.attend(0, random_queries(), [sequence])
        after = store.counters()
    stored = 2 * 2 * 300 * 2 * 64 * 2  # layers, keys and values, tokens, heads, head_dim, bytes
    assert after["link"]["bytes_to_drive"] - before["link"]["bytes_to_drive"] > stored
    assert after["attention"]["commands"] > before["attention"]["commands"]
    assert after["flash"]["host_bytes_written"] >= stored


def test_a_second_store_is_refused(location):
    """Two catalogues of one drive destroy it: within a machine by its lock, between hosts by a reservation."""
    with kvfs.open(f"{location}?hostnqn={FIRST}") as store:
        with pytest.raises(DriveBusy, match="another process"):
            kvfs.open(f"{location}?hostnqn={FIRST}")
        opening = f"import kvfs; kvfs.open('{location}?hostnqn={SECOND}')"
        found = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True)
        assert "DriveBusy" in found.stderr.splitlines()[-1]
        store.add_model("m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64)
    kvfs.open(f"{location}?hostnqn={SECOND}").close()


def test_an_older_host_is_told(location, monkeypatch):
    """Its first attention command fails with what is wrong, before any answer of another layout."""
    with kvfs.open(location) as store:
        sequence = store.create_sequence(add_model(store), "s")
        keys, values = random_kv(300)
        for layer in range(sequence.model.num_layers):
            sequence.append(layer, keys, values)
        sequence.flush()
        wanted = store.attend(0, random_queries(), [sequence])
        with monkeypatch.context() as older:
            older.setattr(attention_request, "ATTENTION_VERSION", 1)
            with pytest.raises(NvmeStatusError, match="version 1, not 2") as caught:
                store.attend(0, random_queries(), [sequence])
            assert caught.value.status == Status.INVALID_DESCRIPTOR
        np.testing.assert_array_equal(store.attend(0, random_queries(), [sequence])[0], wanted[0])


@pytest.mark.parametrize("version", [1, 3])
def test_a_drive_of_another_version_is_refused(location, monkeypatch, version):
    """When it is opened: neither a store nor a format gets hold of it, and it is free for its own host."""
    with monkeypatch.context() as other:
        other.setattr(admin_commands, "ATTENTION_VERSION", version)
        for call in (kvfs.open, lambda location: kvfs.format(location, overwrite=True)):
            with pytest.raises(NotADrive, match=f"of version {version}, this host's of 2"):
                call(location)
    kvfs.open(f"{location}?hostnqn={SECOND}").close()


def connect(location, hostnqn):
    return BlockNamespace(TcpTransport.connect(f"{location}?hostnqn={hostnqn}"))


def host_id(hostnqn):
    return address._host_id_of(hostnqn)


def test_another_host_is_kept_out(location):
    """As from another machine, where no lock of this one reaches."""
    first, second = connect(location, FIRST), connect(location, SECOND)
    held, wanted = Reservation(first), Reservation(second)
    assert held.is_supported
    held.acquire()
    with pytest.raises(NamespaceReserved) as caught:
        wanted.acquire()
    assert caught.value.host_id == host_id(FIRST)
    for call in (
        lambda: second.read(0, 1),
        lambda: second.write(0, first.read(0, 1)),
        lambda: second.deallocate([(0, 1)]),
        second.flush,
    ):
        with pytest.raises(NvmeStatusError) as caught:
            call()
        assert caught.value.status == Status.RESERVATION_CONFLICT
    first.write(0, first.read(0, 1))
    held.release()
    wanted.acquire()
    with pytest.raises(NvmeStatusError):
        first.read(0, 1)
    wanted.release()
    first.close()
    second.close()


def test_a_host_that_is_gone_is_followed(location):
    """A host that crashed must not keep a drive forever, nor go on with it when it comes back."""
    first, second = connect(location, FIRST), connect(location, SECOND)
    Reservation(first).acquire()
    first.close()  # without release
    wanted = Reservation(second)
    (holder,) = [one for one in wanted.registrants() if one["status"] & HOLDS]
    assert holder["cntlid"] == REGISTRANT_GONE
    wanted.acquire()
    second.read(0, 1)
    back = connect(location, FIRST)
    with pytest.raises(NvmeStatusError):
        back.read(0, 1)
    wanted.release()
    back.close()
    second.close()


def test_a_restarted_target_gives_the_drive_to_nobody_else(drive_file):
    """Its host goes on with it; another is told whose it is."""
    with serve(drive_file, "127.0.0.1:0", cache_bytes="8MiB") as (server, subsystems):
        address = f"127.0.0.1:{server.address[1]}"
        location = f"nvme+tcp://{address}/{subsystems.nqn}"
        first = connect(location, FIRST)
        held = Reservation(first)
        held.acquire()
    with serve(drive_file, address, cache_bytes="8MiB"):
        second = connect(location, SECOND)
        with pytest.raises(NamespaceReserved) as caught:
            Reservation(second).acquire()
        assert caught.value.host_id == host_id(FIRST)
        first.write(0, first.read(0, 1))
        with pytest.raises(NvmeStatusError):
            second.read(0, 1)
        held.release()
        Reservation(second).acquire()
        first.close()
        second.close()


def test_the_same_host_comes_back(location):
    """Its own reservation, from before it was killed, is no obstacle."""
    first = connect(location, FIRST)
    Reservation(first).acquire()
    first.close()
    again = connect(location, FIRST)
    held = Reservation(again)
    held.acquire()
    again.read(0, 1)
    held.release()
    again.close()


def test_format(location):
    """An empty store on a drive that is there: no second flash layer over the first."""
    with kvfs.open(location) as store:
        store.create_sequence(add_model(store), "s")
    with pytest.raises(NamespaceHoldsData):
        kvfs.format(location)
    with pytest.raises(InvalidArgument, match="size, parity"):
        kvfs.format(location, "16MiB", parity=True, overwrite=True)
    kvfs.format(location, overwrite=True)
    with kvfs.open(location) as store:
        assert store.sequences() == []


def test_a_target_is_asked_what_it_has(location):
    """Who knows where a target is need not know the drive's name."""
    host, nqn = location.removeprefix("nvme+tcp://").split("/")
    (found,) = json.loads(kvfsctl("nvme", "discover", host, "--json").stdout)["subsystems"]
    assert (found["subnqn"], found["location"], found["kind"]) == (nqn, location, "nvm")
    kvfs.open(f"nvme+tcp://{host}").close()
    assert "no connection" in kvfsctl("nvme", "discover", "127.0.0.1:1").stderr


def test_options_of_the_drive_are_its_targets(location):
    """Taken in silence they would be thought to help."""
    with pytest.raises(InvalidArgument, match="cache_bytes, collection: chosen by who serves"):
        kvfs.open(location, cache_bytes="1GiB", collection="d-choices")
    kvfs.open(location, tail_bytes="1MiB").close()


def test_not_served_twice(location):
    with pytest.raises(InvalidArgument, match="served already"), serve(location, "127.0.0.1:0"):
        pass


def test_the_target_goes_away(drive_file, monkeypatch):
    """One clear error, no hang; what was flushed is there again later."""
    from spdk_glue.fabrics.initiator import controller

    monkeypatch.setattr(
        controller.Controller.__init__, "__kwdefaults__", {"keep_alive_ms": 1000, "reconnect_ms": 500}
    )
    keys, values = random_kv(300)
    with serve(drive_file, "127.0.0.1:0", cache_bytes="8MiB") as (server, subsystems):
        location = f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}"
        store = kvfs.open(location)
        sequence = store.create_sequence(add_model(store), "s")
        for layer in range(sequence.model.num_layers):
            sequence.append(layer, keys, values)
        sequence.flush()
        wanted = store.attend(0, random_queries(), [sequence])
    with pytest.raises(Exception, match="see whether the target runs"):
        store.attend(0, random_queries(), [sequence])
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, keys[:1], values[:1])  # in memory
    with pytest.raises(Exception, match=r"see whether the target runs|not flushed"):
        store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvfs-nvme-keeper"]
    with kvfs.open(drive_file) as store:
        found = store.attend(0, random_queries(), [store.sequence("s")])
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)


def test_not_there():
    with pytest.raises(MediaFailure, match="no connection"):
        kvfs.open("nvme+tcp://127.0.0.1:1/nqn.2026-11.io.kvfs:none")
