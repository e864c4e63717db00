"""The nvme+tcp transport with a target that does what a test wants: losses, repetition, faults, limits."""

import threading
import time

import numpy as np
import pytest

from spdk_glue import command, dma
from spdk_glue.command import AdminOpcode, IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.initiator import controller as controller_module
from spdk_glue.fabrics.initiator.queue import Queue
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import (
    ConnectionLost,
    ConnectionRefused,
    NvmeError,
    NvmeStatusError,
    QueuePairInUse,
    Status,
)
from spdk_glue.transports.tcp import TcpTransport
from spdk_glue.transports.url import open_transport

from .scripted_target import BLOCK, NUM_BLOCKS, SUBNQN, ScriptedTarget, answer, wait_until


@pytest.fixture
def target():
    target = ScriptedTarget()
    yield target
    target.on_command = lambda queue_id, entry, connection: None
    target.stop()


@pytest.fixture
def connect(target):
    """Opens namespaces of the target, and closes them."""
    opened = []

    def open_one(options="", **kwargs):
        opened.append(BlockNamespace(TcpTransport.connect(target.address + options, **kwargs)))
        return opened[-1]

    yield open_one
    for namespace in opened:
        namespace.close()


def content(num_blocks, seed=0):
    data = dma.allocate(num_blocks * BLOCK)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def once(opcode, reaction):
    """An on_command that does this at the first I/O command of that opcode."""
    left = [reaction]

    def on_command(queue_id, entry, connection):
        if queue_id and entry["opcode"] == opcode and left:
            return left.pop()(entry, connection)
        return None

    return on_command


def cut(entry, connection):
    connection.shutdown(2)
    return b""


def test_blocks(connect, target):
    namespace = connect()
    assert (namespace.nsid, namespace.num_lbas, namespace.block_bytes) == (1, NUM_BLOCKS, BLOCK)
    data = content(300)
    namespace.write(7, data)
    np.testing.assert_array_equal(namespace.read(7, 300), data)
    np.testing.assert_array_equal(target.memory[7 * BLOCK : 307 * BLOCK], data)


@pytest.mark.parametrize("lengths_type", [np.int64, np.uint32])
def test_the_same_arrays_again(connect, target, lengths_type):
    """What they say now counts, whether C reads these arrays or copies of them."""
    namespace = connect()
    written = content(4, seed=5)
    namespace.write(0, written)
    data = dma.allocate(4 * BLOCK)
    entries, addresses, lengths = command.read([0], [1]), np.zeros(1, np.int64), np.zeros(1, lengths_type)
    queue_pair = namespace.transport.create_queue_pair(4)
    for block in (2, 0, 3, 1):
        entries["nsid"], entries["cdw10"] = namespace.nsid, block
        addresses[0], lengths[0] = dma.address_of(data) + block * BLOCK, BLOCK
        assert not queue_pair.transfer(entries, addresses, lengths)["status"].any()
    queue_pair.close()
    assert data.tobytes() == written.tobytes()


@pytest.mark.parametrize("opcode", [IoOpcode.READ, IoOpcode.WRITE, IoOpcode.FLUSH])
def test_lost_in_the_middle_is_done_again(connect, target, opcode):
    """What is safe to repeat is; the caller sees nothing of it."""
    namespace = connect()
    data = content(200)
    namespace.write(0, data)
    target.on_command = once(opcode, cut)
    if opcode == IoOpcode.WRITE:
        data = content(200, 1)
        namespace.write(0, data)
    if opcode == IoOpcode.FLUSH:
        namespace.flush()
    np.testing.assert_array_equal(namespace.read(0, 200), data)


def test_what_may_not_be_repeated_is_reported(connect, target):
    namespace = connect()
    target.on_command = once(IoOpcode.ATTENTION_SUBMIT, cut)
    entry = command.vendor(IoOpcode.ATTENTION_SUBMIT, 1)
    with pytest.raises(ConnectionLost, match="whether it was done is not known"):
        namespace.execute(entry, content(1))
    assert [opcode for _, opcode in target.commands].count(IoOpcode.ATTENTION_SUBMIT) == 1
    assert namespace.execute(command.vendor(IoOpcode.ATTENTION_SUBMIT, 2), content(1)) == 0


def test_a_flush_does_not_promise_what_may_be_lost():
    """A drive that lost power forgets what only its cache had: who relies on a flush has to hear of it."""
    target = ScriptedTarget(has_volatile_cache=True)
    namespace = BlockNamespace(open_transport(target.address))
    namespace.write(0, content(1))
    namespace.flush()
    target.drop_connections()
    namespace.flush()  # nothing was in the cache
    namespace.write(0, content(1))
    target.drop_connections()
    np.testing.assert_array_equal(namespace.read(0, 1), content(1))
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="not flushed"):
            namespace.flush()
    namespace.close()
    target.stop()


def test_submitted_commands_end_aborted(connect, target):
    """Their memory is the caller's again, and a queue pair goes on."""
    namespace = connect()
    queue_pair = namespace.transport.create_queue_pair(8)
    target.on_command = lambda queue_id, entry, connection: b"" if queue_id else None
    entries = command.read([0, 1, 2], [1, 1, 1])
    entries["nsid"] = 1
    cids = queue_pair.submit(entries, list(content(3).reshape(3, BLOCK)))
    wait_until(lambda: [command for command in target.commands if command[0]].count((1, IoOpcode.READ)) == 3)
    target.on_command = lambda queue_id, entry, connection: None
    target.drop_connections()
    completions = queue_pair.wait(cids)
    assert {int(field) >> 1 for field in completions["status"]} == {Status.ABORTED_SQ_DELETION}
    assert not queue_pair.execute(entries, list(content(3).reshape(3, BLOCK)))["status"].any()
    queue_pair.close()


def test_target_comes_back(connect, target):
    """Every thread's queue pair is connected again, after back-off."""
    namespace = connect()
    data = content(64)
    namespace.write(0, data)
    stop, failures, rounds = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                np.testing.assert_array_equal(namespace.read(0, 64), data)
                rounds.append(1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        target.stop()
        time.sleep(0.2)
        target.start()
        before = len(rounds)
        wait_until(lambda before=before: len(rounds) > before + 6 or failures)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_target_stays_away(connect, target):
    """One line in bounded time, then too."""
    namespace = connect(reconnect_ms=300)
    namespace.read(0, 1)
    target.stop()
    for call in (
        lambda: namespace.read(0, 1),
        namespace.flush,
        lambda: namespace.log_page(2, np.dtype("V512")),
    ):
        start = time.monotonic()
        with pytest.raises(
            ConnectionLost, match=r"0\.3 s: see whether the target runs.*refused|during an admin"
        ):
            call()
        assert time.monotonic() - start < controller_module.RECONNECT_MS / 1000
    target.start()


def test_another_drive_comes_back(connect, target):
    """Its blocks are not those that were written: nothing is read from it, nor repeated on it."""
    namespace = connect(reconnect_ms=500)
    namespace.write(0, content(1))
    target.serial_number = b"OTHER"
    target.drop_connections()
    with pytest.raises(ConnectionLost, match="another drive answers there now"):
        namespace.read(0, 1)


def test_a_silent_target_is_given_up(connect, target, monkeypatch):
    monkeypatch.setattr(Queue.transfer, "__defaults__", (None, 300))
    namespace = connect(reconnect_ms=1000)
    target.on_command = lambda queue_id, entry, connection: b"" if queue_id else None
    with pytest.raises(ConnectionLost, match=r"5 times during the same commands: no answer in 0\.3 s"):
        namespace.read(0, 1)


GARBAGE = {
    "noise": np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes(),
    "zeros": bytes(5000),
    "another's data": pdu.with_digests(
        pdu.data(pdu.PduType.C2H_DATA, 999, 4096, pdu.Framing(False), flags=12), bytes(4096)
    ),
    "too much data": bytes.fromhex("070c1818 18800000 00000000 00000000 00800000 00000000") + bytes(1 << 15),
    "terminate": pdu.terminate(pdu.PduType.C2H_TERMINATE, pdu.FatalPduError(pdu.FatalError.SEQUENCE_ERROR, "")),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_for_an_answer(connect, target, name):
    """Once: read again. Always: one clear error, not a loop."""
    namespace = connect()
    data = content(4)
    namespace.write(0, data)
    target.on_command = once(IoOpcode.READ, lambda entry, connection: GARBAGE[name])
    np.testing.assert_array_equal(namespace.read(0, 4), data)
    target.on_command = lambda queue_id, entry, connection: GARBAGE[name] if queue_id else None
    with pytest.raises(ConnectionLost, match=r"during the same commands: the target|after 5 attempts"):
        namespace.read(0, 4)


def test_garbage_on_the_admin_queue(connect, target):
    namespace = connect()

    def on_command(queue_id, entry, connection):
        return GARBAGE["noise"] if (queue_id, entry["opcode"]) == (0, AdminOpcode.GET_LOG_PAGE) else None

    target.on_command = on_command
    with pytest.raises(ConnectionLost, match="during an admin command: the target breaks the protocol"):
        namespace.log_page(2, np.dtype("V512"))
    namespace.read(0, 1)


@pytest.mark.parametrize(
    ("greeting", "what"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not NVMe/TCP"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not NVMe/TCP"),
        (bytes(200), "not NVMe/TCP"),
        (pdu.ic_response(header_digest=True, data_digest=False, max_h2c_data_bytes=8192).tobytes(), "digests"),
    ],
)
def test_something_else_answers(target, greeting, what):
    target.greeting = greeting
    with pytest.raises(ConnectionRefused, match=what):
        open_transport(target.address)


def test_refused(target):
    """Wrong port, wrong name: one line that says which."""

    def on_command(queue_id, entry, connection):
        is_connect = entry["opcode"] == records.FABRICS_OPCODE and int(entry["nsid"]) & 0xFF == 1
        return answer(entry, Status.CONNECT_INVALID_PARAMETERS, 256 | 1 << 16) if is_connect else None

    target.on_command = on_command
    with pytest.raises(ConnectionRefused, match=f"127.0.0.1:{target.port}.*there is no subsystem {SUBNQN}"):
        open_transport(target.address)
    target.on_command = lambda queue_id, entry, connection: None
    with pytest.raises(NvmeError, match="no namespace 7"):
        open_transport(f"{target.address}?nsid=7")
    address = target.address
    target.stop()
    with pytest.raises(ConnectionRefused, match="refused"):
        open_transport(address)
    target.start()


def test_a_host_name_that_does_not_exist():
    with pytest.raises(ConnectionRefused, match="no connection"):
        open_transport(f"nvme+tcp://no-such-host.invalid/{SUBNQN}")


def test_more_queues_than_the_target_grants(connect, target):
    namespace = connect()
    pairs = [namespace.transport.create_queue_pair(4) for _ in range(4)]
    with pytest.raises(NvmeError, match="no further queue pair: the target grants 4"):
        namespace.transport.create_queue_pair(4)
    pairs.pop().close()
    pairs.append(namespace.transport.create_queue_pair(4))
    for pair in pairs:
        pair.close()


def test_a_queue_that_is_refused_leaves_the_others_alone(connect, target):
    """A target without room for one more connection must not cost those that work."""
    namespace = connect()
    namespace.read(0, 1)
    before = namespace.transport._controller.generation

    def on_command(queue_id, entry, connection):
        is_connect = entry["opcode"] == records.FABRICS_OPCODE and int(entry["nsid"]) & 0xFF == 1
        return answer(entry, Status.CONNECT_CONTROLLER_BUSY) if is_connect else None

    target.on_command = on_command
    with pytest.raises(ConnectionLost, match=r"no queue: .* in use"):
        namespace.transport.create_queue_pair(4)
    assert namespace.transport._controller.generation == before
    namespace.read(0, 1)


def test_queues_are_as_deep_as_the_target_takes(connect, target):
    pair = connect().transport.create_queue_pair(1024)
    assert pair.depth == 127
    pair.close()


def test_more_data_than_a_command_moves(connect):
    """Refused before it leaves: a target would end the connection."""
    namespace = connect()
    with pytest.raises(ValueError, match="more than one command moves"):
        namespace.execute(command.vendor(IoOpcode.ATTENTION_SUBMIT, 1), content(33))
    with pytest.raises(ValueError, match="more than one command moves"):
        namespace.log_page(2, np.dtype(("V", 256 << 10)))


def test_two_threads_on_one_queue_pair(connect, target):
    namespace = connect()
    pair = namespace.transport.create_queue_pair(4)
    is_there, is_refused = threading.Event(), threading.Event()

    def on_command(queue_id, entry, connection):
        if queue_id:
            is_there.set()
            is_refused.wait(10)

    target.on_command = on_command
    entry = command.read(0, 1)
    entry["nsid"] = 1
    thread = threading.Thread(target=lambda: pair.execute(entry.copy(), [content(1)]))
    thread.start()
    is_there.wait(10)
    with pytest.raises(QueuePairInUse):
        pair.execute(entry.copy(), [content(1)])
    is_refused.set()
    thread.join()
    pair.close()


def keep_alives(target):
    return [opcode for _, opcode in target.commands].count(AdminOpcode.KEEP_ALIVE)


def test_keep_alive_while_idle_and_during_a_long_admin_command(connect, target):
    """A target drops a host that it does not hear of."""
    namespace = connect(keep_alive_ms=300)
    wait_until(lambda: keep_alives(target) >= 3)
    before = []

    def on_command(queue_id, entry, connection):
        if entry["opcode"] == AdminOpcode.FLASH_MAINTENANCE:

            def later():
                before.append(keep_alives(target))
                wait_until(lambda: keep_alives(target) >= before[0] + 3)
                connection.sendall(answer(entry, value=5))

            threading.Thread(target=later).start()
            return b""
        return None

    target.on_command = on_command
    assert namespace.admin(command.flash_maintenance(command.Maintenance.CHECK)) == 5


def test_a_keep_alive_without_answer_ends_the_connection(connect, target):
    namespace = connect(keep_alive_ms=150)

    def on_command(queue_id, entry, connection):
        return b"" if entry["opcode"] == AdminOpcode.KEEP_ALIVE else None

    target.on_command = on_command
    first = namespace.transport._controller.generation
    wait_until(lambda: namespace.transport._controller.generation not in (first, None))
    namespace.read(0, 1)


def test_an_admin_command_without_answer(connect, target, monkeypatch):
    monkeypatch.setattr(controller_module, "COMMAND_TIMEOUT_MS", 300)
    namespace = connect(keep_alive_ms=200, reconnect_ms=1000)

    def on_command(queue_id, entry, connection):
        return b"" if entry["opcode"] == AdminOpcode.GET_LOG_PAGE else None

    target.on_command = on_command
    with pytest.raises(ConnectionLost, match="no answer to an admin command"):
        namespace.log_page(2, np.dtype("V512"))
    target.on_command = lambda queue_id, entry, connection: answer(entry, Status.INVALID_LOG_PAGE)
    with pytest.raises((NvmeStatusError, ConnectionLost)):
        namespace.log_page(2, np.dtype("V512"))


def test_close_while_the_target_is_away(target):
    """Nothing hangs, and no thread stays."""
    namespace = BlockNamespace(open_transport(target.address))
    target.stop()
    start = time.monotonic()
    namespace.close()
    assert time.monotonic() - start < controller_module.RECONNECT_MS / 1000
    assert not [thread for thread in threading.enumerate() if thread.name == "kvfs-nvme-keeper"]
    target.start()


def test_the_controller_is_shut_down(target):
    """So that a drive writes what it has before its host is gone."""
    BlockNamespace(open_transport(target.address)).close()
    assert target.commands[-2:] == [(0, records.FABRICS_OPCODE)] * 2
