"""Reservations of a served namespace: who may do what, command by command."""

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import IoOpcode
from spdk_glue.controller import Request
from spdk_glue.fabrics.target import reservations as reservations_module
from spdk_glue.fabrics.target.reservation_file import ReservationFile
from spdk_glue.fabrics.target.reservations import MAX_REGISTRANTS, Reservations
from spdk_glue.reservation import (
    ACQUIRE_DATA,
    EXTENDED_DATA,
    HOLDS,
    IGNORE_EXISTING_KEY,
    REGISTER_DATA,
    REGISTRANT,
    REGISTRANT_GONE,
    REGISTRANT_PRESENT,
    RELEASE_DATA,
    REPORT_HEADER,
    Acquire,
    Register,
    Release,
    ReservationType,
)
from spdk_glue.status import Status

A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))
EXCLUSIVE = ReservationType.EXCLUSIVE_ACCESS
READ_ONLY_FOR_OTHERS = ReservationType.WRITE_EXCLUSIVE
OK, CONFLICT = Status.SUCCESS, Status.RESERVATION_CONFLICT


@pytest.fixture
def present():
    return {A, B, C}


@pytest.fixture
def table(present):
    return Reservations(lambda host_id: host_id in present)


def run(table, host, opcode, cdw10, data, cdw11=0):
    request = Request(opcode, command.NSID, cdw10, cdw11, 0, 0, data)
    table.handlers(host)[opcode]([request])
    return request.status


def record(form, *values):
    return np.array([values], form).view(np.uint8)


def register(table, host, key, current=0, action=Register.REGISTER, flags=0):
    data = record(REGISTER_DATA, current, key)
    return run(table, host, IoOpcode.RESERVATION_REGISTER, action | flags, data)


def acquire(table, host, key, kind=EXCLUSIVE, action=Acquire.ACQUIRE, preempted=0):
    data = record(ACQUIRE_DATA, key, preempted)
    return run(table, host, IoOpcode.RESERVATION_ACQUIRE, action | kind << 8, data)


def release(table, host, key, kind=EXCLUSIVE, action=Release.RELEASE):
    data = record(RELEASE_DATA, key)
    return run(table, host, IoOpcode.RESERVATION_RELEASE, action | kind << 8, data)


def report(table, size=4096):
    data = np.full(size, 0xEE, np.uint8)
    assert run(table, A, IoOpcode.RESERVATION_REPORT, size // 4 - 1, data, EXTENDED_DATA) == OK
    header = data[:64].view(REPORT_HEADER)[0]
    return header, data[64:].view(REGISTRANT)[: int(header["num_registrants"])]


def test_records_have_the_specifications_sizes():
    """A registrant's fields beside their place name another host as the holder."""
    assert (REGISTER_DATA.itemsize, ACQUIRE_DATA.itemsize, RELEASE_DATA.itemsize) == (16, 16, 8)
    assert {name: REPORT_HEADER.fields[name][1] for name in REPORT_HEADER.names} == {
        "generation": 0,
        "type": 4,
        "num_registrants": 5,
        "persistence": 9,
    }
    assert {name: REGISTRANT.fields[name][1] for name in ("cntlid", "status", "key", "host_id")} == {
        "cntlid": 0,
        "status": 2,
        "key": 8,
        "host_id": 16,
    }


def test_who_is_not_registered_holds_nothing(table):
    assert acquire(table, A, 0) == CONFLICT
    assert release(table, A, 0) == CONFLICT
    assert register(table, A, 5, action=Register.UNREGISTER) == CONFLICT
    assert register(table, A, 5, action=Register.REPLACE) == CONFLICT


def test_keys(table):
    """Whoever does not know a host's key changes nothing of its."""
    assert register(table, A, 5) == OK
    assert register(table, A, 6) == CONFLICT
    assert register(table, A, 5) == OK
    assert register(table, A, 6, current=4, action=Register.REPLACE) == CONFLICT
    assert register(table, A, 6, current=5, action=Register.REPLACE) == OK
    assert acquire(table, A, 5) == CONFLICT
    assert acquire(table, A, 6) == OK
    assert register(table, A, 7, flags=IGNORE_EXISTING_KEY) == OK
    assert release(table, A, 6) == CONFLICT
    assert release(table, A, 7) == OK


@pytest.mark.parametrize(
    ("kind", "reads", "writes"), [(EXCLUSIVE, True, True), (READ_ONLY_FOR_OTHERS, False, True)]
)
def test_what_others_may_do(table, kind, reads, writes):
    register(table, A, 5)
    assert acquire(table, A, 5, kind) == OK
    for opcode in (IoOpcode.READ, IoOpcode.COMPARE, IoOpcode.VERIFY, IoOpcode.ATTENTION_SUBMIT):
        assert table.refuses(B, opcode) is reads
    changing = (IoOpcode.WRITE, IoOpcode.DATASET_MANAGEMENT, IoOpcode.FLUSH, IoOpcode.SEAL_GROUPS)
    for opcode in changing:
        assert table.refuses(B, opcode) is writes
    for opcode in (*changing, IoOpcode.READ):
        assert not table.refuses(A, opcode)
    assert not table.refuses(B, IoOpcode.RESERVATION_REPORT)
    assert release(table, A, 5, kind) == OK
    assert not table.refuses(B, IoOpcode.WRITE)


def test_one_holds_it(table):
    register(table, A, 5)
    register(table, B, 6)
    assert acquire(table, A, 5) == acquire(table, A, 5) == OK
    assert acquire(table, A, 5, READ_ONLY_FOR_OTHERS) == CONFLICT
    assert acquire(table, B, 6) == CONFLICT
    assert release(table, B, 6) == OK, "of one who holds nothing: nothing happens"
    assert table.refuses(B, IoOpcode.READ)
    assert release(table, A, 5, READ_ONLY_FOR_OTHERS) == Status.INVALID_FIELD
    assert register(table, A, 0, current=5, action=Register.UNREGISTER) == OK
    assert acquire(table, B, 6) == OK


def test_preempt(table):
    """The one who was pre-empted is no registrant any more: it cannot come back by mistake."""
    register(table, A, 5)
    register(table, B, 6)
    acquire(table, A, 5)
    assert acquire(table, B, 6, action=Acquire.PREEMPT, preempted=9) == CONFLICT
    assert acquire(table, B, 6, action=Acquire.PREEMPT, preempted=5) == OK
    assert table.refuses(A, IoOpcode.READ) and not table.refuses(B, IoOpcode.READ)
    assert acquire(table, A, 5) == CONFLICT
    assert len(report(table)[1]) == 1


def test_clear(table):
    register(table, A, 5)
    register(table, B, 6)
    acquire(table, A, 5)
    assert release(table, B, 6, action=Release.CLEAR) == OK
    assert not table.refuses(B, IoOpcode.WRITE) and not len(report(table)[1])


def test_report(table, present):
    """Who is gone is told apart from who is there: it decides who may take over."""
    register(table, A, 5)
    register(table, B, 6)
    acquire(table, B, 6)
    present.discard(B)
    header, found = report(table)
    assert (header["type"], header["num_registrants"]) == (EXCLUSIVE, 2)
    assert found["cntlid"].tolist() == [REGISTRANT_PRESENT, REGISTRANT_GONE]
    assert found["status"].tolist() == [0, HOLDS] and found["key"].tolist() == [5, 6]
    assert [bytes(one) for one in found["host_id"]] == [A, B]
    generation = int(header["generation"])
    register(table, C, 7)
    assert report(table)[0]["generation"] == generation + 1


def test_a_report_fills_its_room(table):
    """Less room than registrants, or more: no byte of another command's."""
    register(table, A, 5)
    data = np.full(4096, 0xEE, np.uint8)
    run(table, A, IoOpcode.RESERVATION_REPORT, 1023, data, EXTENDED_DATA)
    assert not (data == 0xEE).any()
    short = np.full(16, 0xEE, np.uint8)
    assert run(table, A, IoOpcode.RESERVATION_REPORT, 3, short, EXTENDED_DATA) == OK
    assert run(table, A, IoOpcode.RESERVATION_REPORT, 1023, short, EXTENDED_DATA) == Status.DATA_TRANSFER_ERROR
    wanted = Status.HOST_IDENTIFIER_INCONSISTENT
    assert run(table, A, IoOpcode.RESERVATION_REPORT, 1023, data, 0) == wanted


def test_bad_commands(table):
    register(table, A, 5)
    assert acquire(table, A, 5, kind=7) == Status.INVALID_FIELD
    assert acquire(table, A, 5, action=5) == Status.INVALID_FIELD
    assert release(table, A, 5, action=5) == Status.INVALID_FIELD
    assert register(table, A, 5, action=5) == Status.INVALID_FIELD
    for data in (None, np.zeros(4, np.uint8)):
        assert run(table, A, IoOpcode.RESERVATION_REGISTER, 0, data) == Status.DATA_TRANSFER_ERROR


def test_hosts_that_are_gone_make_room(table, present):
    """A table that only grows is one that a stranger can fill."""
    hosts = [number.to_bytes(16, "big") for number in range(100, 100 + MAX_REGISTRANTS)]
    for host in hosts:
        present.add(host)
        assert register(table, host, 1) == OK
    assert register(table, A, 1) == Status.INTERNAL_ERROR
    present.discard(hosts[3])
    assert register(table, A, 1) == OK
    assert len(report(table, 16 << 10)[1]) == MAX_REGISTRANTS


def test_a_target_started_anew_gives_nothing_away(tmp_path, monkeypatch):
    """Its hosts have some seconds to come back, and find what they held; then they are gone as others are."""
    present = {A}

    def start(serial_number="1"):
        return Reservations(lambda host: host in present, ReservationFile(tmp_path / "state", serial_number))

    table = start()
    assert register(table, A, 5) == OK and acquire(table, A, 5) == OK
    present = {B}
    table = start()
    assert table.refuses(B, IoOpcode.WRITE) and not table.refuses(A, IoOpcode.WRITE)
    assert register(table, B, 6) == OK and acquire(table, B, 6) == CONFLICT
    assert [int(one["cntlid"]) for one in report(table)[1]] == [REGISTRANT_PRESENT] * 2
    present = {A, B}
    assert release(table, A, 5) == OK and acquire(table, B, 6) == OK
    assert start()._holder == B
    present = {A}
    monkeypatch.setattr(reservations_module, "RETURN_SECONDS", 0.0)
    assert [int(one["cntlid"]) for one in report(start())[1]] == [REGISTRANT_PRESENT, REGISTRANT_GONE]
    assert not start("another drive").refuses(A, IoOpcode.WRITE)
    table = start()
    assert acquire(table, A, 5, action=Acquire.PREEMPT, preempted=6) == OK
    assert release(table, A, 5, action=Release.CLEAR) == OK
    assert not (tmp_path / "state").exists()


def test_what_cannot_be_kept_is_not_promised(tmp_path, caplog):
    table = Reservations(lambda host: True, ReservationFile(tmp_path / "gone" / "state", "1"))
    assert register(table, A, 5) == Status.INTERNAL_ERROR
    (tmp_path / "bad").write_text("{")
    assert not Reservations(lambda host: True, ReservationFile(tmp_path / "bad", "1"))._keys
    assert "cannot be used" in caplog.text
