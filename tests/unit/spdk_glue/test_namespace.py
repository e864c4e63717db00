"""The host's view of a drive: blocks, splitting, errors with their facts, tickets."""

import threading

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import IoOpcode
from spdk_glue.identify import ERROR_LOG_ENTRY, IDENTIFY_NAMESPACE, LogPage
from spdk_glue.namespace import QUEUE_DEPTH, Namespace
from spdk_glue.status import (
    CommandFailed,
    NotAKvfsDrive,
    NvmeStatusError,
    OtherAttentionVersion,
    QueueFull,
    Status,
)
from tests.unit.spdk_glue.memory_drive import MAX_TRANSFER_BYTES, NUM_LBAS, MemoryDrive


@pytest.fixture
def drive():
    drive = MemoryDrive()
    yield drive
    drive.gate.set()
    drive.transport.close()


@pytest.fixture
def namespace(drive):
    return Namespace(drive.transport)


def random_blocks(count, block_bytes=512, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count * block_bytes, np.uint8)


def opened(**options):
    drive = MemoryDrive(**options)
    return drive, Namespace(drive.transport)


def error_of(call) -> NvmeStatusError:
    with pytest.raises(NvmeStatusError) as caught:
        call()
    return caught.value


def test_identify(namespace):
    assert (namespace.block_bytes, namespace.num_lbas) == (512, NUM_LBAS)
    assert namespace.controller["sn"] == b"MEMORY"
    assert namespace.attention["max_transfer_bytes"] == MAX_TRANSFER_BYTES


@pytest.mark.parametrize("signature", [b"", b"KVFSATT", b"kvfsattn"])
def test_not_a_kvfs_drive(signature):
    """Any other NVMe drive: refuse it before a vendor command is sent to it."""
    drive = MemoryDrive(signature=signature)
    with pytest.raises(NotAKvfsDrive):
        Namespace(drive.transport)
    assert drive.seen == []


@pytest.mark.parametrize("version", [0, 1, 3])
def test_another_version(version):
    """A drive of an older or newer release: not a record of another layout taken for this one's."""
    drive = MemoryDrive()
    drive.controller["attention"]["version"] = version
    with pytest.raises(OtherAttentionVersion, match=f"of version {version}, this host's of 2"):
        Namespace(drive.transport)
    assert drive.seen == []


@pytest.mark.parametrize(
    ("mdts", "block_bytes", "limit"),
    [
        (0, 4096, 65536),
        (1, 4096, 2),
        (5, 4096, 32),
        (16, 4096, 65536),
        (20, 4096, 65536),
        (1, 512, 16),
        (3, 16384, 2),
    ],
)
def test_transfer_limit(mdts, block_bytes, limit):
    """MDTS counts memory pages of 4 KiB, whatever the size of a block."""
    _, namespace = opened(mdts=mdts, block_bytes=block_bytes)
    assert namespace.max_transfer_lbas == limit


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_blocks(block_bytes):
    _, namespace = opened(block_bytes=block_bytes)
    data = random_blocks(20, block_bytes)
    namespace.write(100, data)
    np.testing.assert_array_equal(namespace.read(100, 20), data)
    namespace.deallocate([(105, 2)])
    data[5 * block_bytes : 7 * block_bytes] = 0
    np.testing.assert_array_equal(namespace.read(100, 20), data)
    assert not namespace.read(NUM_LBAS - 1, 1).any()


@pytest.mark.parametrize("num_lbas", [1, 4, 5, 8, 11])
def test_splitting(num_lbas):
    """What is larger than the drive takes goes in several commands, each with its part of the buffer."""
    drive, namespace = opened(mdts=2, block_bytes=4096)
    data = random_blocks(num_lbas, 4096)
    namespace.write(50, data, placement_id=3)
    assert sum(request.num_lbas for request in drive.seen) == num_lbas
    assert [request.first_lba for request in drive.seen] == list(range(50, 50 + num_lbas, 4))
    assert max(request.num_lbas for request in drive.seen) <= 4
    assert {request.cdw13 for request in drive.seen} == {3 << 16}
    np.testing.assert_array_equal(namespace.read(50, num_lbas), data)


def test_more_commands_than_the_queue_is_deep():
    drive, namespace = opened()
    data = random_blocks(1200)
    extents = [(2 * i, data[512 * i : 512 * (i + 1)]) for i in range(1200)]
    namespace.write_scattered(extents)
    assert len(drive.seen) == 1200
    np.testing.assert_array_equal(namespace.read(0, 2400).reshape(-1, 2, 512)[:, 0].reshape(-1), data)
    with pytest.raises(QueueFull):
        namespace.submit_write(extents)  # waits for nothing, so cannot split
    assert len(drive.seen) == 1201  # and the read
    namespace.complete(namespace.submit_write(extents[:QUEUE_DEPTH]))


def test_scattered(namespace):
    data = random_blocks(6).reshape(6, 512)
    namespace.write_scattered([(9, data[:2]), (1, data[2:3]), (300, data[3:])])
    parts = [np.zeros(512, np.uint8), np.zeros(3 * 512, np.uint8), np.zeros(1024, np.uint8)]
    namespace.read_scattered([(1, parts[0]), (300, parts[1]), (9, parts[2])])
    for part, wanted in zip(parts, (data[2:3], data[3:], data[:2]), strict=True):
        np.testing.assert_array_equal(part, wanted.reshape(-1))


def test_a_batch_is_written_in_order(namespace):
    """The same block twice in one batch: the later one stays."""
    namespace.write_scattered([(5, np.full(512, 1, np.uint8)), (5, np.full(512, 2, np.uint8))])
    assert (namespace.read(5, 1) == 2).all()


@pytest.mark.parametrize("size", [0, 1, 511, 513, 1000])
def test_lengths_are_checked_before_they_leave(drive, namespace, size):
    data = np.zeros(size, np.uint8)
    for call in (
        lambda: namespace.write(0, data),
        lambda: namespace.write_scattered([(0, np.zeros(512, np.uint8)), (4, data)]),
        lambda: namespace.read_scattered([(0, data)]),
        lambda: namespace.submit_write([(0, data)]),
    ):
        with pytest.raises(ValueError, match="512-byte blocks"):
            call()
    assert drive.seen == []


@pytest.mark.parametrize(
    ("first_lba", "num_lbas"), [(NUM_LBAS, 1), (NUM_LBAS - 1, 2), (1 << 40, 1), (1 << 63, 3)]
)
def test_out_of_range(namespace, first_lba, num_lbas):
    for call, opcode in (
        (lambda: namespace.read(first_lba, num_lbas), IoOpcode.READ),
        (lambda: namespace.write(first_lba, random_blocks(num_lbas)), IoOpcode.WRITE),
    ):
        error = error_of(call)
        assert (error.opcode, error.status, error.nsid) == (opcode, Status.LBA_OUT_OF_RANGE, 1)
        assert (error.lba, error.detail) == (first_lba, "past the end")
        assert error.do_not_retry
    assert not namespace.read(NUM_LBAS - 1, 1).any()


def test_first_failure_of_a_batch(namespace):
    """The error names the command that failed, not its neighbours, which succeed."""
    good = random_blocks(1)
    error = error_of(lambda: namespace.write_scattered([(1, good), (NUM_LBAS + 7, good), (2, good)]))
    assert error.lba == NUM_LBAS + 7
    for lba in (1, 2):
        np.testing.assert_array_equal(namespace.read(lba, 1), good)


def test_errors_of_several_threads(namespace):
    """Each thread gets the facts of its own command out of the shared error log."""
    start, wrong = threading.Barrier(4), []

    def work(number):
        start.wait(60)
        for lba in range(NUM_LBAS + 100 * number, NUM_LBAS + 100 * number + 20):
            try:
                namespace.read(lba, 1)
            except NvmeStatusError as error:
                if error.lba != lba:
                    wrong.append((lba, error.lba))
            else:
                wrong.append((lba, None))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_admin_errors(namespace):
    error = error_of(lambda: namespace.log_page(0xEE, ERROR_LOG_ENTRY))
    assert (error.status, error.lba, error.detail) == (Status.INVALID_LOG_PAGE, None, "")
    for nsid in (0, 2):
        error = error_of(lambda nsid=nsid: namespace._identify(0, IDENTIFY_NAMESPACE, nsid))
        assert (error.status, error.nsid) == (Status.INVALID_NAMESPACE, nsid)


def test_log_page(namespace):
    error_of(lambda: namespace.read(NUM_LBAS, 1))
    error_of(lambda: namespace.read(NUM_LBAS + 1, 1))
    entries = namespace.log_page(LogPage.ERROR_INFORMATION, ERROR_LOG_ENTRY, 3)
    assert entries["lba"].tolist() == [NUM_LBAS + 1, NUM_LBAS, 0]
    assert entries["error_count"].tolist() == [2, 1, 0]


@pytest.mark.parametrize(("num_ranges", "commands"), [(0, 0), (1, 1), (256, 1), (257, 2), (600, 3)])
def test_deallocate_in_batches(drive, namespace, num_ranges, commands):
    drive.blocks[:] = 1
    namespace.deallocate([(2 * number, 1) for number in range(num_ranges)])
    assert len(drive.seen) == commands
    zeros = np.flatnonzero(~drive.blocks.any(axis=1))
    np.testing.assert_array_equal(zeros, np.arange(0, 2 * num_ranges, 2))


def test_submitted_write(drive, namespace):
    """The caller goes on while the drive writes; the queue pair serves again afterwards."""
    drive.gate.clear()
    data = random_blocks(2)
    pending = namespace.submit_write([(7, data[:512]), (8, data[512:])], placement_id=1)
    assert drive.entered.wait(60)
    assert not namespace.is_done(pending)
    assert not namespace.read(7, 2).any()
    drive.gate.set()
    namespace.complete(pending)
    np.testing.assert_array_equal(namespace.read(7, 2), data)
    again = namespace.submit_write([(7, data[512:])])
    assert not namespace.wait(again)["status"].any()
    np.testing.assert_array_equal(namespace.read(7, 1), data[512:])


def test_submitted_write_fails(namespace):
    data = random_blocks(1)
    pending = namespace.submit_write([(3, data), (NUM_LBAS, data)])
    error = error_of(lambda: namespace.complete(pending))
    assert (error.status, error.lba) == (Status.LBA_OUT_OF_RANGE, NUM_LBAS)
    np.testing.assert_array_equal(namespace.read(3, 1), data)


def test_submitted_write_of_many_commands(drive, namespace):
    data = random_blocks(300).reshape(300, 512)
    namespace.flush()  # leaves a queue pair of 256 behind
    namespace.complete(namespace.submit_write(list(enumerate(data))))
    np.testing.assert_array_equal(drive.blocks[:300], data)


def test_writes_from_several_threads(drive, namespace):
    start, wrong = threading.Barrier(4), []

    def work(number):
        start.wait(60)
        for turn in range(20):
            lba = 100 * number + turn
            namespace.write(lba, np.full(512, number * 20 + turn, np.uint8))
            if not (namespace.read(lba, 1) == number * 20 + turn).all():
                wrong.append(lba)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    for number in range(4):
        values = drive.blocks[100 * number : 100 * number + 20, 0]
        np.testing.assert_array_equal(values, np.arange(20) + 20 * number)
    assert len(namespace._idle) <= 4


def answer_of(size):
    """A descriptor that the drive answers with `size` bytes."""
    return np.full(16, size, np.uint8)


def test_attention(drive, namespace):
    answer = namespace.attend(answer_of(100), 100)
    assert answer.tolist() == [7] * 100
    assert drive.answers == {}


@pytest.mark.parametrize("size", [99, 101])
def test_answer_of_another_length(namespace, size):
    error = error_of(lambda: namespace.attend(answer_of(size), 100))
    assert (error.opcode, error.status) == (IoOpcode.ATTENTION_FETCH, Status.DATA_TRANSFER_ERROR)
    assert str(size) in error.detail


def test_tickets(drive, namespace):
    tickets = [namespace.attention_submit(answer_of(8)) for _ in range(5)]
    assert len(set(tickets)) == 5
    namespace.attention_cancel(tickets[0])
    for call in (namespace.attention_cancel, lambda ticket: namespace.attention_fetch(ticket, 8)):
        assert error_of(lambda call=call: call(tickets[0])).status == Status.UNKNOWN_TICKET
    namespace._next_ticket = 0xFFFFFFFF
    assert namespace.attention_submit(answer_of(8)) == 0
    assert set(drive.answers) == {0, *tickets[1:]}


@pytest.mark.parametrize(("size", "num_pages"), [(1, 1), (512, 1), (513, 2), (MAX_TRANSFER_BYTES, 128)])
def test_vendor_transfer_length(drive, namespace, size, num_pages):
    """CDW12 is the length in pages; the data keep their true one."""
    namespace.attention_submit(np.zeros(size, np.uint8))
    namespace.seal_groups(np.zeros(size, np.uint8))
    assert [request.num_lbas for request in drive.seen] == [num_pages] * 2
    assert [request.data.nbytes for request in drive.seen] == [size] * 2


def test_vendor_transfer_limit(drive, namespace):
    large = np.zeros(MAX_TRANSFER_BYTES + 1, np.uint8)
    for call in (namespace.attention_submit, namespace.seal_groups):
        with pytest.raises(ValueError, match=str(MAX_TRANSFER_BYTES)):
            call(large)
    with pytest.raises(ValueError, match="ATTENTION_FETCH"):
        namespace.attention_fetch(1, MAX_TRANSFER_BYTES + 1)
    assert drive.seen == []


def test_raw_length_mismatch(drive):
    """A buffer of another size than NLB says: the drive's check, since our host never sends it."""
    queue_pair = drive.transport.create_queue_pair()
    for entry in (command.read(0, 2), command.write(0, 2)):
        completion = queue_pair.execute(entry, [np.zeros(512, np.uint8)])
        assert int(completion["status"][0]) >> 1 & 0x7FF == Status.SGL_LENGTH_INVALID


def test_close_with_writes_under_way(drive, namespace):
    """Closing waits for what was submitted."""
    drive.gate.clear()
    data = random_blocks(1)
    namespace.submit_write([(11, data)])
    assert drive.entered.wait(60)
    found = []

    def close():
        namespace.close()
        found.append(drive.blocks[11].copy())

    closing = threading.Thread(target=close)
    closing.start()
    drive.gate.set()
    closing.join(60)
    np.testing.assert_array_equal(found, [data])


ONE_FLIGHT_BYTES = 64


@pytest.fixture
def one_flight(drive):
    """A namespace whose drive takes a Fetch behind its Submit; the batches that were sent are in `sent`."""
    drive.controller["attention"]["one_flight_bytes"] = ONE_FLIGHT_BYTES
    namespace, sent = Namespace(drive.transport), []
    execute = drive.device.execute

    def recording(queue_id, entries, buffers):
        sent.append(entries["opcode"].tolist())
        return execute(queue_id, entries, buffers)

    drive.device.execute = recording
    namespace.sent = sent
    return namespace


SUBMIT, FETCH, CANCEL = (int(getattr(IoOpcode, f"ATTENTION_{name}")) for name in ("SUBMIT", "FETCH", "CANCEL"))


def test_attention_in_one_flight(drive, one_flight):
    for size in (100, 60, 100):
        assert one_flight.attend(answer_of(size), size).tolist() == [7] * size
    assert one_flight.sent == [[SUBMIT, FETCH]] * 3
    assert drive.answers == {}


def test_no_flight_for_who_has_work_meanwhile_nor_for_large_descriptors(drive, one_flight):
    assert one_flight.attend_now(answer_of(9), 9, may_wait=False) is None
    assert one_flight.attend(np.full(ONE_FLIGHT_BYTES + 1, 9, np.uint8), 9).tolist() == [7] * 9
    with pytest.raises(ValueError, match="ATTENTION_FETCH"):
        one_flight.attend(answer_of(9), MAX_TRANSFER_BYTES + 1)
    assert [SUBMIT, FETCH] not in one_flight.sent


def test_what_fails_in_flight_says_why_alone(drive, one_flight):
    """And leaves no ticket behind: the next command is as any other."""
    drive.fails_once = CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=77)
    fetch = drive.fetch

    def failing(requests):
        if drive.fails_once is not None and len(one_flight.sent) == 1:  # as if another came first
            requests[0].fail(drive.fails_once)
        else:
            fetch(requests)

    drive.device._handlers[True][IoOpcode.ATTENTION_FETCH] = failing
    assert one_flight.attend(answer_of(8), 8).tolist() == [7] * 8
    assert one_flight.sent == [[SUBMIT, FETCH], [CANCEL], [SUBMIT], [FETCH]]
    assert drive.answers == {}
    error = error_of(lambda: one_flight.attend(answer_of(9), 8))  # an answer of another length
    assert error.status == Status.DATA_TRANSFER_ERROR
    assert one_flight.attend(answer_of(8), 8).tolist() == [7] * 8
    assert drive.answers == {}


def test_a_refused_submit_in_flight(drive, one_flight):
    def refuse(requests):
        for request in requests:
            request.fail(CommandFailed(Status.INVALID_DESCRIPTOR, detail="magic"))

    drive.device._handlers[True][IoOpcode.ATTENTION_SUBMIT] = refuse
    error = error_of(lambda: one_flight.attend(answer_of(8), 8))
    assert (error.opcode, error.status, error.detail) == (SUBMIT, Status.INVALID_DESCRIPTOR, "magic")
    assert [CANCEL] not in one_flight.sent
