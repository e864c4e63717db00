"""The messages of DH-HMAC-CHAP, byte by byte."""

import pytest

from spdk_glue.fabrics.authentication.dh_groups import DhGroup
from spdk_glue.fabrics.authentication.keys import Hash
from spdk_glue.fabrics.authentication.messages import (
    BadMessage,
    Challenge,
    FailureMessage,
    FailureReason,
    MessageId,
    Negotiate,
    Reply,
    Success1,
    Success2,
    id_of,
)

SHA256, NULL, FFDHE2048 = Hash.SHA256, DhGroup.NULL, DhGroup.FFDHE2048
C1, C2 = b"\xc1" * 32, b"\xc2" * 32
VALUE = b"\xdd" * 256

# message, its bytes
MESSAGES = [
    (
        Negotiate(0x1234, (3, 1), (0, 5, 2)),
        bytes.fromhex("0000 0000 3412 00 01") + bytes([1, 0, 2, 3, 3, 1, *bytes(28), 0, 5, 2, *bytes(27)]),
    ),
    (
        Challenge(0x1234, SHA256, NULL, 0x11223344, C1, b""),
        bytes.fromhex("0101 0000 3412 20 00 01 00 0000 44332211") + C1,
    ),
    (
        Challenge(0x1234, SHA256, FFDHE2048, 1, C1, VALUE),
        bytes.fromhex("0101 0000 3412 20 00 01 01 0001 01000000") + C1 + VALUE,
    ),
    (
        Reply(0x1234, C1, None, 0, b""),
        bytes.fromhex("0102 0000 3412 20 00 00 00 0000 00000000") + C1 + bytes(32),
    ),
    (
        Reply(0x1234, C1, C2, 0x55667788, VALUE),
        bytes.fromhex("0102 0000 3412 20 00 01 00 0001 88776655") + C1 + C2 + VALUE,
    ),
    (Success1(0x1234, 32, None), bytes.fromhex("0103 0000 3412 20 00 00 00000000000000")),
    (Success1(0x1234, 32, C1), bytes.fromhex("0103 0000 3412 20 00 01 00000000000000") + C1),
    (Success2(0x1234), bytes.fromhex("0104 0000 3412") + bytes(10)),
    (
        FailureMessage(MessageId.FAILURE1, 0x1234, FailureReason.HASH_NOT_USABLE),
        bytes.fromhex("00f1 0000 3412 01 04"),
    ),
    (
        FailureMessage(MessageId.FAILURE2, 0x1234, FailureReason.AUTHENTICATION_FAILED),
        bytes.fromhex("00f0 0000 3412 01 01"),
    ),
]
PADDED = (Challenge, Success1)  # and AUTH_Failure1: what fills the room of a Receive


def parse(like, raw):
    if isinstance(like, Reply):
        return Reply.parse(raw, SHA256, FFDHE2048 if like.public_value else NULL)
    if isinstance(like, Success1):
        return Success1.parse(raw, SHA256)
    return type(like).parse(raw)


@pytest.mark.parametrize("message, raw", MESSAGES, ids=lambda one: type(one).__name__)
def test_bytes(message, raw):
    assert message.to_bytes() == raw
    assert parse(message, raw) == message


@pytest.mark.parametrize("message, raw", MESSAGES, ids=lambda one: type(one).__name__)
def test_every_length(message, raw):
    """A length that is not checked reads another's memory, or takes half a message for a whole one."""
    for length in range(len(raw)):
        with pytest.raises(BadMessage) as caught:
            parse(message, raw[:length])
        assert caught.value.reason is FailureReason.INCORRECT_PAYLOAD
    is_padded = isinstance(message, PADDED) or id_of(raw) == MessageId.FAILURE1
    for more in (1, 4, 4096):
        if is_padded:
            assert parse(message, raw + bytes(more)) == message
        else:
            with pytest.raises(BadMessage):
                parse(message, raw + bytes(more))


@pytest.mark.parametrize("message, raw", MESSAGES, ids=lambda one: type(one).__name__)
def test_reserved_bytes_are_not_looked_at(message, raw):
    """A peer of a later revision sets what is reserved here."""
    assert parse(message, raw[:2] + b"\xff\xff" + raw[4:]) == message


def changed(raw, at, *values):
    return raw[:at] + bytes(values) + raw[at + len(values) :]


NEGOTIATE = MESSAGES[0][1]
CHALLENGE, CHALLENGE_2048 = MESSAGES[1][1], MESSAGES[2][1]
REPLY, REPLY_2048 = MESSAGES[3][1], MESSAGES[4][1]
SUCCESS1 = MESSAGES[6][1]


@pytest.mark.parametrize(
    "raw",
    [
        changed(NEGOTIATE, 7, 2),  # one protocol more than there is
        changed(NEGOTIATE, 7, 255),
        changed(NEGOTIATE, 10, 31),  # lists longer than their place
        changed(NEGOTIATE, 11, 31),
        changed(NEGOTIATE, 10, 255),
    ],
)
def test_bad_negotiate(raw):
    with pytest.raises(BadMessage) as caught:
        Negotiate.parse(raw)
    assert caught.value.reason is FailureReason.INCORRECT_PAYLOAD


def test_protocols():
    """DH-HMAC-CHAP is found among protocols that nobody here speaks, and missed where it is not."""
    foreign = changed(NEGOTIATE[8:], 0, 2)
    both = changed(NEGOTIATE[:8], 7, 2) + foreign + NEGOTIATE[8:]
    assert Negotiate.parse(both) == MESSAGES[0][0]
    for raw in (NEGOTIATE[:8] + foreign, changed(NEGOTIATE[:8], 7, 0)):
        with pytest.raises(BadMessage) as caught:
            Negotiate.parse(raw)
        assert caught.value.reason is FailureReason.PROTOCOL_NOT_USABLE


@pytest.mark.parametrize(
    "raw",
    [
        changed(CHALLENGE, 6, 48),  # digest of another length
        changed(CHALLENGE, 6, 0),
        changed(CHALLENGE, 8, 0),  # unknown hash
        changed(CHALLENGE, 8, 4),
        changed(CHALLENGE, 8, 2),  # hash of another length
        changed(CHALLENGE, 9, 6),  # unknown group
        changed(CHALLENGE, 9, 1),  # a group without its value
        changed(CHALLENGE, 10, 4),  # a value without a group
        changed(CHALLENGE_2048, 10, 252, 0),  # a value that is too short
        changed(CHALLENGE_2048, 10, 255, 255),
        changed(CHALLENGE, 12, 0, 0, 0, 0),  # sequence number
    ],
)
def test_bad_challenge(raw):
    with pytest.raises(BadMessage):
        Challenge.parse(raw + bytes(4096))


@pytest.mark.parametrize(
    "raw, group",
    [
        (changed(REPLY, 6, 48), NULL),
        (changed(REPLY, 6, 0), NULL),
        (changed(REPLY, 8, 2), NULL),
        (changed(REPLY, 8, 1), NULL),  # a challenge with sequence number 0
        (changed(REPLY, 10, 4), NULL),
        (REPLY, FFDHE2048),
        (REPLY_2048, NULL),
        (changed(REPLY_2048, 10, 0, 0), FFDHE2048),
        (changed(REPLY_2048, 10, 255, 255), FFDHE2048),
    ],
)
def test_bad_reply(raw, group):
    with pytest.raises(BadMessage):
        Reply.parse(raw, SHA256, group)


@pytest.mark.parametrize("raw", [changed(SUCCESS1, 6, 48), changed(SUCCESS1, 6, 0), changed(SUCCESS1, 8, 2)])
def test_bad_success1(raw):
    with pytest.raises(BadMessage):
        Success1.parse(raw, SHA256)


def test_unknown_reasons():
    """A peer's reason that is not in the specification is no reason to stumble."""
    for raw in ("00f1 0000 3412 01 63", "00f1 0000 3412 02 01", "00f1 0000 3412 01 00"):
        assert FailureMessage.parse(bytes.fromhex(raw)).reason is None
