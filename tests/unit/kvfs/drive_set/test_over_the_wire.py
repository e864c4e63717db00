"""A set whose drives two targets serve, each in a process of its own."""

import threading
import time

import numpy as np
import pytest

import kvfs
from kvfs import errors
from spdk_glue.fabrics.initiator.controller import RECONNECT_MS
from tests.spdk.serving import NQN, ServedProcess

from ..conftest import add_model, plain_attention, random_kv, random_queries

NUM_HEADS, NUM_TOKENS = 4, 500
PATIENCE_S = 60


class Target(ServedProcess):
    """A drive of its own, and where hosts find it."""

    def __init__(self, path):
        kvfs.format(path, "32MiB")
        super().__init__(path, "--num-workers", "1", "--worker", "reference")

    @property
    def location(self) -> str:
        return f"nvme+tcp://127.0.0.1:{self.port}/{NQN}"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    targets = [Target(folder / f"{name}.kvfs") for name in "ab"]
    yield targets
    for target in targets:
        assert target.close() == 0


@pytest.fixture
def targets(running):
    """With an empty set, also after a test that failed while one was gone."""
    for target in running:
        if target.process.poll() is not None:
            target.start(target.port)
    kvfs.format([target.location for target in running], overwrite=True)
    return running


def fill(drive_set, name, num_heads=NUM_HEADS, seed=0):
    model = add_model(drive_set, name=f"{num_heads}", num_kv_heads=num_heads, num_query_heads=2 * num_heads)
    sequence = drive_set.create_sequence(model, name)
    keys, values = random_kv(NUM_TOKENS, seed, num_heads)
    for layer in range(model.num_layers):
        sequence.append(layer, keys, values)
    return sequence


def check(sequence, seed=0, num_tokens=NUM_TOKENS):
    num_heads = sequence.model.num_kv_heads
    keys, values = (rows[:num_tokens] for rows in random_kv(NUM_TOKENS, seed, num_heads))
    queries = random_queries(num_heads=2 * num_heads)
    out, _ = sequence.store.attend(1, queries, sequence)
    wanted, _ = plain_attention(queries[0], keys, values, [(0, num_tokens)])
    np.testing.assert_allclose(out[0], wanted, atol=2e-3)


def test_a_target_is_killed_and_comes_back(targets, caplog):
    """What it held is an error that says so, all else goes on; once it is there again, so is what it held."""
    here, there = targets
    with kvfs.open([here.location, there.location], tail_bytes="1MiB") as drive_set:
        both = fill(drive_set, "both")
        single = [fill(drive_set, f"single-{n}", 1, seed=n) for n in range(2)]
        drive_set.flush()
        for seed, sequence in enumerate(single):
            check(sequence, seed)
        check(both)
        both.append(0, *random_kv(7, 9, NUM_HEADS))  # not flushed
        both.append(1, *random_kv(7, 9, NUM_HEADS))
        there.kill()
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(errors.DriveLost, match="KV heads 2 to 3 of sequence 'both'") as caught:
                drive_set.attend(0, random_queries(num_heads=8), both)
            assert str(caught.value).count(there.location) == 1
        on = {drive_set._member(sequence._record.parts[0]).location: sequence for sequence in single}
        with pytest.raises(errors.DriveLost, match="KV heads 0 to 0 of sequence 'single"):
            drive_set.attend(0, random_queries(num_heads=2), on[there.location])
        check(on[here.location], single.index(on[here.location]))
        check(fill(drive_set, "new", seed=5), seed=5)
        drive_set.flush()
        assert time.monotonic() - started < RECONNECT_MS / 1000  # nobody waited for it to come back
        states = {state["drive"]: state["state"] for state in drive_set.drives.states()}
        assert states == {here.location: "in use", there.location: "lost"}
        there.start(there.port)
        give_up = time.monotonic() + PATIENCE_S
        while drive_set.drives.states()[1]["state"] == "lost":
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert both.num_tokens == NUM_TOKENS and "'both' has 500 tokens of 507" in caplog.text
        check(both)
        for seed, sequence in enumerate(single):
            check(sequence, seed)
        assert drive_set.check() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "kvfs-set-returning"]
    with kvfs.open([there.location, here.location]) as drive_set:
        check(drive_set.sequence("both"))
        check(drive_set.sequence("new"), seed=5)


def test_closed_without_its_target(targets):
    """Neither opening nor closing waits for a target that is gone."""
    here, there = targets
    locations = [here.location, there.location]
    with pytest.raises(errors.DriveBusy):
        kvfs.open([here.location, f"{here.location}?data-digest=on"])  # one drive is no set
    drive_set = kvfs.open(locations)
    sequence = fill(drive_set, "s")
    drive_set.flush()
    there.kill()
    with pytest.raises(errors.DriveLost):
        drive_set.attend(0, random_queries(num_heads=8), sequence)
    started = time.monotonic()
    drive_set.close()
    with pytest.raises(errors.DriveMissing, match="no connection"):
        kvfs.open(locations)
    with kvfs.open(locations, degraded=True) as drive_set:
        with pytest.raises(errors.DriveLost):
            drive_set.attend(0, random_queries(num_heads=8), drive_set.sequence("s"))
        assert time.monotonic() - started < RECONNECT_MS / 1000  # nobody waited for it to come back
        there.start(there.port)
        give_up = time.monotonic() + PATIENCE_S
        while drive_set.drives.states()[1]["state"] == "lost":
            assert time.monotonic() < give_up
            time.sleep(0.05)
        check(drive_set.sequence("s"))
