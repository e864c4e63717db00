"""What a client's store does that one in the same process need not."""

import contextlib
import gc
import os
import threading
import time

import numpy as np
import pytest

import kvfs
from kvfs import errors
from kvfs.remote.protocol import Operation
from kvfs.remote.server import SETTLE_SECONDS
from kvfs.sequence_version import Version

from ..conftest import add_model, random_kv, random_queries


def wait_until(condition):
    """Of something that another thread is about to do."""
    give_up = time.monotonic() + 60
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.005)
    assert condition()


def test_two_clients_see_each_other(served, client, sequence):
    """Clients of one drive: each sees what the other has appended, renamed and deleted."""
    keys, values = random_kv(300)
    with served.open() as other:
        sequence.append(0, keys, values)
        theirs = other.sequence("s")
        np.testing.assert_array_equal(theirs.read(0)[0], keys.astype(np.float16))
        other.rename_sequence("s", "t")
        assert sequence.name == "t"
        other.delete_sequence("t")
        assert sequence.is_deleted
        with pytest.raises(errors.InvalidArgument, match="deleted"):
            sequence.truncate(0)


def test_one_object_for_a_sequence(served, client, sequence):
    """Programs compare sequences, and use them as keys."""
    assert client.sequence("s") is sequence
    assert client.sequences() == [sequence]
    assert client.models()[0] is client.model("model-float16") is sequence.model


def test_sequences_that_nobody_holds_are_given_back(served, client):
    """A long-lived client that opens millions of sequences, one after another: the owner must not keep them."""
    model = add_model(client)
    for index in range(20):
        client.create_sequence(model, f"s{index}")
        client.sequence(f"s{index}")
    kept = client.sequence("s3")
    gc.collect()
    assert kept.num_tokens == 0  # what was dropped goes with the next call
    for handle in range(1, 21):
        with client._connection as connection:
            if handle == kept._handle:
                assert connection.call("facts", handle=handle)["name"] == "s3"
            else:
                with pytest.raises(errors.InvalidArgument, match="held"):
                    connection.call("facts", handle=handle)


def test_batches_larger_than_the_shared_memory(served, client, sequence):
    """A long prompt, a large batch, many queries: cut into requests, and the answer is the same."""
    keys, values = random_kv(12_000)
    for layer in range(2):
        sequence.append(layer, keys, values)  # 3 MB of fp16 each
    np.testing.assert_array_equal(sequence.read(1, 7)[1], values[7:].astype(np.float16))
    ours = served.store.sequence("s")
    others = [sequence.fork(f"t{index}") for index in range(40)]
    for sequences, queries in (
        (others, random_queries(num_sequences=40, num_queries=9)),
        ([sequence], random_queries(num_queries=700)),
    ):
        in_process = [served.store.sequence(s.name) for s in sequences]
        ranges = np.tile(np.array([100, 5000]), (*queries.shape[:2], 1))
        for options in ({}, {"causal": False}, {"token_ranges": ranges}, {"scale": 0.5}):
            for have, want in zip(
                client.attend(0, queries, sequences, **options),
                served.store.attend(0, queries, in_process, **options),
                strict=True,
            ):
                np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    assert ours.num_tokens == 12_000


def test_a_batch_that_does_not_fit_on_the_drive_is_refused_whole(served, client, sequence):
    """A full drive: an append in several requests takes all of its tokens or none."""
    keys, values = random_kv(200_000)
    with pytest.raises(errors.OutOfSpace) as caught:
        sequence.append(0, keys, values)
    assert sequence.layer_tokens(0) == 0
    assert caught.value.wanted_bytes > 0
    assert "delete sequences" in str(caught.value)
    sequence.append(0, keys[:300], values[:300])
    assert client.check() == []
    assert sequence.layer_tokens(0) == 300


def test_a_posted_append_that_failed(served, client, sequence):
    """Appends without a reply: the sequence's next call raises a failure, and what came between is not done.

    Other sequences are not concerned, and their users must not be told in the place of this one's.
    """
    keys, values = random_kv(1)
    other = client.create_sequence(sequence.model, "other")
    other.append(0, keys, values)
    sequence.append(0, keys, values)
    sequence.append(0, keys, values)
    served.store.delete_sequence("s")
    sequence.append(0, keys, values)
    with fails_to_append(served, "other"):
        other.append(0, keys, values)
        other.append(0, keys, values)
    other.append(0, keys, values)
    for _ in range(2):
        with pytest.raises(errors.KvfsError):
            client.flush()
    third = client.create_sequence(sequence.model, "third")
    third.append(0, keys, values)
    with pytest.raises(errors.MediaFailure):
        client.attend(0, random_queries(2), [third, other])
    assert (other.layer_tokens(0), third.layer_tokens(0)) == (1, 1)
    other.append(0, keys, values)
    assert other.layer_tokens(0) == 2
    with pytest.raises(errors.InvalidArgument, match="deleted"):
        sequence.append(0, *random_kv(300))
    assert sequence.is_deleted
    client.flush()


@contextlib.contextmanager
def fails_to_append(served, name):
    """The owner's appends to a sequence fail; all that were posted have, at the end."""
    owners = served.store.sequence(name)

    def fail(*arguments):
        raise errors.MediaFailure("the drive is gone")

    owners.append = fail
    try:
        yield
        served.server.settle()
    finally:
        del owners.append


def test_a_failure_that_nobody_asked_for(served, client):
    """A sequence that was dropped before its failed append was told of: the next flush tells, once."""
    sequence = client.create_sequence(add_model(client), "s")
    sequence.append(0, *random_kv(1))
    with fails_to_append(served, "s"):
        sequence.append(0, *random_kv(1))
    del sequence
    gc.collect()
    assert client.models()
    with pytest.raises(errors.MediaFailure):
        client.flush()
    client.flush()


def test_appends_that_fill_groups_are_posted(served, client, sequence, monkeypatch):
    """Space waits for them; what nobody needed is free again after a flush."""
    keys, values = random_kv(4000)
    asked = []
    ask = client._connection.ask

    def counted(operation, *arguments, **fields):
        asked.append(operation)
        return ask(operation, *arguments, **fields)

    monkeypatch.setattr(client._connection, "ask", counted)
    for layer in range(sequence.model.num_layers):
        for start in range(0, 4000, 100):
            sequence.append(layer, keys[start:][:100], values[start:][:100])
    assert asked.count(Operation.APPEND) < 16  # of 80 appends, which fill 15 groups in each of two layers
    owners = served.store.sequence("s")
    assert sequence.num_tokens == 4000 and len(owners._groups) > 4000 // 256
    free = client.counters()["space"]["free_bytes"]
    sequence.flush()
    assert len(owners._groups) == 4000 // 256 and client.counters()["space"]["free_bytes"] > free
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, keys, values)
        np.testing.assert_array_equal(sequence.read(layer)[0], np.concatenate([keys, keys]).astype(np.float16))
    assert client.check() == []


def test_space_in_advance_is_taken_alone(served, client, sequence, monkeypatch):
    """Other clients and files allocate, too, and a sequence may be deleted before its reply."""
    store, keys = served.store, random_kv(256)[0]
    allocate, is_alone = store._allocator.allocate, []

    def watched(num_lbas):
        is_alone.append(store._lock._is_owned())
        return allocate(num_lbas)

    monkeypatch.setattr(store._allocator, "allocate", watched)
    sequence.append(0, keys, keys)
    assert len(is_alone) > 1 and all(is_alone)
    owners = store.sequence("s")
    client.delete_sequence("s")
    is_alone.clear()
    assert owners._reserve_ahead(0, 1 << 20) == 0 and not is_alone
    assert client.check() == []


def test_no_space_in_advance_on_a_drive_that_is_nearly_full(served, client, sequence):
    """Or sequences that grow no more would hold what others need."""
    keys, values = random_kv(256)
    owners = served.store.sequence("s")
    count = 0
    with contextlib.suppress(errors.OutOfSpace):
        while True:
            for layer in range(sequence.model.num_layers):
                sequence.append(layer, keys, values)
            count += 1
    assert len(owners._groups) in (count, count + 1)
    group_bytes = owners._layout.group_lbas * 4096
    assert client.counters()["space"]["free_bytes"] < 2 * group_bytes


def test_waiting_for_what_was_posted(served, client, sequence):
    """The owner waits until a post is served, not for those who send more; a number that never comes, once."""
    keys, values = random_kv(1)
    sequence.append(0, keys, values)
    owners = served.store.sequence("s")
    append, gate = owners.append, threading.Semaphore(0)

    def gated(*arguments):
        assert gate.acquire(timeout=20)
        append(*arguments)

    owners.append = gated
    for _ in range(3):
        sequence.append(0, keys, values)
    assert not served.server.is_settled()
    found = []
    looker = threading.Thread(target=lambda: (served.server.settle(), found.append(owners.layer_tokens(0))))
    looker.start()
    time.sleep(0.05)
    sequence.append(0, keys, values)
    assert not found
    gate.release(3)
    looker.join(20)
    assert found == [4]
    gate.release(100)
    assert sequence.layer_tokens(0) == 5
    client._connection.memory.posted = 1 << 40
    start = time.monotonic()
    served.server.settle()
    assert SETTLE_SECONDS <= time.monotonic() - start < 10 * SETTLE_SECONDS
    assert served.server.is_settled()


def test_an_interrupted_call(client, sequence, monkeypatch):
    """Ctrl-C while waiting for the owner: the next call must not take the reply of the interrupted one."""
    keys, values = random_kv(10)
    sequence.append(0, keys, values)

    def interrupted(self, buffer):
        raise KeyboardInterrupt

    for call in (lambda: sequence.num_tokens, lambda: sequence.append(1, *random_kv(5, seed=3))):
        with monkeypatch.context() as patch:
            patch.setattr(type(client._connection), "_receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert sequence.layer_tokens(0) == 10
    np.testing.assert_array_equal(sequence.read(0)[0], keys.astype(np.float16))
    assert sequence.layer_tokens(1) == 5


def test_a_forked_process_has_no_connection(client, sequence):
    """Two processes on one connection would take each other's replies."""
    sequence.append(0, *random_kv(3))
    child = os.fork()
    if not child:
        code = 1
        try:
            sequence.append(0, *random_kv(3))
        except errors.OtherProcess as error:
            code = 0 if str(error.pid) in str(error) else 2
        client.close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert sequence.layer_tokens(0) == 3


def test_several_threads_of_one_client(client):
    """An engine's threads share a store, and must not get each other's answers."""
    model = add_model(client)
    failures = []

    def work(index):
        try:
            sequence = client.create_sequence(model, f"s{index}")
            keys, values = random_kv(200, seed=index)
            for start in range(0, 200, 20):
                sequence.append(0, keys[start : start + 20], values[start : start + 20])
                found, _ = sequence.read(0, start)
                np.testing.assert_array_equal(found, keys[start : start + 20].astype(np.float16))
                client.attend(0, random_queries(), [sequence])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_facts_of_a_sequence(served, client, sequence):
    """What tools and the mount ask of a sequence must read the same on both sides."""
    sequence.append(0, *random_kv(20))
    sequence.append(1, *random_kv(17))
    sequence.append_tokens(np.arange(5, dtype=np.uint64).reshape(1, 5))
    sequence.set_attribute("user.note", b"\x00\xff")
    ours = served.store.sequence("s")
    for name in ("id", "name", "created_ns", "changed_ns", "is_deleted", "num_tokens", "num_token_ids"):
        assert getattr(sequence, name) == getattr(ours, name), name
    assert sequence.tokens.tolist() == ours.tokens.tolist() == [0, 1, 2, 3, 4]
    assert sequence.attributes() == ours.attributes() == {"user.note": b"\x00\xff"}
    sequence.remove_attribute("user.note")
    assert sequence.attributes() == {}
    version = sequence.version()
    assert version == ours.version() and sequence.holds(version)
    sequence.truncate(3)
    assert not sequence.holds(version) and sequence.holds(Version(3, version.epoch))
    assert client.catalogue_rows() == served.store.catalogue_rows()
    assert client.counters()["space"] == served.store.counters()["space"]


def test_heads_are_read(served, client, sequence):
    """Rows of single heads, longer than a reply holds."""
    from kvfs.head_pieces import KEYS, VALUES, HeadRows

    sequence.append(0, *random_kv(1000))
    pieces = [HeadRows(0, KEYS, 1, 3, 900), HeadRows(0, VALUES, 0, 0, 1000), HeadRows(0, KEYS, 0, 5, 5)]
    assert bytes(sequence.read_heads(pieces)) == bytes(served.store.sequence("s").read_heads(pieces))
    with pytest.raises(errors.InvalidArgument):
        sequence.read_heads([HeadRows(0, KEYS, 5, 0, 1)])


def test_closing(served):
    """A closed client: clear errors, and the drive goes on for others."""
    client = served.open()
    sequence = client.create_sequence(add_model(client), "s")
    for layer in range(2):
        sequence.append(layer, *random_kv(10))
    client.close()
    client.close()
    with pytest.raises(errors.StoreClosed):
        sequence.append(0, *random_kv(1))
    assert "out of reach" in repr(sequence)
    wait_until(lambda: not served.server._clients)
    assert [row.num_tokens for row in served.store.catalogue_rows()] == [10], "closing flushes"


def test_closing_after_a_posted_append_failed(served):
    """The failure is told at the latest here, and what others appended is flushed all the same."""
    client = served.open()
    first, second = (client.create_sequence(add_model(client), name) for name in ("first", "second"))
    for layer in range(2):
        second.append(layer, *random_kv(10))
    first.append(0, *random_kv(1))
    served.store.delete_sequence("first")
    first.append(0, *random_kv(1))
    with pytest.raises(errors.InvalidArgument, match="deleted"):
        client.close()
    assert [(row.name, row.num_tokens) for row in served.store.catalogue_rows()] == [("second", 10)]


def test_folders(tmp_path, served):
    """kvfs.open of a folder: mounted or not, and options that are the mount's to choose."""
    with pytest.raises(errors.NotADrive, match="mounted"):
        kvfs.open(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="cache_bytes"):
        kvfs.open(served.invite(), cache_bytes="1GiB")
    (served.folder / ".kvfs" / "connect").write_text("{}")
    with pytest.raises(errors.NotADrive):
        kvfs.open(served.folder)


def test_arguments_that_cannot_be_sent(client):
    """An argument of a wrong type is the caller's error, not a broken connection."""
    for name in (b"bytes", object(), {1, 2}):
        with pytest.raises(errors.InvalidArgument):
            client.sequence(name)
    assert client.sequences() == []
