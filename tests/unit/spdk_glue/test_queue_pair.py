"""Queue pairs: identifiers, depth, matching, and the end with commands under way."""

import gc
import threading
import weakref

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.queue_pair import QueuePair
from spdk_glue.status import QueueFull
from spdk_glue.transports.inproc import MAX_QUEUE_DEPTH
from tests.unit.spdk_glue.memory_drive import MemoryDrive


class HeldConnection:
    """Commands complete when and in which order the test says."""

    def __init__(self):
        self.cids = []  # as submitted
        self.arrived = []
        self.closed = False

    def submit(self, entries, buffers):
        self.cids += entries["cid"].tolist()

    def execute(self, entries, buffers):
        return completions(entries["cid"].tolist())

    def finish(self, *cids):
        self.arrived += cids

    def poll(self, wait):
        assert self.arrived or not wait, "waits for what does not come"
        found, self.arrived = completions(self.arrived), []
        return found

    def close(self):
        self.closed = True


def completions(cids):
    """Completions whose result tells the command."""
    found = np.zeros(len(cids), COMPLETION_ENTRY)
    found["cid"] = cids
    found["cdw0"] = np.array(cids, np.uint32) + 1000
    return found


def flushes(count):
    return np.repeat(command.flush(), count)


def submit(queue_pair, count):
    return queue_pair.submit(flushes(count), [None] * count)


@pytest.fixture
def connection():
    return HeldConnection()


@pytest.mark.parametrize("depth", [-1, 0, 65536])
def test_bad_depth(connection, depth):
    with pytest.raises(ValueError, match="1 to 65535"):
        QueuePair(connection, depth)


@pytest.mark.parametrize("depth", [1, 7, 65535])
def test_depth_limit(connection, depth):
    """One more than fits is refused, with nothing submitted; a completion makes room."""
    queue_pair = QueuePair(connection, depth)
    with pytest.raises(QueueFull) as caught:
        submit(queue_pair, depth + 1)
    assert caught.value.depth == depth
    assert (queue_pair.num_outstanding, connection.cids) == (0, [])
    cids = submit(queue_pair, depth)
    assert len(set(cids)) == queue_pair.num_outstanding == depth
    for refused in (queue_pair.submit, queue_pair.execute):
        with pytest.raises(QueueFull):
            refused(flushes(1), [None])
    assert connection.cids == cids
    connection.finish(cids[0])
    assert queue_pair.wait(cids[:1])["cid"] == cids[0]
    assert len(submit(queue_pair, 1)) == 1


def test_execute_of_a_full_batch(connection):
    queue_pair = QueuePair(connection, 4)
    for _ in range(3):  # leaves nothing outstanding behind
        assert len(queue_pair.execute(flushes(4), [None] * 4)) == 4
    assert queue_pair.num_outstanding == 0
    with pytest.raises(QueueFull):
        queue_pair.execute(flushes(5), [None] * 5)


def test_entries_get_their_cids(connection):
    entries = flushes(3)
    cids = QueuePair(connection, 8).submit(entries, [None] * 3)
    assert entries["cid"].tolist() == cids == connection.cids


def test_identifiers_wrap_around_those_in_use(connection):
    """16 bits: after 65536 commands an old one, still under way, must keep its identifier."""
    queue_pair = QueuePair(connection, 1000)
    old = submit(queue_pair, 3)
    for _ in range(140):
        cids = submit(queue_pair, 500)
        assert len(set(cids)) == 500
        assert not set(cids) & set(old)
        connection.finish(*cids)
        queue_pair.wait(cids)
    assert len(connection.cids) > 1 << 16
    assert max(connection.cids) == 0xFFFF
    connection.finish(*old)
    assert queue_pair.wait(old)["cid"].tolist() == old


def test_identifiers_of_completions_not_collected(connection):
    """A completion that nobody asked for yet: its identifier is not free."""
    queue_pair = QueuePair(connection, 1000)
    early = submit(queue_pair, 2)
    connection.finish(*early)
    assert queue_pair.is_done(early)
    assert queue_pair.num_outstanding == 0
    for _ in range(66):
        cids = submit(queue_pair, 1000)
        assert not set(cids) & set(early)
        connection.finish(*cids)
        queue_pair.wait(cids)
    assert queue_pair.wait(early)["cid"].tolist() == early


def test_reuse_after_wait(connection):
    """Depth 1: the next identifiers come round again in 65536 commands."""
    queue_pair = QueuePair(connection, 1)
    queue_pair._next_cid = 0xFFFF
    found = []
    for _ in range(3):
        cids = submit(queue_pair, 1)
        connection.finish(*cids)
        queue_pair.wait(cids)
        found += cids
    assert found == [0xFFFF, 0, 1]


def test_completions_out_of_order(connection):
    queue_pair = QueuePair(connection, 8)
    first, second = submit(queue_pair, 3), submit(queue_pair, 2)
    connection.finish(second[1], first[2], first[0], second[0], first[1])
    found = queue_pair.wait(second[::-1])
    assert found["cid"].tolist() == second[::-1]
    assert found["cdw0"].tolist() == [cid + 1000 for cid in second[::-1]]
    assert queue_pair.wait(first)["cdw0"].tolist() == [cid + 1000 for cid in first]


def test_is_done(connection):
    queue_pair = QueuePair(connection, 8)
    cids = submit(queue_pair, 2)
    assert not queue_pair.is_done(cids)
    connection.finish(cids[1])
    assert not queue_pair.is_done(cids)
    assert queue_pair.is_done(cids[1:])
    connection.finish(cids[0])
    assert queue_pair.is_done(cids)
    assert queue_pair.is_done([])
    assert len(queue_pair.wait(cids)) == 2


def test_wait_for_nothing(connection):
    assert len(QueuePair(connection, 1).wait([])) == 0


def test_buffers_live_until_completion(connection):
    """The drive may write to a buffer that the caller has let go of."""
    queue_pair = QueuePair(connection, 4)
    buffer = np.zeros(4096, np.uint8)
    held = weakref.ref(buffer)
    cids = queue_pair.submit(command.read(0, 1), [buffer])
    del buffer
    gc.collect()
    assert held() is not None
    connection.finish(*cids)
    queue_pair.wait(cids)
    gc.collect()
    assert held() is None


def test_close_collects_what_is_outstanding(connection):
    queue_pair = QueuePair(connection, 8)
    cids = submit(queue_pair, 5)
    connection.finish(*cids[::-1])
    queue_pair.close()
    assert connection.closed
    assert queue_pair.num_outstanding == 0


def test_close_waits_for_the_drive():
    """Closed with a write under way: its buffer would be freed under the drive."""
    drive = MemoryDrive()
    drive.gate.clear()
    queue_pair = drive.transport.create_queue_pair(depth=8)
    data = np.full(512, 5, np.uint8)
    queue_pair.submit(np.concatenate([command.write(lba, 1) for lba in range(8)]), [data] * 8)
    assert drive.entered.wait(60)
    seen_at_end = []

    def close():
        queue_pair.close()
        seen_at_end.append(len(drive.seen))

    closing = threading.Thread(target=close)
    closing.start()
    drive.gate.set()
    closing.join(60)
    assert seen_at_end == [8]
    assert queue_pair.num_outstanding == 0
    assert (drive.blocks[:8] == 5).all()
    drive.transport.close()


def test_commands_meanwhile():
    """`submit` lets the caller go on: another queue pair answers while the first one's commands hang."""
    drive = MemoryDrive()
    drive.gate.clear()
    first, second = drive.transport.create_queue_pair(), drive.transport.create_queue_pair()
    data = np.full(512, 9, np.uint8)
    cids = first.submit(command.write(3, 1), [data])
    assert drive.entered.wait(60)
    assert not first.is_done(cids)
    found = np.full(512, 1, np.uint8)
    assert not second.execute(command.read(3, 1), [found])["status"].any()
    assert not found.any()
    drive.gate.set()
    assert not first.wait(cids)["status"].any()
    second.execute(command.read(3, 1), [found])
    np.testing.assert_array_equal(found, data)
    drive.transport.close()


def test_transport_depth():
    drive = MemoryDrive()
    assert drive.transport.create_queue_pair(MAX_QUEUE_DEPTH).depth == MAX_QUEUE_DEPTH
    with pytest.raises(ValueError, match="1024"):
        drive.transport.create_queue_pair(MAX_QUEUE_DEPTH + 1)
    drive.transport.close()


def test_bytes_counted():
    """64 per submission, 16 per completion, and the data that really move."""
    drive = MemoryDrive()
    queue_pair = drive.transport.create_queue_pair()
    data = np.ones(1024, np.uint8)
    queue_pair.execute(command.write(0, 2), [data])
    queue_pair.execute(command.read(0, 2), [data])
    queue_pair.execute(command.flush(), [None])
    queue_pair.execute(command.read(1 << 40, 2), [data])  # refused: no data come back
    assert drive.transport.counters.as_dict() == {
        "commands": 4,
        "bytes_to_drive": 4 * 64 + 1024,
        "bytes_from_drive": 4 * 16 + 1024,
    }
    drive.transport.close()


def test_a_refused_batch_leaves_nothing_outstanding():
    """Otherwise closing the queue pair would wait for commands that never were."""
    queue_pair = MemoryDrive().transport.create_queue_pair(8)
    with pytest.raises(ValueError, match="2 commands with 1 buffers"):
        queue_pair.submit(np.concatenate([command.flush(), command.flush()]), [None])
    assert queue_pair.num_outstanding == 0
    with pytest.raises(ValueError, match="no command 7"):
        queue_pair.wait([7])
    queue_pair.close()
