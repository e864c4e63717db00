"""DH-HMAC-CHAP: the state tables of host and controller, against each other and against recorded peers."""

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from spdk_glue.fabrics.authentication import (
    AuthenticationFailed,
    BadKey,
    ControllerAuthenticator,
    ControllerState,
    Counter,
    Credentials,
    DhGroup,
    FailureReason,
    Hash,
    HostAuthenticator,
    HostState,
    Key,
    Policy,
    dh_groups,
)
from spdk_glue.fabrics.authentication import controller as controller_table
from spdk_glue.fabrics.authentication import host as host_module
from spdk_glue.fabrics.authentication.dhchap import Exchange, Role
from spdk_glue.fabrics.authentication.messages import (
    MESSAGE_BYTES_MAX,
    Challenge,
    FailureMessage,
    MessageId,
    Negotiate,
    Reply,
    Success1,
    Success2,
    id_of,
)

HOST_NQN = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"
OTHER_NQN = "nqn.2014-08.org.nvmexpress:uuid:66666666-2222-4333-8444-555555555555"
DRIVE_NQN = "nqn.2026-11.io.kvfs:drive"
SHA256, SHA512, NULL, FFDHE2048 = Hash.SHA256, Hash.SHA512, DhGroup.NULL, DhGroup.FFDHE2048
HOST_KEY, DRIVE_KEY = Key(bytes(range(32)), SHA256), Key(bytes(range(32, 64)), SHA256)
SMALL = Policy((SHA256,), (NULL,))
ONE_WAY = Credentials(HOST_KEY, None, SMALL)
BOTH_WAYS = Credentials(HOST_KEY, DRIVE_KEY, SMALL)
EXCHANGES = json.loads(Path(__file__).with_name("exchanges_with_spdk.json").read_text())
R = FailureReason


def pair(host_credentials=BOTH_WAYS, drive_credentials=None, host_nqn=HOST_NQN, claimed_nqn=HOST_NQN):
    """(host, controller); claimed_nqn: what the host said in its Connect."""
    return (
        HostAuthenticator(host_nqn, DRIVE_NQN, host_credentials),
        ControllerAuthenticator(DRIVE_NQN, claimed_nqn, drive_credentials or host_credentials),
    )


def run(host, drive, on_the_way=lambda message: message):
    """Every message of both sides, as it was sent, until neither has more to say."""
    said = []
    while host.wants_to_send or host.wants_to_receive:
        if host.wants_to_send:
            said.append(host.next_message())
            drive.receive(on_the_way(said[-1]))
        else:
            said.append(drive.next_message())
            host.receive(on_the_way(said[-1]))
    return said


def assert_failed(host, drive, reason, found_by):
    """found_by: the side that saw what was wrong, the other was told."""
    assert host.has_failed and drive.has_failed
    assert not host.is_authenticated and not drive.is_authenticated
    assert host.failure.reason == drive.failure.reason == reason
    assert host.failure.by_peer == (found_by is drive) and drive.failure.by_peer == (found_by is host)
    for side in (host, drive):
        assert isinstance(side.error(), AuthenticationFailed) and "\n" not in str(side.error())


@pytest.mark.parametrize("credentials", [ONE_WAY, BOTH_WAYS], ids=["host", "both"])
@pytest.mark.parametrize("group", DhGroup, ids=lambda one: one.name)
@pytest.mark.parametrize("hash_", Hash, ids=lambda one: one.name)
def test_authentication(hash_, group, credentials):
    sides = pair(replace(credentials, policy=Policy((hash_,), (group,))))
    said = run(*sides)
    assert all(side.is_authenticated and side.failure is None for side in sides)
    assert all((side.hash, side.group) == (hash_, group) for side in sides)
    assert [id_of(message) for message in said] == [0x0000, 0x0101, 0x0102, 0x0103, 0x0104][: len(said)]
    assert len(said) == (5 if credentials is BOTH_WAYS else 4)
    assert max(map(len, said)) <= MESSAGE_BYTES_MAX


class Replayed:
    """`secrets` that give what was drawn when an exchange was recorded."""

    def __init__(self, *drawn):
        self.drawn = list(drawn)

    def token_bytes(self, num_bytes):
        found = self.drawn.pop(0)
        assert len(found) == num_bytes
        return found

    def randbelow(self, _):
        return self.drawn.pop(0) - 1

    def next(self):
        return self.drawn.pop(0)


@pytest.mark.parametrize("recorded", EXCHANGES, ids=lambda one: f"{one['hash']}-{one['group']}")
def test_recorded_exchanges(recorded, monkeypatch):
    """The very bytes that SPDK's target took for proof, and those with which it gave its own."""
    negotiate, challenge, reply, success1, success2 = (bytes.fromhex(one) for one in recorded["messages"])
    hash_, group = Hash[recorded["hash"]], DhGroup[recorded["group"]]
    parsed = Reply.parse(reply, hash_, group)
    credentials = Credentials(
        Key.parse(recorded["host_key"]), Key.parse(recorded["controller_key"]), Policy((hash_,), (group,))
    )
    names = recorded["host_nqn"], recorded["subsystem_nqn"]
    if group is not NULL:
        monkeypatch.setattr(dh_groups, "secrets", Replayed(int(recorded["exponent"], 16)))
    monkeypatch.setattr(host_module, "secrets", Replayed(parsed.challenge))
    authenticator = HostAuthenticator(
        *names, credentials, Replayed(parsed.transaction_id), Replayed(parsed.sequence_number)
    )
    assert authenticator.next_message() == negotiate
    authenticator.receive(challenge + bytes(MESSAGE_BYTES_MAX - len(challenge)))
    assert authenticator.next_message() == reply
    authenticator.receive(success1)
    assert authenticator.next_message() == success2
    assert authenticator.is_authenticated


def test_policy_of_the_controller_decides():
    """The order of what the host offers must not lead to its weakest."""
    offer = Policy((SHA256, Hash.SHA384, SHA512), (NULL, FFDHE2048))
    choice = Policy((SHA512, SHA256), (FFDHE2048, NULL))
    sides = pair(replace(ONE_WAY, policy=offer), replace(ONE_WAY, policy=choice))
    run(*sides)
    assert sides[0].hash is SHA512 and sides[0].group is FFDHE2048


def test_defaults_have_a_dh_exchange():
    policy = Credentials(HOST_KEY).policy
    assert NULL not in policy.groups and FFDHE2048 not in policy.groups and set(policy.hashes) == set(Hash)


# Every kind of failure.


def test_wrong_host_key():
    host, drive = pair(replace(BOTH_WAYS, host_key=Key.generate()), BOTH_WAYS)
    run(host, drive)
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, drive)


def test_wrong_controller_key():
    """A false target gets no further than the host's reply."""
    host, drive = pair(BOTH_WAYS, replace(BOTH_WAYS, controller_key=Key.generate()))
    run(host, drive)
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, host)


def test_controller_without_key():
    host, drive = pair(BOTH_WAYS, ONE_WAY)
    run(host, drive)
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, drive)


@pytest.mark.parametrize("transform", [None, SHA512])
def test_same_secret_bound_in_another_way(transform):
    host, drive = pair(ONE_WAY, replace(ONE_WAY, host_key=Key(bytes(range(32)), transform)))
    run(host, drive)
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, drive)


@pytest.mark.parametrize("key", [HOST_KEY, Key(bytes(range(32)))], ids=["bound", "not bound"])
def test_key_under_another_name(key):
    """Host A's key does not open what host B may, whether the key is bound to a name or not."""
    credentials = replace(ONE_WAY, host_key=key)
    host, drive = pair(credentials, host_nqn=OTHER_NQN)
    run(host, drive)
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, drive)


def test_no_common_hash():
    host, drive = pair(ONE_WAY, replace(ONE_WAY, policy=Policy((SHA512,), (NULL,))))
    run(host, drive)
    assert_failed(host, drive, R.HASH_NOT_USABLE, drive)


def test_no_common_group():
    host, drive = pair(ONE_WAY, replace(ONE_WAY, policy=Policy((SHA256,), (FFDHE2048,))))
    run(host, drive)
    assert_failed(host, drive, R.DH_GROUP_NOT_USABLE, drive)


@pytest.mark.parametrize("wanted", [1, 2, 255])
def test_secure_channel(wanted):
    """A host that wants TLS set up, and is told that it has got it."""
    host, drive = pair(ONE_WAY)

    def ask(message):
        return message[:6] + bytes([wanted]) + message[7:] if id_of(message) == MessageId.NEGOTIATE else message

    run(host, drive, ask)
    assert_failed(host, drive, R.SECURE_CHANNEL_MISMATCH, drive)


def test_unknown_protocol():
    host, drive = pair(ONE_WAY)

    def other(message):
        return message[:8] + b"\x02" + message[9:] if id_of(message) == MessageId.NEGOTIATE else message

    run(host, drive, other)
    assert_failed(host, drive, R.PROTOCOL_NOT_USABLE, drive)


def tampering(message_id, **fields):
    """On the way, what parses as this message has other fields."""
    kinds = {
        MessageId.CHALLENGE: Challenge.parse,
        MessageId.REPLY: lambda raw: Reply.parse(raw, SHA256, NULL if len(raw) == 80 else FFDHE2048),
        MessageId.SUCCESS1: lambda raw: Success1.parse(raw, SHA256),
        MessageId.SUCCESS2: Success2.parse,
        MessageId.FAILURE2: FailureMessage.parse,
    }

    def on_the_way(message):
        if id_of(message) != message_id:
            return message
        return replace(kinds[message_id](message), **fields).to_bytes()

    return on_the_way


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"hash": Hash.SHA384, "challenge": bytes(48)}, R.HASH_NOT_USABLE),
        ({"hash": SHA512, "challenge": bytes(64)}, R.HASH_NOT_USABLE),
        ({"group": NULL, "public_value": b""}, R.DH_GROUP_NOT_USABLE),
        ({"public_value": bytes(256)}, R.INCORRECT_PAYLOAD),
        ({"public_value": bytes(255) + b"\1"}, R.INCORRECT_PAYLOAD),
        ({"public_value": b"\xff" * 256}, R.INCORRECT_PAYLOAD),
        ({"transaction_id": 0}, R.INCORRECT_PAYLOAD),
    ],
)
def test_challenges_that_a_host_refuses(fields, reason):
    """Weaker than configured, degenerate, or of another transaction: the host does not answer at all."""
    credentials = replace(BOTH_WAYS, policy=Policy((SHA256,), (FFDHE2048,)))
    host, drive = pair(credentials)
    said = run(host, drive, tampering(MessageId.CHALLENGE, **fields))
    assert host.has_failed and not host.failure.by_peer and host.failure.reason is reason
    assert MessageId.REPLY not in [id_of(message) for message in said]
    assert drive.has_failed


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"transaction_id": 0}, R.INCORRECT_PAYLOAD),
        ({"public_value": bytes(256)}, R.INCORRECT_PAYLOAD),
        ({"public_value": dh_groups.prime(FFDHE2048).to_bytes(256, "big")}, R.INCORRECT_PAYLOAD),
        ({"public_value": (4).to_bytes(256, "big")}, R.AUTHENTICATION_FAILED),  # of a man in the middle
        ({"response": bytes(32)}, R.AUTHENTICATION_FAILED),
    ],
)
def test_replies_that_a_controller_refuses(fields, reason):
    host, drive = pair(replace(BOTH_WAYS, policy=Policy((SHA256,), (FFDHE2048,))))
    run(host, drive, tampering(MessageId.REPLY, **fields))
    assert_failed(host, drive, reason, drive)


@pytest.mark.parametrize("fields", [{"challenge": bytes(32)}, {"sequence_number": 7}])
def test_challenges_of_the_host_that_were_changed(fields):
    """The controller answers another challenge than the host's; the host takes only its own."""
    host, drive = pair(BOTH_WAYS)
    run(host, drive, tampering(MessageId.REPLY, **fields))
    assert_failed(host, drive, R.AUTHENTICATION_FAILED, host)


def test_challenge_of_the_host_taken_away():
    """A man in the middle who lets the controller prove nothing gets a host that leaves."""
    host, drive = pair(BOTH_WAYS)
    run(host, drive, tampering(MessageId.REPLY, challenge=None, sequence_number=0))
    assert host.has_failed and host.failure.reason is R.INCORRECT_PAYLOAD
    assert drive.has_failed


@pytest.mark.parametrize(
    "fields",
    [{"response": None}, {"transaction_id": 0}, {"response": b"\1" * 32}, {"response": bytes(32)}],
)
def test_successes_that_a_host_refuses(fields):
    host, drive = pair(BOTH_WAYS)
    run(host, drive, tampering(MessageId.SUCCESS1, **fields))
    assert host.has_failed and not host.failure.by_peer and drive.has_failed


def test_response_that_nobody_asked_for():
    host, drive = pair(ONE_WAY)
    run(host, drive, tampering(MessageId.SUCCESS1, response=bytes(32)))
    assert host.has_failed and host.failure.reason is R.INCORRECT_PAYLOAD


@pytest.mark.parametrize("message_id", [MessageId.SUCCESS2, MessageId.FAILURE2])
def test_end_of_another_transaction(message_id):
    """A stray Success2 would enable a queue that the host is about to give up."""
    drive_credentials = BOTH_WAYS
    if message_id is MessageId.FAILURE2:
        drive_credentials = replace(BOTH_WAYS, controller_key=Key.generate())
    host, drive = pair(BOTH_WAYS, drive_credentials)
    run(host, drive, tampering(message_id, transaction_id=0))
    assert not drive.is_authenticated and drive.failure.reason is R.INCORRECT_PAYLOAD
    assert id_of(drive.next_message()) == MessageId.FAILURE1 and drive.has_failed


# Replay and reflection.


def test_replayed_session():
    """Who has listened to a whole authentication cannot repeat it."""
    said = run(*pair(BOTH_WAYS))
    _, drive = pair(BOTH_WAYS)
    for message in said[0], said[2]:
        drive.receive(message)
        drive.next_message()
    assert drive.has_failed and drive.failure.reason is R.AUTHENTICATION_FAILED
    host, _ = pair(BOTH_WAYS)
    host.next_message()
    host.receive(said[1])
    assert host.state is HostState.SEND_FAILURE2  # another transaction
    host = HostAuthenticator(HOST_NQN, DRIVE_NQN, BOTH_WAYS, Replayed(Success2.parse(said[4]).transaction_id))
    host.next_message()
    host.receive(said[1])
    host.next_message()
    host.receive(said[3])
    assert host.state is HostState.SEND_FAILURE2 and host.failure.reason is R.AUTHENTICATION_FAILED


def test_second_transaction_of_a_connection_takes_no_old_reply():
    host, drive = pair(ONE_WAY)
    said = run(host, drive)
    drive.receive(said[0])
    challenge = drive.next_message()
    assert challenge[16:] != said[1][16:] and Challenge.parse(challenge) != Challenge.parse(said[1])
    drive.receive(said[2])
    assert not drive.is_authenticated and drive.failure.reason is R.AUTHENTICATION_FAILED


def test_reflected_challenge():
    """A false host that sends the controller's challenge back, to be given the answer."""
    host, drive = pair(BOTH_WAYS)
    drive.receive(host.next_message())
    challenge = drive.next_message()
    host.receive(challenge)
    reply = replace(
        Reply.parse(host.next_message(), SHA256, NULL),
        challenge=Challenge.parse(challenge).challenge,
        sequence_number=Challenge.parse(challenge).sequence_number,
    )
    drive.receive(reply.to_bytes())
    assert drive.failure.reason is R.AUTHENTICATION_FAILED and drive.next_message() and drive.has_failed


def test_answers_of_the_two_sides_differ():
    """Even with one secret for both, a controller's answer is no host's."""
    exchange = Exchange(1, SHA256, None, HOST_NQN, HOST_NQN)
    answers = {exchange.response(role, HOST_KEY, bytes(32), 1) for role in Role}
    assert len(answers) == 2
    with pytest.raises(BadKey):
        Credentials(HOST_KEY, Key(bytes(range(32)), SHA512))


@pytest.mark.parametrize(
    "fields",
    [
        {"transaction_id": 2},
        {"hash": SHA512},
        {"dh_secret": bytes(256)},
        {"host_nqn": OTHER_NQN},
        {"subsystem_nqn": OTHER_NQN},
    ],
)
def test_everything_agreed_on_is_in_the_answer(fields):
    exchange = Exchange(1, SHA256, None, HOST_NQN, DRIVE_NQN)
    other = replace(exchange, **fields)
    for role in Role:
        answers = {one.response(role, HOST_KEY, bytes(32), 1) for one in (exchange, other)}
        answers |= {exchange.response(role, HOST_KEY, bytes(31) + b"\1", 1)}
        answers |= {exchange.response(role, HOST_KEY, bytes(32), 2)}
        assert len(answers) == 4


# Order.


def controllers():
    """A controller in each state, by a host's own messages."""
    for num_steps in range(7):
        host, drive = pair(BOTH_WAYS)
        for _ in range(num_steps):
            if host.wants_to_send:
                drive.receive(host.next_message())
            elif host.wants_to_receive:
                host.receive(drive.next_message())
        yield host, drive
    for step in range(2):
        host, drive = pair(BOTH_WAYS)
        drive.receive(b"")
        if step:
            drive.next_message()
        yield host, drive


def every_message(transaction_id):
    yield Negotiate(transaction_id, (SHA256,), (NULL,)).to_bytes()
    yield Challenge(transaction_id, SHA256, NULL, 1, bytes(32), b"").to_bytes()
    yield Reply(transaction_id, bytes(32), bytes(32), 1, b"").to_bytes()
    yield Success1(transaction_id, 32, bytes(32)).to_bytes()
    yield Success2(transaction_id).to_bytes()
    for message_id in (MessageId.FAILURE1, MessageId.FAILURE2):
        yield FailureMessage(message_id, transaction_id, R.HASH_NOT_USABLE).to_bytes()
    yield bytes.fromhex("0163 0000 0000") + bytes(60)
    yield bytes.fromhex("7700 0000 0000") + bytes(60)


NUM_MESSAGES = len(list(every_message(0)))
GOES_ON = {
    (ControllerState.AWAIT_NEGOTIATE, MessageId.NEGOTIATE): ControllerState.SEND_CHALLENGE,
    (ControllerState.AUTHENTICATED, MessageId.NEGOTIATE): ControllerState.SEND_CHALLENGE,
    (ControllerState.AWAIT_REPLY, MessageId.FAILURE2): ControllerState.FAILED,
    (ControllerState.AWAIT_SUCCESS2, MessageId.FAILURE2): ControllerState.FAILED,
    (ControllerState.AUTHENTICATED, MessageId.FAILURE2): ControllerState.FAILED,
    (ControllerState.AWAIT_SUCCESS2, MessageId.SUCCESS2): ControllerState.AUTHENTICATED,
}


def test_every_message_in_every_state_of_the_controller():
    """One message out of order that is let through is a way around the rest."""
    seen = set()
    for number in range(NUM_MESSAGES):
        for peer, drive in controllers():
            message, before = list(every_message(peer._transaction_id))[number], drive.state
            was_authenticated = drive.is_authenticated
            drive.receive(message)
            seen.add(before)
            expected = GOES_ON.get((before, id_of(message)), ControllerState.SEND_FAILURE1)
            if before in (ControllerState.SEND_FAILURE1, ControllerState.FAILED):
                expected = before
            assert drive.state is expected, (before, message.hex())
            assert drive.state is before or drive.state in controller_table.NEXT[before]
            proven = before is ControllerState.AWAIT_SUCCESS2 or was_authenticated
            assert not drive.is_authenticated or proven
    assert seen == set(ControllerState)


def test_every_message_in_every_state_of_the_host():
    expected = {HostState.AWAIT_CHALLENGE: MessageId.CHALLENGE, HostState.AWAIT_SUCCESS1: MessageId.SUCCESS1}
    for state, wanted in expected.items():
        for number in range(NUM_MESSAGES):
            host, drive = pair(BOTH_WAYS)
            drive.receive(host.next_message())
            if state is HostState.AWAIT_SUCCESS1:
                host.receive(drive.next_message())
                drive.receive(host.next_message())
            assert host.state is state
            message = list(every_message(host._transaction_id))[number]
            host.receive(message)
            if id_of(message) == MessageId.FAILURE1:
                assert host.has_failed and host.failure.by_peer
            elif id_of(message) == wanted == MessageId.CHALLENGE:
                assert host.state is HostState.SEND_REPLY
            else:
                assert host.state is HostState.SEND_FAILURE2
                assert id_of(host.next_message()) == MessageId.FAILURE2 and host.has_failed
            assert not host.is_authenticated


@pytest.mark.parametrize("num_steps", range(6))
def test_messages_asked_for_out_of_order(num_steps):
    """A Receive while it is the host's turn ends it; so does a second one for the same message."""
    host, drive = pair(BOTH_WAYS)
    for _ in range(num_steps):
        if host.wants_to_send:
            drive.receive(host.next_message())
        elif host.wants_to_receive:
            host.receive(drive.next_message())
    if drive.state in (ControllerState.SEND_CHALLENGE, ControllerState.SEND_SUCCESS1):
        drive.next_message()
    assert id_of(drive.next_message()) == MessageId.FAILURE1
    assert drive.has_failed and drive.failure.reason is R.INCORRECT_MESSAGE and not drive.is_authenticated
    assert id_of(drive.next_message()) == MessageId.FAILURE1, "and again, for who asks again"


@pytest.mark.parametrize("room", [0, 1, 7, 8, 47, 48, 1000])
def test_room_for_a_message(room):
    """Never more bytes than the host has room for, and no half challenge."""
    host, drive = pair(BOTH_WAYS)
    drive.receive(host.next_message())
    message = drive.next_message(room)
    assert len(message) <= room
    if room >= 48:
        assert id_of(message) == MessageId.CHALLENGE
    else:
        assert drive.has_failed and drive.failure.reason is R.INCORRECT_PAYLOAD
        assert len(message) == min(room, 8)


# Again while connected.


def test_again():
    """Commands go on while keys are exchanged for new ones."""
    host, drive = pair(BOTH_WAYS)
    run(host, drive)
    for _ in range(3):
        again = HostAuthenticator(HOST_NQN, DRIVE_NQN, BOTH_WAYS)
        drive.receive(again.next_message())
        assert drive.is_authenticated and drive.in_progress
        again.receive(drive.next_message())
        drive.receive(again.next_message())
        assert drive.is_authenticated
        again.receive(drive.next_message())
        drive.receive(again.next_message())
        assert drive.is_authenticated and again.is_authenticated and not drive.in_progress


def test_again_with_a_wrong_key():
    """Who cannot repeat the proof does not keep the queue."""
    host, drive = pair(BOTH_WAYS)
    run(host, drive)
    again = HostAuthenticator(HOST_NQN, DRIVE_NQN, replace(BOTH_WAYS, host_key=Key.generate()))
    run(again, drive)
    assert_failed(again, drive, R.AUTHENTICATION_FAILED, drive)
    third = HostAuthenticator(HOST_NQN, DRIVE_NQN, BOTH_WAYS)
    drive.receive(third.next_message())
    assert drive.has_failed and not drive.is_authenticated, "there is no second try on a connection"


# What is not shown, and what never repeats.


def test_secrets_are_not_shown():
    """Objects that end up in logs hold keys and exchanges."""
    host, drive = pair(replace(BOTH_WAYS, policy=Policy((SHA256,), (FFDHE2048,))))
    run(host, drive)
    shown = repr(host) + repr(drive) + repr(BOTH_WAYS) + repr(Exchange(1, SHA256, b"secret", "a", "b"))
    for secret in (HOST_KEY, DRIVE_KEY):
        assert secret.standard_form() not in shown and repr(secret._secret) not in shown
    assert "secret" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(BOTH_WAYS)


def test_counters():
    """Sequence number 0 means that there is none."""
    counter = Counter(2)
    numbers = [counter.next() for _ in range(9)]
    assert set(numbers) == {1, 2, 3}
    assert all(one != other for one, other in itertools.pairwise(numbers))
    assert len({Counter(32).next() for _ in range(50)}) == 50


def test_challenges_never_repeat():
    _, drive = pair(ONE_WAY)
    seen = []
    for _ in range(20):
        said = run(HostAuthenticator(HOST_NQN, DRIVE_NQN, ONE_WAY), drive)
        seen.append(Challenge.parse(said[1]))
    assert len({one.challenge for one in seen}) == len({one.sequence_number for one in seen}) == 20
    assert len({one.transaction_id for one in seen}) == 20


def test_policies():
    for hashes, groups in [((), (NULL,)), ((SHA256,), ()), ((SHA256, SHA256), (NULL,))]:
        with pytest.raises(ValueError):
            Policy(hashes, groups)


def test_commands_that_fail():
    """A target that has no authentication, or ends the connection."""
    host, _ = pair(ONE_WAY)
    host.next_message()
    host.command_failed("invalid opcode")
    assert host.has_failed and not (host.wants_to_send or host.wants_to_receive)
    assert "invalid opcode" in str(host.error())
