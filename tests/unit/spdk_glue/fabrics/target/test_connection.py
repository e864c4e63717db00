"""One connection of the target, byte by byte. If these fail, data go astray, or a rule breaker stays."""

import numpy as np
import pytest

from spdk_glue import command, status
from spdk_glue.command import IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.pdu import FatalError, PduType
from spdk_glue.fabrics.records import SGL_IN_CAPSULE, SGL_TRANSPORT, FabricsType, Property
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.states import State
from spdk_glue.status import Status
from tests.unit.spdk_glue.fabrics.target.hosts import BLOCK, Rig, entry

DIGESTS = [{}, {"header_digest": True}, {"data_digest": True}, {"header_digest": True, "data_digest": True}]


@pytest.fixture
def rig():
    return Rig()


def pages(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count * BLOCK, np.uint8).tobytes()


def submit_by_r2t(host, lba: int, data: bytes, part: int = 128 << 10) -> int:
    """A Write and its data; its cid."""
    cid = host.submit(command.write(lba, len(data) // BLOCK), room=len(data))
    r2t = host.take(PduType.R2T)
    assert (r2t["cid"], r2t["offset"], r2t["length"]) == (cid, 0, len(data))
    for at in range(0, len(data), part):
        piece = data[at : at + part]
        host.send(host.h2c(r2t, piece, at, at + len(piece) == len(data)))
    return cid


def write_by_r2t(host, *arguments):
    cid = submit_by_r2t(host, *arguments)
    host.rig.run_later()
    host.poll()
    return host.completion(cid)


@pytest.mark.parametrize("digests", DIGESTS)
def test_write_and_read(rig, digests):
    io = rig.io(rig.admin(**digests), **digests)
    assert io.run(command.write(3, 2), pages(2, 1))["status"] == 0
    assert write_by_r2t(io, 5, pages(64, 2))["status"] == 0
    assert io.run(command.read(3, 66), room=66 * BLOCK)["status"] == 0
    assert io.data == pages(2, 1) + pages(64, 2)


@pytest.mark.parametrize("flow_control", [True, False])
def test_a_run_of_reads(rig, flow_control):
    io = rig.io(rig.admin(), flow_control=flow_control)
    content = pages(40, 3)
    write_by_r2t(io, 0, content)
    cids, wire = zip(*(io.capsule(command.read(lba, 1), room=BLOCK) for lba in range(40)), strict=True)
    io.send(b"".join(wire))
    assert any(a.type == PduType.CAPSULE_RESPONSE for a in io.answers) == flow_control
    for lba, cid in enumerate(cids):
        assert io.completion(cid)["status"] == 0
        assert io.data == content[lba * BLOCK : (lba + 1) * BLOCK]
    assert not io.answers


def test_one_bad_read_of_a_run_fails_alone(rig):
    io = rig.io(rig.admin())
    lbas = [1, 5000, 2]
    cids, wire = zip(*(io.capsule(command.read(lba, 1), room=BLOCK) for lba in lbas), strict=True)
    io.send(b"".join(wire))
    found = [status.decode(int(io.completion(cid)["status"])) for cid in cids]
    assert found == [Status.SUCCESS, Status.LBA_OUT_OF_RANGE, Status.SUCCESS]


def test_a_run_larger_than_its_memory():
    rig = Rig(limits=Limits(max_transfer_bytes=64 << 10, buffer_bytes=96 << 10))
    io = rig.io(rig.admin())
    content = pages(64, 4)
    for lba in range(0, 64, 16):
        write_by_r2t(io, lba, content[lba * BLOCK : (lba + 16) * BLOCK])
    cids, wire = zip(
        *(io.capsule(command.read(lba, 16), room=16 * BLOCK) for lba in range(0, 64, 16)), strict=True
    )
    io.send(b"".join(wire))
    got = b""
    for cid in cids:
        assert io.completion(cid)["status"] == 0
        got += io.data
    assert got == content


def test_responses_tell_the_queues_head(rig):
    io = rig.io(rig.admin(), entries=8)
    heads = [int(io.run(command.flush())["sqhd"]) for _ in range(10)]
    assert heads == [2, 3, 4, 5, 6, 7, 0, 1, 2, 3]  # Connect was the first


def test_r2t_waits_for_memory():
    """Commands whose data do not fit wait; none is lost, and memory stays bounded."""
    rig = Rig(limits=Limits(max_transfer_bytes=64 << 10, buffer_bytes=128 << 10))
    io = rig.io(rig.admin())
    cids = [io.submit(command.write(16 * i, 16), room=16 * BLOCK) for i in range(5)]
    assert sum(a.type == PduType.R2T for a in io.answers) == 2
    for number, cid in enumerate(cids):
        r2t = io.take(PduType.R2T)
        assert r2t["cid"] == cid
        io.send(io.h2c(r2t, pages(16, number), 0, True))
        assert io.completion(cid)["status"] == 0
    assert rig.drive.blocks[:80].tobytes() == b"".join(pages(16, number) for number in range(5))


@pytest.mark.parametrize(
    "change, fes",
    [
        ({"ttag": 77}, FatalError.INVALID_HEADER_FIELD),
        ({"cid": 999}, FatalError.INVALID_HEADER_FIELD),
        ({"length": BLOCK - 4}, FatalError.INVALID_HEADER_FIELD),
        ({"length": 0xFFFFFFFF}, FatalError.INVALID_HEADER_FIELD),
        ({"offset": 4}, FatalError.DATA_OUT_OF_RANGE),
        ({"offset": 0xFFFFF000}, FatalError.DATA_OUT_OF_RANGE),
        ({"flags": 0}, FatalError.INVALID_HEADER_FIELD),
    ],
)
def test_data_that_were_not_asked_for_end_the_connection(rig, change, fes):
    io = rig.io(rig.admin())
    io.submit(command.write(0, 1), room=BLOCK)
    r2t = io.take(PduType.R2T)
    io.send(io.h2c(r2t, pages(1), 0, True, **change))
    assert io.take(PduType.C2H_TERMINATE)["fes"] == fes
    assert not io.connection.is_open
    assert not rig.drive.blocks.any()


def test_early_and_repeated_data_end_the_connection(rig):
    io = rig.io(rig.admin())
    io.send(io.h2c({"cid": 1, "ttag": 0}, pages(1), 0, True))
    assert io.take(PduType.C2H_TERMINATE)["fes"] == FatalError.INVALID_HEADER_FIELD
    io = rig.io(rig.admin())
    io.submit(command.write(0, 2), room=2 * BLOCK)
    r2t = io.take(PduType.R2T)
    io.send(io.h2c(r2t, pages(1), 0, False) * 2)
    assert io.take(PduType.C2H_TERMINATE)["fes"] == FatalError.DATA_OUT_OF_RANGE


def test_a_wrong_data_digest_fails_the_command_alone(rig):
    digests = {"data_digest": True}
    io = rig.io(rig.admin(**digests), **digests)
    cid, wire = io.capsule(command.write(0, 1), pages(1))
    io.send(wire[:-1] + bytes([wire[-1] ^ 1]))
    completion = io.completion(cid)
    assert status.decode(int(completion["status"])) == Status.TRANSIENT_TRANSPORT_ERROR
    assert not int(completion["status"]) >> 15  # it may be sent again
    assert not rig.drive.blocks.any()
    assert io.run(command.write(0, 1), pages(1))["status"] == 0


def test_a_cid_in_use_is_refused(rig):
    io = rig.io(rig.admin())
    io.submit(command.write(0, 1), room=BLOCK, cid=9)
    assert io.status(command.flush(), cid=9) == Status.COMMAND_ID_CONFLICT
    io.send(io.h2c(io.take(PduType.R2T), pages(1), 0, True))
    assert io.completion(9)["status"] == 0
    _, wire = zip(*(io.capsule(command.read(0, 1), room=BLOCK, cid=4) for _ in range(2)), strict=True)
    io.send(b"".join(wire))  # a run is no way around it
    assert status.decode(int(io.completion(4)["status"])) == Status.COMMAND_ID_CONFLICT


def test_more_commands_than_the_queue_has_entries(rig):
    io = rig.io(rig.admin(), entries=4)
    wire = b"".join(io.capsule(command.write(0, 1), room=BLOCK)[1] for _ in range(5))
    io.send(wire)
    assert io.take(PduType.C2H_TERMINATE)["fes"] == FatalError.LIMIT_EXCEEDED


def sgl(kind, length, address=0):
    found = records.sgl(kind, length)
    found["address"] = address
    return np.void(found.tobytes())


@pytest.mark.parametrize(
    "fields, in_capsule, expected",
    [
        ({"dptr": sgl(SGL_TRANSPORT, 0xFFFFFFFF)}, b"", Status.SGL_LENGTH_INVALID),
        ({"dptr": sgl(SGL_TRANSPORT, (1 << 20) + BLOCK)}, b"", Status.SGL_LENGTH_INVALID),
        ({"dptr": sgl(0x40, BLOCK)}, b"", Status.SGL_TYPE_INVALID),
        ({"dptr": sgl(SGL_IN_CAPSULE, BLOCK)}, b"", Status.SGL_LENGTH_INVALID),
        ({"dptr": sgl(SGL_IN_CAPSULE, BLOCK, 64)}, bytes(BLOCK), Status.SGL_OFFSET_INVALID),
        ({"dptr": sgl(SGL_IN_CAPSULE, 2 * BLOCK)}, bytes(BLOCK), Status.SGL_LENGTH_INVALID),
        ({"dptr": sgl(SGL_TRANSPORT, BLOCK)}, bytes(BLOCK), Status.SGL_LENGTH_INVALID),
        (
            {"dptr": sgl(SGL_IN_CAPSULE, 3 * BLOCK)},
            bytes(3 * BLOCK),
            Status.SGL_LENGTH_INVALID,
        ),  # too much for one
        ({"flags": 0, "dptr": sgl(SGL_TRANSPORT, BLOCK)}, b"", Status.INVALID_FIELD),  # PRP
        ({"flags": 0x41, "dptr": sgl(SGL_TRANSPORT, BLOCK)}, b"", Status.INVALID_FIELD),  # fused
        ({"dptr": sgl(SGL_TRANSPORT, 0)}, b"", Status.DATA_TRANSFER_ERROR),
        ({"opcode": 0x83, "dptr": sgl(SGL_TRANSPORT, BLOCK)}, b"", Status.INVALID_OPCODE),  # bidirectional
        ({"opcode": 0x98}, b"", Status.INVALID_OPCODE),
        ({"nsid": 2, "dptr": sgl(SGL_IN_CAPSULE, BLOCK)}, bytes(BLOCK), Status.INVALID_NAMESPACE),
    ],
)
def test_commands_that_lie_about_their_data(rig, fields, in_capsule, expected):
    io = rig.io(rig.admin())
    written = command.write(0, 1)
    written["flags"], written["cid"] = records.PSDT_SGL, 5
    for name, value in fields.items():
        written[name] = value
    io.send(pdu.with_digests(pdu.capsule_commands(written, io.to_target, len(in_capsule)), in_capsule))
    assert status.decode(int(io.completion(5)["status"])) == expected
    assert io.run(command.flush())["status"] == 0  # and the connection lives


def test_read_in_capsule_is_refused(rig):
    io = rig.io(rig.admin())
    entry = command.read(0, 1)
    entry["flags"], entry["dptr"] = records.PSDT_SGL, sgl(SGL_IN_CAPSULE, BLOCK)
    io.send(pdu.capsule_commands(entry, io.to_target).tobytes())
    assert status.decode(int(io.completion(0)["status"])) == Status.SGL_TYPE_INVALID


def test_first_things_first(rig):
    """Nothing is served before ICReq, and nothing but Connect before Connect."""
    host = rig.connection(initialise=False)
    host.send(pdu.capsule_commands(command.flush(), host.to_target).tobytes())
    assert host.take(PduType.C2H_TERMINATE)["fes"] == FatalError.SEQUENCE_ERROR
    host = rig.connection()
    for early in (
        command.identify(1),
        records.property_get(Property.CAP),
        records.authentication(FabricsType.AUTHENTICATION_SEND, 64),
    ):
        assert host.status(early) == Status.COMMAND_SEQUENCE_ERROR
    host.send(pdu.ic_request(header_digest=False, data_digest=False).tobytes())
    assert host.take(PduType.C2H_TERMINATE)["fes"] == FatalError.SEQUENCE_ERROR


@pytest.mark.parametrize("field, value", [("pfv", 1), ("hpda", 32)])
def test_ic_requests_that_cannot_be_met(rig, field, value):
    host = rig.connection(initialise=False)
    request = pdu.ic_request(header_digest=False, data_digest=False)
    request[field] = value
    host.send(request.tobytes())
    terminate = host.take(PduType.C2H_TERMINATE)
    assert terminate["fei"] == pdu.IC_REQUEST.fields[field][1]


def test_data_are_aligned_as_the_host_wants(rig):
    host = rig.connection(initialise=False)
    host.send(pdu.ic_request(header_digest=False, data_digest=False, hpda=15).tobytes())
    assert host.connection._out.framing.alignment == 64


def test_the_host_may_end_it(rig):
    io = rig.io(rig.admin())
    error = pdu.FatalPduError(FatalError.SEQUENCE_ERROR, "")
    io.send(pdu.terminate(PduType.H2C_TERMINATE, error, bytes(72)))
    assert not io.connection.is_open and not io.answers


def test_slow_peers_are_let_go(rig):
    """Each stage has its time: otherwise silent connections fill the table."""
    silent = rig.connection(initialise=False)
    half_way = rig.connection()
    io = rig.io(rig.admin())
    io.submit(command.write(0, 1), room=BLOCK)
    rig.now += rig.limits.handshake_seconds + 0.1
    for host in (silent, half_way, io):
        host.poll()
    assert [host.connection.is_open for host in (silent, half_way, io)] == [False, False, True]
    rig.now += rig.limits.stall_seconds
    io.poll()
    assert not io.connection.is_open


def test_old_bytes_never_leave(rig):
    """Memory is used again: what a command does not fill is zeros, whatever was there before."""
    io = rig.io(rig.admin())
    for _ in range(3):
        write_by_r2t(io, 0, bytes([0xAA]) * 16 * BLOCK)
    ticket = command.vendor(IoOpcode.ATTENTION_SUBMIT, 3)
    assert io.run(ticket, bytes([100]) + bytes(BLOCK - 1))["status"] == 0
    assert io.run(command.vendor(IoOpcode.ATTENTION_FETCH, 3, 16), room=16 * BLOCK)["cdw0"] == 100
    assert io.data == bytes([7]) * 100 + bytes(16 * BLOCK - 100)


def test_a_failed_read_sends_no_data(rig):
    io = rig.io(rig.admin())
    assert io.status(command.read(1020, 10), room=10 * BLOCK) == Status.LBA_OUT_OF_RANGE
    assert io.data == b"" and not io.answers


def test_long_commands_let_others_pass(rig):
    """A Flush that takes its time must not hold up a Read of the same queue."""
    io = rig.io(rig.admin())
    flush = io.submit(command.flush())
    assert rig.later and not io.answers
    read = io.submit(command.read(0, 1), room=BLOCK)
    assert io.completion(read)["status"] == 0
    rig.run_later()
    assert io.woken
    io.poll()
    assert io.completion(flush)["status"] == 0


def test_long_writes_let_others_pass(rig):
    """Flash that takes its time, or collects garbage first, must not hold up a Read of the same queue."""
    io = rig.io(rig.admin())
    first = submit_by_r2t(io, 0, bytes([1]) * 64 * BLOCK)
    others = [
        submit_by_r2t(io, lba, bytes([2 + lba]) * 5 * BLOCK) for lba in (0, 10)
    ]  # writes keep their order
    assert len(rig.later) == 1 and not io.answers
    read = io.submit(command.read(100, 1), room=BLOCK)
    assert io.completion(read)["status"] == 0
    rig.run_later()
    io.poll()
    assert io.completion(first)["status"] == 0
    assert len(rig.later) == 1 and not io.answers
    rig.run_later()
    io.poll()
    assert [io.completion(cid)["status"] for cid in others] == [0, 0]
    assert (rig.drive.blocks[:64, 0] == [2] * 5 + [1] * 5 + [12] * 5 + [1] * 49).all()


def test_a_connection_ends_during_a_long_write(rig):
    """What is being written is written; nothing is sent, and what waits is forgotten."""
    io = rig.io(rig.admin())
    for number in (1, 2):
        submit_by_r2t(io, 0, bytes([number]) * 64 * BLOCK)
    io.connection.end()
    rig.run_later()
    io.poll()
    assert not io.answers and not rig.later
    assert (rig.drive.blocks[:64] == 1).all()


def test_few_long_commands_at_once(rig):
    io = rig.io(rig.admin())
    cids = [io.submit(command.flush()) for _ in range(5)]
    assert len(rig.later) == rig.limits.num_background
    while rig.later:
        rig.run_later()
        io.poll()
    assert all(io.completion(cid)["status"] == 0 for cid in cids)


def test_disconnect(rig):
    admin = rig.admin()
    io = rig.io(admin)
    assert admin.status(records.disconnect()) == Status.INVALID_QUEUE
    assert io.run(records.disconnect())["status"] == 0
    assert not io.connection.is_open and admin.connection.is_open
    io.connection.end()
    rig.io(admin)  # the queue is free again


def test_states_only_go_forward(rig):
    io = rig.io(rig.admin())
    with pytest.raises(AssertionError):
        io.connection._go(State.AWAIT_IC)


def test_unknown_fabrics_commands(rig):
    host = rig.admin()
    unknown = entry(records.FABRICS_OPCODE)
    unknown.view(records.FABRICS_COMMAND)["fctype"] = 0x30
    assert host.status(unknown) == Status.INVALID_OPCODE
