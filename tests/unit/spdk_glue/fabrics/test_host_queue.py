"""The host's queue against the bytes that a target sends, right and wrong, without a socket."""

import numpy as np
import pytest

from spdk_glue import command
from spdk_glue.command import COMPLETION_ENTRY, AdminOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.initiator import faults
from spdk_glue.fabrics.pdu import FatalPduError, Framing, PduFlag, PduType
from spdk_glue.fabrics.tcp_glue._tcp_glue import lib
from spdk_glue.status import Status, decode, encode

from .host_fuzz import fuzz
from .wire_host import GuardedMemory, WireHost

DIGESTS = [(False, False), (True, False), (False, True), (True, True)]

TO_HOST, FROM_HOST = Framing(from_host=False), Framing(from_host=True)


def content(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def framings(header_digest=False, data_digest=False):
    """(of what the target sends, of what it receives)"""
    return (
        Framing(from_host=False, header_digest=header_digest, data_digest=data_digest),
        Framing(from_host=True, header_digest=header_digest, data_digest=data_digest),
    )


def response(cid, status=0, framing=TO_HOST, cdw0=0):
    entry = np.zeros(1, COMPLETION_ENTRY)
    entry["cid"], entry["status"], entry["cdw0"] = cid, encode(status), cdw0
    return pdu.with_digests(pdu.capsule_responses(entry, framing))


def c2h(cid, data, offset=0, flags=0, framing=TO_HOST):
    header = pdu.data(PduType.C2H_DATA, cid, len(data), framing, offsets=offset, flags=flags)
    return pdu.with_digests(header, bytes(data))


def grant(cid, offset, length, ttag=7, framing=TO_HOST):
    return pdu.with_digests(pdu.r2t(cid, ttag, offset, length, framing))


def pdus_in(sent, framing=FROM_HOST):
    found = []
    while sent:
        one, taken = pdu.take_pdu(sent, framing)
        found.append(one)
        sent = sent[taken:]
    return found


def test_the_faults_have_texts():
    """A fault without one is a traceback instead of a line."""
    numbers = {getattr(lib, name) for name in dir(lib) if name.startswith("HOST_FAULT_")}
    assert numbers - {lib.HOST_FAULT_NONE} == set(faults.TEXTS)
    for number in faults.TEXTS:
        assert faults.describe(number, 1)


def test_a_read_is_one_capsule():
    """A byte beside its place reads from elsewhere."""
    host = WireHost()
    assert host.start(command.read(0x123456789, 8), np.zeros(4096, np.uint8), cid=0x1234) == 0
    assert host.output() == (
        bytes.fromhex("04004800 48000000 02403412 01000000")
        + bytes(16)
        + bytes.fromhex("0000000000000000 00100000 0000005a")
        + bytes.fromhex("89674523 01000000 07000000 00000000 00000000 00000000")
    )
    assert host.output() == b""


@pytest.mark.parametrize(("header_digest", "data_digest"), DIGESTS)
@pytest.mark.parametrize("alignment", [4, 8, 128])
def test_small_data_go_in_the_capsule(header_digest, data_digest, alignment):
    """What the target's rules take, at the alignment it asked for, with an SGL that says where the data are."""
    host = WireHost(header_digest=header_digest, data_digest=data_digest, data_alignment=alignment)
    data = content(4096)
    host.start(command.write(5, 1), data, cid=3)
    sent = host.output(at_once=7)
    (found,) = pdus_in(sent, framings(header_digest, data_digest)[1])
    assert found.type == PduType.CAPSULE_COMMAND and found.data == data.tobytes() and found.is_data_intact
    assert found.record["pdo"] % alignment == 0
    entry = found.record["entry"]
    descriptor = np.frombuffer(entry["dptr"].tobytes(), records.SGL_DESCRIPTOR)[0]
    assert (descriptor["type"], descriptor["length"], descriptor["address"]) == (
        records.SGL_IN_CAPSULE,
        4096,
        0,
    )


@pytest.mark.parametrize(("header_digest", "data_digest"), DIGESTS)
def test_large_data_go_when_they_are_asked_for(header_digest, data_digest):
    """A target would write the wrong part, or wait forever."""
    host = WireHost(header_digest=header_digest, data_digest=data_digest, max_h2c_data_bytes=8192)
    ours, theirs = framings(header_digest, data_digest)
    data = content(40960)
    host.start(command.write(0, 10), data, cid=9)
    (capsule,) = pdus_in(host.output(), theirs)
    assert not capsule.data
    found = b""
    for offset, length in ((0, 20480), (20480, 16384), (36864, 4096)):
        assert host.feed(grant(9, offset, length, ttag=offset & 0xFFF, framing=ours))
        pieces = pdus_in(host.output(at_once=5000), theirs)
        for number, piece in enumerate(pieces):
            assert piece.type == PduType.H2C_DATA and piece.is_data_intact
            assert piece.record["cid"] == 9 and piece.record["ttag"] == offset & 0xFFF
            assert piece.record["offset"] == len(found) and len(piece.data) <= 8192
            is_last = bool(piece.record["flags"] & PduFlag.LAST)
            assert is_last == (number == len(pieces) - 1)
            found += piece.data
    assert found == data.tobytes()
    assert host.feed(response(9, framing=ours))
    assert host.completions()["cid"].tolist() == [9]


@pytest.mark.parametrize(("header_digest", "data_digest"), DIGESTS)
@pytest.mark.parametrize("at_once", [1, 3, 24, 25, 1000, 1 << 20])
def test_data_come_where_they_belong(header_digest, data_digest, at_once):
    """However the bytes are cut on their way: padding, several PDUs, two commands mixed, both kinds of end."""
    host = WireHost(header_digest=header_digest, data_digest=data_digest)
    ours, _ = framings(header_digest, data_digest)
    padded = Framing(False, header_digest, data_digest, alignment=64)
    memory = [GuardedMemory(8192), GuardedMemory(4096)]
    wanted = [content(8192, 1), content(4096, 2)]
    for cid, each in enumerate(memory):
        host.start(command.read(0, 1), each.data, cid)
    host.output()
    stream = (
        c2h(0, wanted[0][:5000], framing=padded)
        + c2h(1, wanted[1][:100], framing=ours)
        + c2h(0, wanted[0][5000:], 5000, PduFlag.LAST, framing=ours)
        + c2h(1, wanted[1][100:], 100, PduFlag.LAST | PduFlag.SUCCESS, framing=padded)
        + response(0, framing=ours, cdw0=77)
    )
    assert host.feed(stream, at_once)
    found = host.completions()
    assert found["cid"].tolist() == [1, 0] and not found["status"].any()
    assert found["cdw0"].tolist() == [0, 77] and found["sqid"].tolist() == [1, 1]
    for each, content_wanted in zip(memory, wanted, strict=True):
        assert each.is_intact()
        np.testing.assert_array_equal(each.data, content_wanted)


def test_a_failed_command_needs_no_data():
    host = WireHost()
    memory = GuardedMemory(4096)
    host.start(command.read(0, 1), memory.data)
    host.output()
    assert host.feed(response(0, Status.LBA_OUT_OF_RANGE))
    assert decode(int(host.completions()["status"][0])) == Status.LBA_OUT_OF_RANGE
    assert (memory.data == 0x5A).all()


def test_a_command_that_fails_while_its_data_go():
    """The memory is the command's until the PDU on its way is out; then no further one begins."""
    host = WireHost(max_h2c_data_bytes=4096)
    host.start(command.write(0, 4), content(16384))
    host.output()
    assert host.feed(grant(0, 0, 16384))
    assert host.feed(response(0, Status.WRITE_FAULT))
    assert not len(host.completions())
    (last,) = pdus_in(host.output())
    assert len(last.data) == 4096
    assert decode(int(host.completions()["status"][0])) == Status.WRITE_FAULT


def test_fabrics_commands_move_data_as_their_type_says():
    host = WireHost(queue_id=0, in_capsule_bytes=8192)
    host.start(records.connect(0, 32), np.zeros(1024, np.uint8))
    (capsule,) = pdus_in(host.output())
    assert len(capsule.data) == 1024
    memory = GuardedMemory(64)
    host.start(records.authentication(records.FabricsType.AUTHENTICATION_RECEIVE, 64), memory.data, cid=1)
    (capsule,) = pdus_in(host.output())
    assert not capsule.data
    # of these alone the data may be shorter than their room
    assert host.feed(c2h(1, b"abcd", flags=PduFlag.LAST) + response(1))
    assert memory.is_intact() and memory.data[:5].tobytes() == b"abcdZ"


def test_no_more_than_the_queue_holds():
    host = WireHost(depth=2)
    assert [host.start(command.flush(), cid=cid) for cid in (0, 0, 1, 2)] == [0, -16, 0, -16]


def aborted(host):
    host.abort()
    return [decode(int(field)) for field in host.completions()["status"]]


# name: (what the target sends with a Read of 4096 bytes, cid 0, and a Write of 16384, cid 1, under way; fault)
HOSTILE = {
    "terminate": (
        pdu.terminate(PduType.C2H_TERMINATE, FatalPduError(pdu.FatalError.LIMIT_EXCEEDED, "")),
        lib.HOST_FAULT_TERMINATED,
    ),
    "what a host sends": (
        pdu.with_digests(pdu.capsule_commands(command.flush(), framings()[1])),
        lib.HOST_FAULT_TYPE,
    ),
    "icresp again": (
        pdu.ic_response(header_digest=False, data_digest=False, max_h2c_data_bytes=8192).tobytes(),
        lib.HOST_FAULT_TYPE,
    ),
    "no type": (b"\xff" * 24, lib.HOST_FAULT_TYPE),
    "header too long": (bytes.fromhex("05001c0018000000") + bytes(16), lib.HOST_FAULT_HEADER_LENGTH),
    "header of nothing": (bytes(2).replace(b"\0", b"\5", 1) + bytes(22), lib.HOST_FAULT_HEADER_LENGTH),
    "response with data": (bytes.fromhex("0500180018100000") + bytes(16), lib.HOST_FAULT_LENGTH),
    "digest not agreed": (bytes.fromhex("0501180018000000") + bytes(16), lib.HOST_FAULT_FLAGS),
    "data in the header": (bytes.fromhex("0704181018100000") + bytes(16), lib.HOST_FAULT_DATA_OFFSET),
    "data of no bytes": (bytes.fromhex("0704181818000000") + bytes(16), lib.HOST_FAULT_LENGTH),
    "lengths that differ": (
        bytes.fromhex("07041818 18100000 00000000 00000000 00200000 00000000") + bytes(4096),
        lib.HOST_FAULT_LENGTH,
    ),
    "4 GiB of data": (
        bytes.fromhex("07041818 ffffffff 00000000 00000000 e7ffffff 00000000"),
        lib.HOST_FAULT_DATA_RANGE,
    ),
    "terminate of a MiB": (bytes.fromhex("0300180000001000") + bytes(16), lib.HOST_FAULT_LENGTH),
    "no such command": (response(5), lib.HOST_FAULT_NO_SUCH_COMMAND),
    "the same answer twice": (response(0, 6) + response(0, 6), lib.HOST_FAULT_NO_SUCH_COMMAND),
    "data for no command": (c2h(5, bytes(512)), lib.HOST_FAULT_NO_SUCH_COMMAND),
    "data for a write": (c2h(1, bytes(512)), lib.HOST_FAULT_DATA_RANGE),
    "data behind the end": (c2h(0, bytes(4096), offset=512), lib.HOST_FAULT_DATA_RANGE),
    "too much data": (c2h(0, bytes(8192)), lib.HOST_FAULT_DATA_RANGE),
    "the same data twice": (c2h(0, bytes(512)) + c2h(0, bytes(512)), lib.HOST_FAULT_DATA_RANGE),
    "a gap": (c2h(0, bytes(512), offset=1024), lib.HOST_FAULT_DATA_RANGE),
    "offset beyond all": (c2h(0, bytes(512), offset=0xFFFFFE00), lib.HOST_FAULT_DATA_RANGE),
    "success without data": (response(0), lib.HOST_FAULT_INCOMPLETE),
    "success with half the data": (
        c2h(0, bytes(512), flags=PduFlag.LAST | PduFlag.SUCCESS),
        lib.HOST_FAULT_INCOMPLETE,
    ),
    "success that is not last": (c2h(0, bytes(4096), flags=PduFlag.SUCCESS), lib.HOST_FAULT_FLAGS),
    "written without the data": (response(1), lib.HOST_FAULT_INCOMPLETE),
    "written while the data go": (grant(1, 0, 16384) + response(1), lib.HOST_FAULT_OUT_OF_ORDER),
    "r2t for a read": (grant(0, 0, 4096), lib.HOST_FAULT_GRANT_RANGE),
    "r2t for nothing": (grant(1, 0, 0), lib.HOST_FAULT_GRANT_RANGE),
    "r2t behind the end": (grant(1, 0, 16385), lib.HOST_FAULT_GRANT_RANGE),
    "r2t with a gap": (grant(1, 512, 512), lib.HOST_FAULT_GRANT_RANGE),
    "r2t that wraps": (grant(1, 0, 0xFFFFFFFF), lib.HOST_FAULT_GRANT_RANGE),
    "two r2ts at once": (grant(1, 0, 4096) + grant(1, 4096, 4096), lib.HOST_FAULT_OUT_OF_ORDER),
    "r2t for no command": (grant(5, 0, 512), lib.HOST_FAULT_NO_SUCH_COMMAND),
}


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_target_is_found_out(name, at_once):
    """A wrong byte taken for data, or bytes of the host's memory beside the command's."""
    stream, fault = HOSTILE[name]
    host = WireHost()
    memory, written = GuardedMemory(4096), content(16384)
    host.start(command.read(0, 1), memory.data, 0)
    host.start(command.write(0, 4), written, 1)
    host.output()
    assert not host.feed(stream, at_once)
    assert host.fault == fault, host.fault_text
    assert memory.is_intact()
    assert not host.feed(response(0, 6)), "after a fault nothing is taken any more"
    before = len(host.completions())
    assert aborted(host) == [Status.ABORTED_SQ_DELETION] * (2 - before)
    assert host.output() == b""


@pytest.mark.parametrize("first", [response(0, 6), c2h(0, bytes(512)), grant(0, 0, 512)])
def test_answers_before_the_question(first):
    """Early data: for a command that the target cannot have yet."""
    host = WireHost()
    memory = GuardedMemory(16384)
    is_grant = first[0] == PduType.R2T
    host.start((command.write if is_grant else command.read)(0, 4), memory.data)
    assert len(host.first_output(70)) == 70
    assert not host.feed(first) and host.fault == lib.HOST_FAULT_OUT_OF_ORDER
    assert memory.is_intact() and (memory.data == 0x5A).all()


@pytest.mark.parametrize("which", ["header", "data"])
def test_a_wrong_digest_is_found_out(which):
    host = WireHost(header_digest=True, data_digest=True)
    host.start(command.read(0, 1), np.zeros(4096, np.uint8))
    host.output()
    stream = bytearray(c2h(0, bytes(4096), flags=PduFlag.LAST, framing=framings(True, True)[0]))
    stream[9 if which == "header" else 1000] ^= 1
    assert not host.feed(bytes(stream))
    assert host.fault == (lib.HOST_FAULT_HEADER_DIGEST if which == "header" else lib.HOST_FAULT_DATA_DIGEST)


@pytest.mark.parametrize(("header_digest", "data_digest"), DIGESTS)
def test_headers_are_judged_as_their_definition_does(header_digest, data_digest):
    """pdu.py is the definition; whatever one of the two lets pass, the other has to."""
    random = np.random.default_rng(5)
    framing = Framing(False, header_digest, data_digest, max_data_bytes=1 << 32)
    kinds = [PduType.C2H_TERMINATE, PduType.CAPSULE_RESPONSE, PduType.C2H_DATA, PduType.R2T, *range(12)]
    refused = 0
    for _ in range(4_000):
        common = np.zeros(1, pdu.COMMON_HEADER)
        common["type"] = random.choice(kinds)
        common["flags"] = random.integers(0, 8)
        common["hlen"] = random.choice([24, 24, 24, 28, 0, 128, 255])
        common["pdo"] = random.choice([0, 24, 28, 32, 30, 128, 255])
        common["plen"] = random.choice([0, 8, 24, 28, 32, 36, 152, 153, 4120, 0xFFFFFFFF])
        try:
            pdu.take_pdu(common.tobytes(), framing)
            is_taken = True
        except FatalPduError:
            is_taken = False
        host = WireHost(header_digest=header_digest, data_digest=data_digest)
        assert host.feed(common.tobytes()) == is_taken, (common, host.fault_text)
        refused += not is_taken
    assert 0 < refused < 4_000


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(seed):
    """Streams of a right target with bytes changed, cut and repeated: no byte beside a command's memory, no
    wrong data in what succeeds where digests are there, an end for every command."""
    report = fuzz(seed, num_rounds=200)
    assert report.faults and report.finished


def test_admin_opcodes_are_not_checked_as_reads():
    """Opcode 2 is Get Log Page on the admin queue."""
    assert AdminOpcode.GET_LOG_PAGE == 2
    host = WireHost(queue_id=0)
    assert host.start(command.get_log_page(2, 512), np.zeros(512, np.uint8)) == 0
    assert len(host.output()) == 72
