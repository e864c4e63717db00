"""A Submit and its Fetch in one flight. If these fail, a host waits for what is there, gets an answer that a
rule forbids, or another status than the two commands have apart."""

import numpy as np
import pytest

from spdk_glue import command, status
from spdk_glue.command import NSID_ALL, IoOpcode
from spdk_glue.controller import Request
from spdk_glue.fabrics.pdu import PduType
from spdk_glue.request_id import current
from spdk_glue.reservation import ACQUIRE_DATA, REGISTER_DATA, Acquire, Register, ReservationType
from spdk_glue.status import Status
from tests.unit.spdk_glue.fabrics.target.hosts import BLOCK, Rig

DIGESTS = [{}, {"header_digest": True}, {"data_digest": True}, {"header_digest": True, "data_digest": True}]
SIZE = 9  # of an answer
OTHER = "nqn.2026-11.io.kvfs:other"


@pytest.fixture
def rig():
    """`asked`: how often the short way was tried, which answers with 5s where the long one has 7s."""
    rig = Rig()
    rig.asked = 0

    def short_way(descriptor, answer):
        rig.asked += 1
        if descriptor[0] != len(answer):
            return False
        answer[:] = 5
        return True

    rig.short_way = short_way
    return rig


def capsules(io, *, submit=None, fetch=None, data=bytes([SIZE]) + bytes(63), room=SIZE, cids=(None, None)):
    """((cid, cid), both in one piece). submit, fetch: fields of the entries that differ from ticket 3's"""
    entries = [command.vendor(opcode, 3) for opcode in (IoOpcode.ATTENTION_SUBMIT, IoOpcode.ATTENTION_FETCH)]
    for one, fields in zip(entries, (submit, fetch), strict=True):
        for name, value in (fields or {}).items():
            one[name] = value
    first, second = io.capsule(entries[0], data, cid=cids[0]), io.capsule(entries[1], room=room, cid=cids[1])
    return (first[0], second[0]), first[1] + second[1]


def codes(io, cids) -> list[int]:
    return [status.decode(int(io.completion(cid)["status"])) for cid in cids]


@pytest.mark.parametrize("flow_control", [True, False])
@pytest.mark.parametrize("digests", DIGESTS)
def test_answered_at_once(rig, digests, flow_control):
    io = rig.io(rig.admin(**digests), flow_control=flow_control, **digests)
    for size in (SIZE, 4 * BLOCK, SIZE):
        descriptor = bytes([size & 0xFF]) + bytes(63)
        if size != SIZE:
            rig.short_way = lambda data, answer: answer.fill(5) is None
        (submit, fetch), wire = capsules(io, data=descriptor, room=size)
        io.send(wire)
        kinds = [answer.type for answer in io.answers]
        assert kinds == [PduType.CAPSULE_RESPONSE, PduType.C2H_DATA, PduType.CAPSULE_RESPONSE]
        submitted = io.completion(submit)
        fetched = io.completion(fetch)
        assert (submitted["status"], fetched["status"], fetched["cdw0"]) == (0, 0, size)
        assert io.data == bytes([5]) * size
    assert not rig.drive.seen and not io.connection._outstanding


def test_the_hosts_request(rig):
    """What a Submit says of it is this thread's while it is answered; of one that says nothing it is none."""
    found = []

    def short_way(descriptor, answer):
        found.append(current.request)
        return True

    rig.short_way = short_way
    io = rig.io(rig.admin())
    for fields, wanted in (({"cdw14": 7, "cdw15": 0xABCD}, 0xABCD << 32 | 7), ({}, None)):
        cids, wire = capsules(io, submit=fields)
        io.send(wire)
        assert codes(io, cids) == [Status.SUCCESS] * 2
        assert found.pop() == wanted and current.request is None


def test_the_queues_head_counts_both(rig):
    io = rig.io(rig.admin(), entries=4)
    heads = []
    for _ in range(3):
        cids, wire = capsules(io)
        io.send(wire)
        heads.append([int(io.completion(cid)["sqhd"]) for cid in cids])
    assert heads == [[3, 3], [1, 1], [3, 3]]  # Connect was the first


def test_what_has_no_short_way(rig):
    rig.short_way = lambda descriptor, answer: False
    io = rig.io(rig.admin())
    (submit, fetch), wire = capsules(io)
    io.send(wire)
    io.poll()
    assert io.completion(submit)["status"] == 0
    assert io.completion(fetch)["cdw0"] == SIZE and io.data == bytes([7]) * SIZE
    assert not rig.drive.answers


def test_a_fetch_behind_its_submit_waits_for_the_ticket(rig):
    """What the capabilities promise of a descriptor in a capsule, whatever the work."""
    rig.short_way = lambda descriptor, answer: False
    rig.tickets_wait = True
    io = rig.io(rig.admin())
    (submit, fetch), wire = capsules(io)
    io.send(wire)
    assert io.completion(submit)["status"] == 0 and not io.answers
    rig.waiting.popitem()[1]()
    io.poll()
    assert io.completion(fetch)["cdw0"] == SIZE


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"submit": {"nsid": 7}}, [Status.INVALID_NAMESPACE, Status.UNKNOWN_TICKET]),
        ({"fetch": {"nsid": 7}}, [Status.SUCCESS, Status.INVALID_NAMESPACE]),
        ({"fetch": {"cdw10": 4}}, [Status.SUCCESS, Status.UNKNOWN_TICKET]),
        ({"fetch": {"opcode": IoOpcode.ATTENTION_CANCEL}, "room": 0}, [Status.SUCCESS, Status.SUCCESS]),
        ({"room": 2 << 20}, [Status.SUCCESS, Status.SGL_LENGTH_INVALID]),
        ({"room": 0}, [Status.SUCCESS, Status.DATA_TRANSFER_ERROR]),
        ({"data": bytes([SIZE]) * 12_288}, [Status.SGL_LENGTH_INVALID, Status.UNKNOWN_TICKET]),
    ],
)
def test_an_unusual_pair_goes_the_usual_way(rig, changes, wanted):
    io = rig.io(rig.admin())
    cids, wire = capsules(io, **changes)
    io.send(wire)
    io.poll()
    assert codes(io, cids) == wanted
    assert rig.asked == 0


def test_all_namespaces_are_the_one(rig):
    io = rig.io(rig.admin())
    cids, wire = capsules(io, submit={"nsid": NSID_ALL}, fetch={"nsid": NSID_ALL})
    io.send(wire)
    assert codes(io, cids) == [Status.SUCCESS] * 2 and rig.asked == 1


def test_not_on_an_admin_queue(rig):
    admin = rig.admin()
    cids, wire = capsules(admin)
    admin.send(wire)
    admin.poll()
    assert Status.SUCCESS not in codes(admin, cids) and rig.asked == 0


def test_a_ticket_in_use(rig):
    io = rig.io(rig.admin())
    assert io.run(command.vendor(IoOpcode.ATTENTION_SUBMIT, 3), bytes([1]) + bytes(63))["status"] == 0
    cids, wire = capsules(io)
    io.send(wire)
    io.poll()
    assert codes(io, cids) == [Status.TICKET_IN_USE, Status.SUCCESS]  # the Fetch is of the earlier one
    assert rig.asked == 0


def test_a_command_identifier_twice(rig):
    io = rig.io(rig.admin())
    _, wire = capsules(io, cids=(9, 9))
    io.send(wire)
    io.poll()
    found = [a.record["entry"]["status"] for a in io.answers if a.type == PduType.CAPSULE_RESPONSE]
    assert sorted(status.decode(int(one)) for one in found) == [Status.SUCCESS, Status.COMMAND_ID_CONFLICT]
    assert rig.asked == 0


def test_damaged_data(rig):
    io = rig.io(rig.admin(data_digest=True), data_digest=True)
    cids, wire = capsules(io)
    at = wire.index(bytes([SIZE]) + bytes(63)) + 20
    io.send(wire[:at] + b"\1" + wire[at + 1 :])
    io.poll()
    assert codes(io, cids) == [Status.TRANSIENT_TRANSPORT_ERROR, Status.UNKNOWN_TICKET]
    assert rig.asked == 0


def test_another_host_holds_the_namespace(rig):
    handlers = rig.subsystems.reservations.handlers(bytes([8]) * 16)
    for opcode, cdw10, record in (
        (IoOpcode.RESERVATION_REGISTER, Register.REGISTER, np.array([(0, 5)], REGISTER_DATA)),
        (
            IoOpcode.RESERVATION_ACQUIRE,
            Acquire.ACQUIRE | ReservationType.EXCLUSIVE_ACCESS << 8,
            np.array([(5, 0)], ACQUIRE_DATA),
        ),
    ):
        request = Request(opcode, command.NSID, cdw10, 0, 0, 0, record.view(np.uint8))
        handlers[opcode]([request])
        assert request.status == Status.SUCCESS
    io = rig.io(rig.admin())
    cids, wire = capsules(io)
    io.send(wire)
    io.poll()
    assert codes(io, cids) == [Status.RESERVATION_CONFLICT] * 2 and rig.asked == 0
