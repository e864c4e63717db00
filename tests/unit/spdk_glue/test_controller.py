"""The drive's side: dispatch by opcode, refusals, and failures into completions and the error log."""

import threading

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import NSID_ALL, AdminOpcode, IoOpcode
from spdk_glue.controller import ADMIN_QUEUE, Controller
from spdk_glue.identify import ERROR_LOG_ENTRIES, ERROR_LOG_ENTRY, LBA_UNKNOWN
from spdk_glue.status import CommandFailed, Status, decode, encode, has_more

QUEUE = 3


class Recorder:
    """Handlers that note the runs they were given."""

    def __init__(self):
        self.runs = []
        self.controller = Controller(
            dict.fromkeys((IoOpcode.READ, IoOpcode.WRITE, IoOpcode.FLUSH), self.run),
            {AdminOpcode.IDENTIFY: self.run},
        )

    def run(self, requests):
        self.runs.append(list(requests))

    def execute(self, *entries, queue_id=QUEUE, buffers=None):
        batch = np.concatenate(entries)
        batch["cid"] = 500 + np.arange(len(batch))
        buffers = buffers or [np.zeros(512, np.uint8) for _ in entries]
        return self.controller.execute(queue_id, batch, buffers)


@pytest.fixture
def recorder():
    return Recorder()


def statuses(completions):
    return [decode(int(field)) for field in completions["status"]]


def failing(failure):
    """A controller whose Write fails so."""

    def handler(requests):
        raise failure

    return Controller({IoOpcode.WRITE: handler}, {})


def log_entries(controller):
    entries = controller.error_log.page().view(ERROR_LOG_ENTRY)
    assert len(entries) == ERROR_LOG_ENTRIES
    return entries[entries["error_count"] > 0]


def test_runs_of_one_opcode(recorder):
    """Neighbours of one opcode come as one run, and in the order of the doorbell."""
    opcodes = [
        command.write(0, 1),
        command.write(1, 1),
        command.read(0, 1),
        command.flush(),
        command.write(2, 1),
    ]
    completions = recorder.execute(*opcodes)
    assert [[request.opcode for request in run] for run in recorder.runs] == [[1, 1], [2], [0], [1]]
    assert [request.first_lba for request in recorder.runs[0]] == [0, 1]
    assert completions["cid"].tolist() == [500, 501, 502, 503, 504]
    assert set(completions["sqid"].tolist()) == {QUEUE}
    assert not completions["status"].any()


class Batches:
    """A handler of batches of Reads that notes them and does as it is told, and one of single commands."""

    def __init__(self, outcome):
        self.batches, self.requests, self.outcome = [], [], outcome
        handlers = dict.fromkeys((IoOpcode.READ, IoOpcode.WRITE), self.requests.extend)
        self.controller = Controller(handlers, {IoOpcode.READ: self.requests.extend}, {IoOpcode.READ: self.run})

    def run(self, entries, buffers):
        self.batches.append((entries["cdw10"].tolist(), len(buffers)))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def execute(self, *entries, queue_id=QUEUE):
        batch = np.concatenate(entries)
        batch["cid"] = np.arange(len(batch))
        completions = self.controller.execute(queue_id, batch, [np.zeros(512, np.uint8) for _ in entries])
        assert completions["cid"].tolist() == list(range(len(batch))) and not completions["status"].any()
        assert set(completions["sqid"].tolist()) == {queue_id}


def test_a_batch_of_reads_is_one_call():
    batches = Batches(outcome=True)
    batches.execute(*(command.read(lba, 1) for lba in (7, 3, 5)))
    assert batches.batches == [([7, 3, 5], 3)] and not batches.requests


@pytest.mark.parametrize("outcome", [False, ValueError("whatever it is")])
def test_a_batch_that_fails_goes_command_by_command(outcome):
    batches = Batches(outcome)
    batches.execute(*(command.read(lba, 1) for lba in (7, 3, 5)))
    assert len(batches.batches) == 1 and [request.first_lba for request in batches.requests] == [7, 3, 5]


def test_what_is_no_batch_of_reads():
    """Several opcodes, one command, a command for all namespaces, the admin queue."""
    batches = Batches(outcome=True)
    batches.execute(command.read(1, 1), command.write(2, 1))
    batches.execute(command.read(1, 1))
    for_all = command.read(1, 1)
    for_all["nsid"] = NSID_ALL
    batches.execute(for_all, command.read(2, 1))
    batches.execute(command.read(1, 1), command.read(2, 1), queue_id=ADMIN_QUEUE)
    assert not batches.batches and len(batches.requests) == 7


def test_request_fields(recorder):
    data = np.zeros(65536 * 8, np.uint8)
    recorder.execute(command.write((5 << 32) + 6, 65536, placement_id=2), buffers=[data])
    (request,) = recorder.runs[0]
    assert (request.first_lba, request.num_lbas, request.cdw13) == ((5 << 32) + 6, 65536, 2 << 16)
    assert request.data is data


@pytest.mark.parametrize("opcode", [0x7C, 0x04, 0x0C, 0xC0, 0xFD])
def test_unknown_opcode(recorder, opcode):
    entry = command.flush()
    entry["opcode"] = opcode
    assert statuses(recorder.execute(entry, command.flush())) == [Status.INVALID_OPCODE, Status.SUCCESS]
    (logged,) = log_entries(recorder.controller)
    assert logged["opcode"] == opcode
    assert logged["detail"].decode() == f"opcode {opcode:#04x}"


@pytest.mark.parametrize("opcode", [0x03, 0x87, 0xFF])
def test_bidirectional_opcode(opcode):
    """Refused even where a handler is registered: no fabric carries it."""
    controller = Controller({opcode: lambda requests: pytest.fail("was called")}, {})
    entry = command.flush()
    entry["opcode"] = opcode
    completions = controller.execute(QUEUE, entry, [np.zeros(8, np.uint8)])
    assert statuses(completions) == [Status.INVALID_OPCODE]


@pytest.mark.parametrize("entry", [command.read(0, 1), command.write(0, 1)], ids=["read", "write"])
def test_data_missing(recorder, entry):
    assert statuses(recorder.execute(entry, buffers=[None])) == [Status.DATA_TRANSFER_ERROR]
    assert recorder.runs == []


@pytest.mark.parametrize(
    ("nsid", "status"),
    [
        (1, Status.SUCCESS),
        (NSID_ALL, Status.SUCCESS),
        (0, Status.INVALID_NAMESPACE),
        (2, Status.INVALID_NAMESPACE),
        (0xFFFFFFFE, Status.INVALID_NAMESPACE),
    ],
)
def test_namespace_id(recorder, nsid, status):
    entry = command.flush()
    entry["nsid"] = nsid
    assert statuses(recorder.execute(entry, buffers=[None])) == [status]
    assert len(recorder.runs) == (status == Status.SUCCESS)
    if status != Status.SUCCESS:
        assert log_entries(recorder.controller)["nsid"] == nsid


def test_refused_ones_leave_their_run(recorder):
    """A bad command between good ones of its opcode: they still run, and as one."""
    bad = command.write(7, 1)
    bad["nsid"] = 9
    completions = recorder.execute(command.write(0, 1), bad, command.write(1, 1))
    assert statuses(completions) == [Status.SUCCESS, Status.INVALID_NAMESPACE, Status.SUCCESS]
    assert [[request.first_lba for request in run] for run in recorder.runs] == [[0, 1]]


def test_admin_and_io_opcodes_are_apart(recorder):
    """0x02 is Read on one queue, Get Log Page on another; 0x06 exists only as Identify."""
    identify = command.identify(1)
    assert statuses(recorder.execute(identify, queue_id=ADMIN_QUEUE)) == [Status.SUCCESS]
    identify["nsid"] = 1
    assert statuses(recorder.execute(identify)) == [Status.INVALID_OPCODE]
    log_page = command.get_log_page(1, 64)
    assert statuses(recorder.execute(log_page, queue_id=ADMIN_QUEUE)) == [Status.INVALID_OPCODE]


def test_handler_fails_a_run():
    controller = failing(CommandFailed(Status.CAPACITY_EXCEEDED, detail="no free flash"))
    entries = np.concatenate([command.write(0, 1), command.write(1, 1)])
    completions = controller.execute(QUEUE, entries, [np.zeros(512, np.uint8)] * 2)
    assert statuses(completions) == [Status.CAPACITY_EXCEEDED] * 2
    assert controller.error_log.count == 2


def test_handler_fails_one_of_a_run():
    def handler(requests):
        requests[1].fail(CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=requests[1].first_lba))

    controller = Controller({IoOpcode.READ: handler}, {})
    entries = np.concatenate([command.read(lba, 1) for lba in (4, 5, 6)])
    entries["cid"] = [10, 11, 12]
    completions = controller.execute(QUEUE, entries, [np.zeros(512, np.uint8)] * 3)
    assert statuses(completions) == [Status.SUCCESS, Status.UNRECOVERED_READ_ERROR, Status.SUCCESS]
    (logged,) = log_entries(controller)
    assert (logged["lba"], logged["cid"], logged["sqid"], logged["opcode"]) == (5, 11, QUEUE, 2)


@pytest.mark.parametrize("bug", [KeyError("x"), MemoryError(), ZeroDivisionError(), AssertionError()])
def test_handler_with_a_bug(bug, caplog):
    """An exception must not cross the seam: a status, and the traceback in the log."""
    completions = failing(bug).execute(QUEUE, command.write(0, 1), [np.zeros(512, np.uint8)])
    assert statuses(completions) == [Status.INTERNAL_ERROR]
    assert caplog.records[-1].exc_info[1] is bug


@pytest.mark.parametrize("do_not_retry", [False, True])
def test_completion_flags(do_not_retry):
    controller = failing(CommandFailed(Status.TOO_MANY_TICKETS, do_not_retry=do_not_retry))
    field = int(controller.execute(QUEUE, command.write(0, 1), [np.zeros(512, np.uint8)])["status"][0])
    assert has_more(field)
    assert bool(field & 0x8000) == do_not_retry


@pytest.mark.parametrize(("result", "cdw0"), [(7, 7), ((1 << 32) - 1, (1 << 32) - 1), ((1 << 32) + 3, 3)])
def test_result(result, cdw0):
    def handler(requests):
        requests[0].result = result

    completions = Controller({IoOpcode.FLUSH: handler}, {}).execute(QUEUE, command.flush(), [None])
    assert completions["cdw0"].tolist() == [cdw0]


def test_buffers_must_match_the_entries(recorder):
    with pytest.raises(ValueError):
        recorder.controller.execute(QUEUE, command.flush(), [None, None])
    assert recorder.runs == []


def test_error_log_is_newest_first_and_bounded():
    controller = failing(CommandFailed(Status.WRITE_FAULT))
    for number in range(ERROR_LOG_ENTRIES + 10):
        entry = command.write(0, 1)
        entry["cid"] = number
        controller.execute(QUEUE, entry, [np.zeros(512, np.uint8)])
    entries = log_entries(controller)
    assert entries["cid"].tolist() == list(range(ERROR_LOG_ENTRIES + 9, 9, -1))
    assert entries["error_count"].tolist() == list(range(ERROR_LOG_ENTRIES + 10, 10, -1))
    assert (entries["status"] == encode(Status.WRITE_FAULT)).all()
    assert (entries["lba"] == LBA_UNKNOWN).all()


@pytest.mark.parametrize(
    ("detail", "logged"),
    [("", b""), ("x" * 21, b"x" * 21), ("x" * 30, b"x" * 21), ("Prüfsumme", b"Pr?fsumme")],
)
def test_error_detail(detail, logged):
    controller = failing(CommandFailed(Status.WRITE_FAULT, lba=0, detail=detail))
    controller.execute(QUEUE, command.write(0, 1), [np.zeros(512, np.uint8)])
    (entry,) = log_entries(controller)
    assert entry["detail"] == logged
    assert entry["lba"] == 0


def test_empty_error_log(recorder):
    assert not recorder.controller.error_log.page().any()


def test_errors_of_several_threads():
    """error_count tells entries apart: no two may have the same."""
    controller = failing(CommandFailed(Status.WRITE_FAULT))
    start = threading.Barrier(4)

    def work():
        start.wait(60)
        for _ in range(100):
            controller.execute(QUEUE, command.write(0, 1), [np.zeros(512, np.uint8)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counts = log_entries(controller)["error_count"].tolist()
    assert counts == list(range(400, 400 - ERROR_LOG_ENTRIES, -1))
