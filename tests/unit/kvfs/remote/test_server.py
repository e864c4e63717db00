"""The owner among clients that die, lie, or were never invited."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import errors
from kvfs.errors import ERRNO, KvfsError, NvmeStatusError
from kvfs.remote import protocol, server, shared_memory, socket_folder
from kvfs.remote.invitations import LIFETIME_SECONDS, MAX_PER_USER, Invitations
from kvfs.remote.protocol import HELLO, MAGIC, REPLY, REQUEST, Flag, Operation, record
from kvfs.remote.rights import Client, may
from kvfs.sequence_attributes import GID, MODE, UID

from ..conftest import add_model, random_kv, random_queries
from .owner import Owner, Served
from .test_client import wait_until

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@pytest.fixture
def owner(path, tmp_path):
    owner = Owner(path, tmp_path / "mount")
    yield owner
    if owner.process.poll() is None:
        owner.kill()


def raw_connection(served, token=None, version=protocol.PROTOCOL_VERSION):
    """A connection after its hello, as a client that does not use ours would make it."""
    invitation = json.loads((served.invite() / ".kvfs" / "connect").read_bytes())
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(invitation["socket"])
    hello = np.zeros(1, HELLO)
    hello["magic"], hello["version"] = MAGIC, version
    hello["token"] = np.frombuffer(token or bytes.fromhex(invitation["token"]), HELLO["token"])
    connection.sendall(hello)
    return connection


def answer(connection):
    """(reply, its body); None at the end of the connection."""
    buffer = bytearray(REPLY.itemsize)
    try:
        if not protocol.receive(connection, buffer):
            return None
        reply = protocol.parse_reply(buffer)
        body = bytearray(reply.body_bytes)
        return (reply, body) if protocol.receive(connection, body) else None
    except ConnectionError:
        return None


# who may connect


def test_a_token_is_good_once(served):
    """Whoever reads the file later, or guesses, must not get in."""
    with served.open() as first:
        assert first.models() == []
        with pytest.raises(errors.NotPermitted):
            kvfs.open(served.folder)
        served.invite()
        for token in (bytes(32), b"x" * 32):
            with raw_connection(served, token) as connection:
                reply, body = answer(connection)
                assert reply.is_error
                assert isinstance(protocol.decode_error(body), errors.NotPermitted)
                assert answer(connection) is None
        assert first.models() == []


def test_an_invitation_ends():
    """A token that lies about must not be good for ever, and not take memory for ever."""
    now = 0.0
    invitations = Invitations(lambda: now)
    token = invitations.invite(5)
    assert invitations.is_expected(5) and not invitations.is_expected(6)
    assert not invitations.accept(6, token)
    assert invitations.accept(5, token)
    assert not invitations.accept(5, token)
    token = invitations.invite(5)
    now += LIFETIME_SECONDS
    assert not invitations.is_expected(5)
    assert not invitations.accept(5, token)
    tokens = [invitations.invite(7) for _ in range(MAX_PER_USER + 1)]
    assert not invitations.accept(7, tokens[0])
    assert all(invitations.accept(7, token) for token in tokens[1:])


@needs_root
def test_another_users_token(path, request):
    """A token that was seen by another user is of no use to that one."""
    script = """
        import os, sys, kvfs
        kvfs.open  # loads it, while this user may read all modules
        os.setuid(int(sys.argv[2]))
        try:
            kvfs.open(sys.argv[1])
        except kvfs.errors.NotPermitted as error:
            print("refused:", error)
    """
    folder = Path(tempfile.mkdtemp(prefix="kvfs-test-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    request.addfinalizer(lambda: shutil.rmtree(folder))
    with kvfs.open(path) as store, Served(store, folder, for_everyone=True) as served:
        for others_invited in (False, True):
            if others_invited:
                served.invite(NOBODY)
            served.invite(0)
            command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(NOBODY)]
            found = subprocess.run(command, capture_output=True, text=True)
            assert found.stdout.startswith("refused:"), found.stderr
        assert "no such invitation" in found.stdout
        served.invite(NOBODY)
        found = subprocess.run(
            [*command[:2], command[2] + "print('in')", *command[3:]], capture_output=True, text=True
        )
        assert found.stdout == "in\n", found.stderr


def test_too_many_clients(path, tmp_path):
    """Memory is shared with each client: there is a limit, and an error that says so."""
    with kvfs.open(path) as store, Served(store, tmp_path / "mount", max_clients=2) as served:
        with served.open(), served.open():
            with pytest.raises(errors.TooManyClients) as caught:
                served.open()
            assert caught.value.limit == 2
        wait_until(lambda: not served.server._clients)
        served.open().close()


def test_a_client_that_says_nothing(served, monkeypatch):
    """Half-open connections must not take the places of clients for ever."""
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.1)
    served.invite()
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(served.server.socket_path))
    wait_until(lambda: served.server._clients)
    wait_until(lambda: not served.server._clients)
    silent.close()
    served.open().close()


def test_another_protocol(served):
    """A client of another version: refused with a line that says so, before it sends anything else."""
    with raw_connection(served, version=99) as connection:
        reply, body = answer(connection)
        assert reply.is_error and "version" in str(protocol.decode_error(body))
    connect = served.invite() / ".kvfs" / "connect"
    connect.write_text(json.dumps({**json.loads(connect.read_text()), "protocol": 99}))
    with pytest.raises(errors.NotADrive, match="version 99"):
        kvfs.open(served.folder)


# what they may do


def test_rights():
    """A sequence's mode in the mount holds for clients too: owner, group, others."""

    class Fake:
        name = "s"

        def __init__(self, **attributes):
            self._attributes = attributes

        def attributes(self):
            return {name: b"%d" % value for name, value in self._attributes.items()}

    sequence = Fake(**{MODE: 0o750, UID: 10, GID: 20})
    rights = {
        (uid, gid): [may(Client(uid, gid, 1, frozenset({gid})), sequence, write) for write in (False, True)]
        for uid, gid in ((0, 0), (10, 99), (99, 20), (99, 99))
    }
    assert rights == {(0, 0): [1, 1], (10, 99): [1, 1], (99, 20): [1, 0], (99, 99): [0, 0]}
    assert may(Client(99, 99, 1), Fake(), write=True), "none set: whom the mount admits"


def test_what_is_not_permitted(path, tmp_path):
    """A client without rights neither reads nor changes a sequence, whatever it asks."""
    allowed = {"read": True, "write": False}
    with (
        kvfs.open(path) as store,
        Served(
            store, tmp_path / "mount", may=lambda client, s, write: allowed["write" if write else "read"]
        ) as served,
        served.open() as client,
    ):
        model = add_model(client)
        sequence = client.create_sequence(model, "s")
        for call in (
            lambda: sequence.append(0, *random_kv(1)),
            lambda: sequence.append_tokens([1]),
            lambda: sequence.truncate(0),
            lambda: sequence.compact(),
            lambda: sequence.set_attribute("user.a", b""),
            lambda: client.delete_sequence("s"),
            lambda: client.rename_sequence("s", "t"),
        ):
            with pytest.raises(errors.NotPermitted):
                call()
        assert (sequence.num_tokens, sequence.name) == (0, "s")
        allowed["read"] = False
        assert client.sequence("s") is sequence
        for call in (
            lambda: sequence.read(0),
            lambda: sequence.tokens,
            lambda: sequence.fork("t"),
            lambda: client.attend(0, random_queries(), sequence),
        ):
            with pytest.raises(errors.NotPermitted):
                call()


# death


_APPEND_FOR_EVER = """
    import sys, numpy as np, kvfs
    store = kvfs.open(sys.argv[1])
    sequence = store.sequence("s")
    rows = np.arange(100 * 2 * 64, dtype=np.float32).reshape(100, 2, 64) % 31
    print("appending", flush=True)
    while True:
        for layer in range(2):
            sequence.append(layer, rows, -rows)
        if sequence.num_tokens > 20_000:
            sequence.truncate(0)
"""


def test_a_client_that_is_killed(served, client, sequence):
    """kill -9 of a client in the middle of an append: others go on, complete tokens are as it wrote them."""
    for round_number in range(3):
        sequence.truncate(0)
        command = [sys.executable, "-c", textwrap.dedent(_APPEND_FOR_EVER), str(served.invite())]
        killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert killed.stdout.readline() == "appending\n"
        time.sleep(0.1 + 0.037 * round_number)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        wait_until(lambda: len(served.server._clients) == 1)
        rows = (np.arange(100 * 2 * 64).reshape(100, 2, 64) % 31).astype(np.float16)
        num_tokens = sequence.num_tokens
        for layer in range(2):
            keys, values = sequence.read(layer, 0, num_tokens)
            want = np.tile(rows, (-(-num_tokens // 100), 1, 1))[:num_tokens]
            np.testing.assert_array_equal(keys, want)
            np.testing.assert_array_equal(values, -want)
    assert client.check() == []


_IMPORT_HALF = """
    import sys, numpy as np, kvfs
    store = kvfs.open(sys.argv[1])
    model = store.model(sys.argv[2])
    done = store.create_sequence(model, "done", {"importing": b""})
    half = store.create_sequence(model, "half", {"importing": b""})
    rows = np.ones((300, 2, 64), np.float32)
    for layer in range(2):
        done.append(layer, rows, rows)
    done.remove_attribute("importing")
    half.append(0, rows, rows)
    print("half", flush=True)
    sys.stdin.read()
"""


def test_an_import_that_is_killed(served, client, sequence):
    """kill -9 of kvfsctl import: nothing of the sequence stays, of one that was complete everything."""
    command = [sys.executable, "-c", textwrap.dedent(_IMPORT_HALF), str(served.invite()), sequence.model.name]
    killed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "half\n"
    assert {row.name for row in client.catalogue_rows()} == {"s", "done", "half"}
    killed.kill()
    killed.communicate()
    wait_until(lambda: len(served.server._clients) == 1)
    assert {row.name for row in client.catalogue_rows()} == {"s", "done"}
    assert client.sequence("done").num_tokens == 300
    assert client.check() == []


def test_the_owner_is_killed(owner):
    """kill -9 of the mount: a clear error from the call under way and all that follow, never a wait."""
    client = owner.open()
    sequence = client.create_sequence(add_model(client), "s")
    caught = []

    def work():
        try:
            while True:
                sequence.append(0, *random_kv(10))
                client.attend(0, random_queries(), sequence)
        except errors.ServerGone as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    owner.kill()
    thread.join(20)
    assert caught and str(owner.folder) in str(caught[0])
    for call in (lambda: sequence.num_tokens, client.flush, lambda: client.sequence("s")):
        with pytest.raises(errors.ServerGone):
            call()
    client.close()  # there is nothing left to flush, and the caller knows
    with pytest.raises(errors.ServerGone):
        kvfs.open(owner.folder)


def test_the_owner_ends(owner, path):
    """Unmounting while clients are connected: what they flushed is there, and they are told."""
    client = owner.open()
    sequence = client.create_sequence(add_model(client), "s")
    for layer in range(2):
        sequence.append(layer, *random_kv(300))
    assert sequence.num_tokens == 300
    owner.end()
    with pytest.raises(errors.ServerGone):
        sequence.flush()
    with kvfs.open(path) as store:
        assert store.sequence("s").num_tokens == 300
        assert store.check() == []


# lies


_NASTY_BODIES = [
    b"",
    b"\xff\x00",
    b"null",
    b"[]",
    b"[" * 100_000,
    b'{"call": "models"}',
    b'{"call": "__init__", "arguments": {}}',
    b'{"call": [], "arguments": {}}',
    b'{"call": "models", "arguments": [1, 2]}',
    b'{"call": "models", "arguments": {"session": 1}}',
    b'{"call": "sequence", "arguments": {"name": {"a": 1}}}',
    b'{"call": "truncate", "arguments": {"handle": 1, "num_tokens": 1e400}}',
    b'{"call": "facts", "arguments": {"handle": [1]}}',
    b'{"call": "facts", "arguments": {"handle": -1}}',
    b'{"call": "read_heads", "arguments": {"handle": 1, "layer": "0", "kind": 0}}',
    b'{"call": "rename_sequence", "arguments": {"old_name": "s", "new_name": "\\ud800"}}',
    b'{"call": "holds", "arguments": {"handle": 1, "version": {"x": 0}}}',
    b'{"call": "set_attribute", "arguments": {"handle": 1, "name": "user.a", "value": "\\u1234"}}',
    b'{"call": "add_model", "arguments": {"name": "m", "geometry": {"dtype": [], "num_layers": 1}}}',
    b'{"call": "add_model", "arguments": {"name": "m", "geometry": 5}}',
    b'{"call": "create_sequence", "arguments": {"model": "model-float16", "name": "\\ud800"}}',
]


def test_nonsense_calls(served, client, sequence, caplog):
    """JSON of any kind is answered by an error, and the owner goes on."""
    sequence.append(0, *random_kv(20))
    with raw_connection(served) as connection:
        descriptors = socket.recv_fds(connection, REPLY.itemsize, 1)[1]
        os.close(descriptors[0])
        handle_call = b'{"call": "sequence", "arguments": {"name": "s"}}'
        for body in [handle_call, *_NASTY_BODIES]:
            fields = {"magic": MAGIC, "operation": Operation.CALL, "body_bytes": len(body)}
            protocol.send(connection, record(REQUEST, **fields), body)
            reply, text = answer(connection)
            if body != handle_call:
                assert reply.is_error, body
                assert isinstance(protocol.decode_error(text), KvfsError)
    assert sequence.layer_tokens(0) == 20


def test_mutated_requests(served, client, sequence):
    """10,000 requests with wrong fields: the owner answers each, or ends that connection; others see none."""
    keys, values = random_kv(300)
    for layer in range(2):
        sequence.append(layer, keys, values)
    queries = random_queries()
    want = client.attend(0, queries, sequence)
    client.create_sequence(sequence.model, "victim")
    random.seed(7)
    sane = {"sequence": 1, "layer": 0, "count": 3, "start": 0, "stop": 3, "dtype": 0, "scale": 0.125}
    sane |= {"offset": 0, "answer_offset": 65_536}
    numbers = [0, 1, 2, 63, 64, 1 << 20, (1 << 20) - 64, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1]
    widths = {name: REQUEST[name] for name in sane}
    connection, sent = None, 0
    while sent < 10_000:
        if connection is None:
            connection = raw_connection(served)
            os.close(socket.recv_fds(connection, REPLY.itemsize, 1)[1][0])
        if sent % 50 == 0:
            operation, body = Operation.CALL, b'{"call": "sequence", "arguments": {"name": "victim"}}'
            fields = {"operation": operation}
        else:
            operation = random.choice([*Operation, 99, 65_535])
            body = random.choice([b"", b"", b"", b"\x01\0\0\0", b"\x01\0\0\0\x02\0\0\0", b"abc"])
            fields = {**sane, "operation": operation, "flags": random.choice([0, 2, 4, 6, 8, 16, 30])}
            for name in random.sample(sorted(sane), random.randint(0, 3)):
                value = random.choice(numbers)
                if widths[name].kind == "f":
                    fields[name] = random.choice([float("nan"), float("inf"), -1.0])
                elif widths[name].kind == "i":
                    fields[name] = random.choice([value, -value])
                else:
                    fields[name] = min(value, (1 << 8 * widths[name].itemsize) - 1)
        header = {"magic": MAGIC, "number": sent, "body_bytes": len(body)}
        breaks = sent % 100 == 99
        if breaks:
            header |= random.choice([{"magic": 1}, {"body_bytes": 0xFFFF_FFFF}, {"body_bytes": len(body) + 1}])
        sent += 1
        protocol.send(connection, record(REQUEST, **header, **fields), body)
        if breaks:
            connection.shutdown(socket.SHUT_WR)
            assert answer(connection) is None
            connection.close()
            connection = None
            continue
        reply, text = answer(connection)
        assert reply.number == sent - 1
        if reply.is_error:
            assert protocol.decode_error(text).args
    # one of the requests may have spilled the tail: the same rows in other parts, summed in another order
    for have, wanted in zip(client.attend(0, queries, sequence), want, strict=True):
        np.testing.assert_allclose(have, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(sequence.read(1)[0], keys.astype(np.float16))
    assert client.check() == []


def test_posted_requests_that_fail(served):
    """A flood of posted requests without a reply, all bad: one error, for the next that asks of all."""
    with raw_connection(served) as connection:
        os.close(socket.recv_fds(connection, REPLY.itemsize, 1)[1][0])
        for number in range(1000):
            fields = {"magic": MAGIC, "number": number, "operation": Operation.APPEND, "flags": Flag.POSTED}
            protocol.send(connection, record(REQUEST, **fields))
        body = b'{"call": "flush_store", "arguments": {}}'
        for number, is_error in ((7, True), (8, False)):
            header = {"magic": MAGIC, "number": number, "body_bytes": len(body)}
            protocol.send(connection, record(REQUEST, **header, operation=Operation.CALL), body)
            reply, _ = answer(connection)
            assert reply.is_error == is_error and reply.number == number


@pytest.mark.parametrize("piece", [1, 7, 100, 1 << 20])
def test_messages_in_any_pieces(piece):
    """A stream has no borders: of several messages at once, of one in many pieces, of one longer than is taken
    at once."""
    sizes = [
        0,
        1,
        88,
        88,
        protocol.RECEIVED_BYTES - 3,
        5,
        protocol.RECEIVED_BYTES + 5,
        88,
        3 * protocol.RECEIVED_BYTES,
    ]
    messages = [random.Random(size).randbytes(size) for size in sizes]
    if piece == 1:
        messages = messages[:4]
    ours, theirs = socket.socketpair()

    def send():
        stream = b"".join(messages) + b"half of one"
        for start in range(0, len(stream), piece):
            theirs.sendall(stream[start : start + piece])
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    with protocol.reader(ours) as arrived:
        for message in messages:
            assert protocol.take(arrived, len(message)) == message
        assert protocol.take(arrived, 12) is None
    sender.join()
    ours.close()


def test_shared_memory_keeps_its_size():
    """A region that one side makes smaller would kill the other by SIGBUS."""
    descriptor = shared_memory.create(1 << 20)
    for size in (0, 2 << 20):
        with pytest.raises(OSError):
            os.ftruncate(descriptor, size)
    memory = shared_memory.SharedMemory(descriptor)
    os.close(descriptor)
    float32 = np.dtype("<f4")
    assert memory.array((1 << 20) - 64, (16,), float32).shape == (16,)
    for offset, shape in ((1, (1,)), ((1 << 20) - 64, (17,)), (0, (1 << 62, 1 << 62)), (1 << 63, (1,))):
        with pytest.raises(errors.InvalidArgument):
            memory.array(offset, shape, float32)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises((ValueError, OSError)):
        shared_memory.SharedMemory(unsealed)
    os.close(unsealed)


# errors


def test_errors_cross():
    """Class, text, facts and errno of an error are the same on both sides."""
    samples = [
        errors.NotADrive("/d", "why"),
        errors.DriveBusy("/d", 5),
        errors.OutOfSpace(5, 3),
        errors.CatalogueFull(7),
        errors.StoreClosed(),
        errors.NoSuchModel("m"),
        errors.ModelMismatch("m", {"head_dim": (64, 128)}),
        errors.NoSuchSequence("s"),
        errors.SequenceExists("s"),
        errors.EmptySequence("s", 3),
        errors.InvalidArgument("this is wrong"),
        NvmeStatusError(2, 0x281, lba=7, detail="unrecovered"),
        NvmeStatusError(1, 0x081),
    ]
    for error in samples:
        found = protocol.decode_error(protocol.encode_error(error))
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)
        assert errors.errno_of(found) == errors.errno_of(error)
    unforeseen = protocol.decode_error(protocol.encode_error(ZeroDivisionError("oops")))
    assert type(unforeseen) is KvfsError and "oops" in str(unforeseen)
    assert all(kind.__name__ in protocol._ERRORS for kind in ERRNO)


# where the socket lies


def test_sockets_of_killed_owners_are_removed(tmp_path, monkeypatch):
    """A name per crash would fill the runtime folder; one that is in use must stay."""
    monkeypatch.setattr(socket_folder, "_folder", lambda for_everyone: tmp_path / "kvfs")
    in_use = socket_folder.new_socket_path(False)
    dead = socket_folder.new_socket_path(False)
    listening = socket_folder.listen(in_use, 1, False)
    socket_folder.listen(dead, 1, False).close()
    assert dead.exists()
    socket_folder.new_socket_path(False)
    assert in_use.exists() and not dead.exists()
    listening.close()


def test_a_socket_folder_of_others(tmp_path, monkeypatch):
    """A folder that others can write to: they could put a socket of their own there."""
    monkeypatch.setattr(socket_folder, "_folder", lambda for_everyone: tmp_path / "kvfs")
    (tmp_path / "kvfs").mkdir()
    (tmp_path / "kvfs").chmod(0o777)
    with pytest.raises(errors.NotPermitted):
        socket_folder.new_socket_path(True)
    (tmp_path / "kvfs").rmdir()
    for for_everyone, mode in ((False, 0o700), (True, 0o755), (False, 0o755)):  # a later mount lets others in
        socket_folder.new_socket_path(for_everyone)
        assert (tmp_path / "kvfs").stat().st_mode & 0o777 == mode
    with pytest.raises(errors.InvalidArgument, match="too long"):
        socket_folder.listen(tmp_path / ("x" * 108), 1, False)
