"""How a host brings up queues and controllers: which commands, in which order, what the answers mean."""

import uuid

import numpy as np
import pytest

from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.authentication import (
    AuthenticationFailed,
    ControllerAuthenticator,
    Credentials,
    DhGroup,
    Hash,
    HostAuthenticator,
    Key,
    Policy,
)
from spdk_glue.fabrics.initiator import handshake
from spdk_glue.fabrics.initiator.bring_up import (
    NEXT,
    ConnectQueue,
    EnableController,
    Names,
    ShutDownController,
    State,
)
from spdk_glue.fabrics.records import FabricsType, Property
from spdk_glue.identify import IDENTIFY_CONTROLLER
from spdk_glue.status import ConnectionRefused, Status, encode

HOST_ID = uuid.UUID(int=5)
SUBNQN = "nqn.2026-11.io.kvfs:drive"
NAMES = Names(HOST_ID, records.hostnqn_of(HOST_ID), SUBNQN)


def answer(value=0, status=0):
    completion = np.zeros(1, COMPLETION_ENTRY)
    completion["cdw0"], completion["cdw1"] = value & 0xFFFFFFFF, value >> 32
    completion["status"] = encode(status)
    return completion


def fabrics(step):
    """(type, offset of a property, value)"""
    command = step.entry.view(records.PROPERTY_COMMAND)[0]
    return int(command["fctype"]), int(command["ofst"]), int(command["value"])


def response(**fields):
    record = pdu.ic_response(header_digest=False, data_digest=False, max_h2c_data_bytes=8192)
    for name, value in fields.items():
        record[name] = value
    return record.tobytes()


def test_every_state_has_its_ways():
    assert set(NEXT) == set(State)
    assert NEXT[State.DONE] == set()


def test_the_handshake_asks_and_understands():
    asked = np.frombuffer(handshake.request(True, False), pdu.IC_REQUEST)[0]
    assert (asked["pfv"], asked["digests"], asked["maxr2t"], asked["hpda"]) == (0, 1, 0, 0)
    agreed = handshake.agree(response(digests=1, cpda=3, maxh2cdata=131072), True, False)
    assert agreed == handshake.Agreement(True, False, 16, 131072)


@pytest.mark.parametrize(
    ("received", "what"),
    [
        (b"", "not NVMe/TCP"),
        (b"HTTP/1.1 400 Bad Request\r\n" * 5, "not NVMe/TCP"),
        (bytes(128), "not NVMe/TCP"),
        (pdu.terminate(pdu.PduType.C2H_TERMINATE, pdu.FatalPduError(1, "")), "ends the connection"),
        (response(pfv=1), "version 1"),
        (response(digests=3), "digests"),
        (response(cpda=32), "cpda 32"),
        (response(maxh2cdata=0), "maxh2cdata 0"),
        (response(maxh2cdata=100), "maxh2cdata 100"),
        (response(plen=4096), "not NVMe/TCP"),
        (response()[:100], "not NVMe/TCP"),
    ],
)
def test_the_handshake_refuses(received, what):
    with pytest.raises(ConnectionRefused, match=what):
        handshake.agree(received, False, False)


def test_a_digest_that_is_wanted_is_not_done_without():
    with pytest.raises(ConnectionRefused, match="digests"):
        handshake.agree(response(), True, False)


def test_connect():
    sequence = ConnectQueue(NAMES, 0, 32, keep_alive_ms=5000)
    step = sequence.step()
    command = step.entry.view(records.CONNECT_COMMAND)[0]
    assert (command["fctype"], command["qid"], command["sqsize"], command["kato"]) == (1, 0, 31, 5000)
    assert step.data.tobytes() == records.connect_data(HOST_ID, NAMES.hostnqn, SUBNQN).tobytes()
    sequence.answered(answer(7))
    assert sequence.step() is None and sequence.cntlid == 7


def test_an_io_queue_belongs_to_its_controller():
    """Else a target attaches it to another."""
    sequence = ConnectQueue(NAMES, 3, 129, cntlid=7, keep_alive_ms=5000)
    step = sequence.step()
    assert step.data.view(records.CONNECT_DATA)["cntlid"] == 7
    assert step.entry.view(records.CONNECT_COMMAND)["kato"] == 0
    with pytest.raises(ConnectionRefused, match="identifier 0x0008"):
        sequence.answered(answer(8))


SUBNQN_AT, HOSTNQN_AT = 256 | 1 << 16, 512 | 1 << 16


@pytest.mark.parametrize(
    ("completion", "what"),
    [
        (answer(SUBNQN_AT, Status.CONNECT_INVALID_PARAMETERS), f"there is no subsystem {SUBNQN}"),
        (answer(HOSTNQN_AT, Status.CONNECT_INVALID_PARAMETERS), "is refused"),
        (answer(16 | 1 << 16, Status.CONNECT_INVALID_PARAMETERS), "connect invalid parameters"),
        (answer(0, Status.CONNECT_INVALID_HOST), "not on the target's list"),
        (answer(0, Status.CONNECT_CONTROLLER_BUSY), "in use"),
        (answer(0, Status.CONNECT_INCOMPATIBLE_FORMAT), "another version"),
        (answer(0, Status.INTERNAL_ERROR), "internal error"),
        (answer(0xFFFF), "identifier 0xffff"),
        (answer(1 | records.AUTHREQ_SECURE_CHANNEL << 16), "TLS"),
        (answer(1 | records.AUTHREQ_TRANSACTION << 16), "key-file"),
    ],
)
def test_connect_refused(completion, what):
    """One clear line, whatever it was."""
    sequence = ConnectQueue(NAMES, 0, 32)
    sequence.step()
    with pytest.raises(ConnectionRefused, match=what):
        sequence.answered(completion)


def authenticate(host_key, controller_keys, wants=True, insists=False, controller_key=None):
    """Through authentication with a controller of these credentials: (number of steps, whether it agrees)."""
    policy = Policy((Hash.SHA256,), (DhGroup.NULL,))
    host = Credentials(host_key, controller_key, policy)
    sequence = ConnectQueue(
        NAMES, 0, 32, new_authenticator=lambda: HostAuthenticator(NAMES.hostnqn, SUBNQN, host), insists=insists
    )
    controller = ControllerAuthenticator(SUBNQN, NAMES.hostnqn, Credentials(*controller_keys, policy))
    sequence.step()
    sequence.answered(answer(1 | wants << 17))
    count = 0
    while (step := sequence.step()) is not None:
        count += 1
        if fabrics(step)[0] == FabricsType.AUTHENTICATION_SEND:
            controller.receive(step.data.tobytes())
        else:
            message = controller.next_message(step.data.nbytes)
            step.data[: len(message)] = np.frombuffer(message, np.uint8)
        sequence.answered(answer())
    return count, controller.is_authenticated


def test_authentication():
    key, controllers = Key.generate(), Key.generate()
    assert authenticate(key, (key, None)) == (4, True)
    assert authenticate(key, (key, controllers), controller_key=controllers) == (5, True)


def test_a_target_that_does_not_ask_is_asked_where_it_has_to_prove_itself():
    """Anybody could pose as the target by not asking."""
    key, controllers = Key.generate(), Key.generate()
    assert authenticate(key, (key, None), wants=False) == (0, False)
    assert authenticate(key, (key, controllers), False, True, controllers) == (5, True)


def test_authentication_fails():
    with pytest.raises(AuthenticationFailed, match="the keys of the two sides differ"):
        authenticate(Key.generate(), (Key.generate(), None))
    key = Key.generate()
    with pytest.raises(AuthenticationFailed):
        authenticate(key, (key, Key.generate()), controller_key=Key.generate())


def enable(answers, wanted_queues=4):
    """(sequence, steps) of an EnableController with these completions after one another."""
    sequence, steps = EnableController(wanted_queues), []
    for completion in answers:
        step = sequence.step()
        if step is None:
            break
        steps.append(step)
        if step.data is not None:
            identity = step.data.view(IDENTIFY_CONTROLLER)
            identity["mdts"] = 5
        sequence.answered(completion)
    return sequence, steps


CAP = records.capabilities(128, 1000)


def test_enable():
    ready = answer(records.CSTS_READY)
    sequence, steps = enable([answer(CAP), answer(), answer(), answer(), ready, answer(), answer(2 | 1 << 16)])
    assert sequence.step() is None
    assert [fabrics(step)[:2] for step in steps[:5]] == [
        (FabricsType.PROPERTY_GET, Property.CAP),
        (FabricsType.PROPERTY_SET, Property.CC),
        (FabricsType.PROPERTY_GET, Property.CSTS),
        (FabricsType.PROPERTY_GET, Property.CSTS),
        (FabricsType.PROPERTY_GET, Property.CSTS),
    ]
    assert fabrics(steps[1])[2] == 0x460001
    assert [step.pause_ms > 0 for step in steps[2:5]] == [False, True, True]
    assert int(steps[6].entry["cdw11"][0]) == 3 | 3 << 16
    assert (sequence.cap, sequence.num_queues, int(sequence.identity["mdts"])) == (CAP, 2, 5)


def test_enable_refused():
    for answers, what in (
        ([answer(status=Status.INVALID_FIELD)], "capabilities failed: invalid field"),
        ([answer(CAP & ~records.CAP_NVM_COMMAND_SET)], "no I/O commands"),
        ([answer(CAP), answer(status=Status.INTERNAL_ERROR)], "enabling the controller failed"),
        ([answer(CAP), answer(), answer(records.CSTS_FATAL)], "CSTS.CFS"),
        ([answer(CAP), answer(), *[answer()] * 200], "not ready after 1000 ms"),
        ([answer(CAP), answer(), answer(status=Status.AUTHENTICATION_REQUIRED)], "authentication first"),
    ):
        with pytest.raises(ConnectionRefused, match=what):
            enable(answers)


def test_shut_down_waits_until_the_drive_is_ready():
    sequence = ShutDownController(max_wait_ms=1000)
    assert fabrics(sequence.step()) == (FabricsType.PROPERTY_SET, Property.CC, 0x464001)
    sequence.answered(answer())
    for _ in range(3):
        assert fabrics(sequence.step())[:2] == (FabricsType.PROPERTY_GET, Property.CSTS)
        sequence.answered(answer(1 | 1 << 2))
    assert sequence.step().pause_ms
    sequence.answered(answer(records.CSTS_SHUTDOWN_COMPLETE))
    assert sequence.step() is None


def test_shut_down_has_an_end():
    sequence = ShutDownController(max_wait_ms=100)
    count = 0
    while sequence.step() is not None:
        sequence.answered(answer())
        count += 1
    assert 10 <= count <= 20
