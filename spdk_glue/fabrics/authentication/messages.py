"""The messages of DH-HMAC-CHAP, as Authentication Send and Receive carry them.

    host                                controller
      AUTH_Negotiate            ->
                                <-      Challenge
      Reply                     ->
                                <-      Success1
      Success2                  ->      (if the host wanted the controller to prove itself)

AUTH_Failure1, from the controller, and AUTH_Failure2, from the host, end it instead of any of these. Every
message is checked for its length and fields when it is parsed; what is reserved is sent as zero and not
looked at, so that later revisions of the protocol can talk to this one.

Source: NVM Express Base Specification 2.0, section 8.13.4 and 8.13.5.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np

from spdk_glue.fabrics.authentication.dh_groups import DhGroup
from spdk_glue.fabrics.authentication.keys import Hash

# Room for a Receive: more than the longest message, a Reply with SHA-512 and ffdhe8192 (1,168 bytes).
MESSAGE_BYTES_MAX = 4096


class MessageId(IntEnum):
    """auth_type << 8 | auth_id"""

    NEGOTIATE = 0x0000
    FAILURE2 = 0x00F0
    FAILURE1 = 0x00F1
    CHALLENGE = 0x0101
    REPLY = 0x0102
    SUCCESS1 = 0x0103
    SUCCESS2 = 0x0104


class FailureReason(IntEnum):
    """Reason code explanations of AUTH_Failure1 and AUTH_Failure2."""

    AUTHENTICATION_FAILED = 1
    PROTOCOL_NOT_USABLE = 2
    SECURE_CHANNEL_MISMATCH = 3
    HASH_NOT_USABLE = 4
    DH_GROUP_NOT_USABLE = 5
    INCORRECT_PAYLOAD = 6
    INCORRECT_MESSAGE = 7


class BadMessage(ValueError):
    """A message that breaks the protocol: the reason for the peer, and a short text for people."""

    def __init__(self, reason: FailureReason, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(reason, detail)


_HEADER = [("auth_type", "u1"), ("auth_id", "u1"), ("reserved0", "<u2"), ("transaction_id", "<u2")]
HEADER = np.dtype(_HEADER)
NEGOTIATE = np.dtype([*_HEADER, ("secure_channel", "u1"), ("num_protocols", "u1")])
PROTOCOL = np.dtype(
    [
        ("protocol_id", "u1"),  # PROTOCOL_DHCHAP, or one that nobody here speaks
        ("reserved", "u1"),
        ("num_hashes", "u1"),
        ("num_groups", "u1"),
        ("hashes", "u1", 30),  # by preference
        ("groups", "u1", 30),
    ]
)
CHALLENGE = np.dtype(  # then the challenge, then the public value
    [
        *_HEADER,
        ("hash_bytes", "u1"),
        ("reserved1", "u1"),
        ("hash", "u1"),
        ("group", "u1"),
        ("public_value_bytes", "<u2"),
        ("sequence_number", "<u4"),
    ]
)
REPLY = np.dtype(  # then the response, the host's own challenge (or zeros), the public value
    [
        *_HEADER,
        ("hash_bytes", "u1"),
        ("reserved1", "u1"),
        ("has_challenge", "u1"),
        ("reserved2", "u1"),
        ("public_value_bytes", "<u2"),
        ("sequence_number", "<u4"),
    ]
)
SUCCESS1 = np.dtype(  # then the response, if there is one
    [*_HEADER, ("hash_bytes", "u1"), ("reserved1", "u1"), ("has_response", "u1"), ("reserved2", "V7")]
)
SUCCESS2 = np.dtype([*_HEADER, ("reserved1", "V10")])
FAILURE = np.dtype([*_HEADER, ("reason_code", "u1"), ("explanation", "u1")])
assert [form.itemsize for form in (HEADER, NEGOTIATE, PROTOCOL, CHALLENGE)] == [6, 8, 64, 16]
assert [form.itemsize for form in (REPLY, SUCCESS1, SUCCESS2, FAILURE)] == [16, 16, 16, 8]

PROTOCOL_DHCHAP = 1
NO_SECURE_CHANNEL = 0  # SC_C: this authentication does not set up TLS
_REASON_CODE_FAILURE = 1


def _build(message_id: MessageId, form: np.dtype, transaction_id: int, **fields) -> bytes:
    record = np.zeros(1, form)
    record["auth_type"], record["auth_id"] = message_id >> 8, message_id & 0xFF
    record["transaction_id"] = transaction_id
    for name, value in fields.items():
        record[name] = value
    return record.tobytes()


def _head(message: bytes, form: np.dtype) -> np.void:
    if len(message) < form.itemsize:
        raise BadMessage(FailureReason.INCORRECT_PAYLOAD, f"a message of {len(message)} bytes is too short")
    return np.frombuffer(message, form, 1)[0]


def _tail(message: bytes, form: np.dtype, lengths: list[int], exact: bool) -> list[bytes]:
    """The fields of these lengths behind the record. exact: nothing may follow them."""
    end = form.itemsize + sum(lengths)
    if len(message) < end or (exact and len(message) > end):
        raise BadMessage(FailureReason.INCORRECT_PAYLOAD, f"a message of {len(message)} bytes, not {end}")
    fields, at = [], form.itemsize
    for length in lengths:
        fields.append(message[at : at + length])
        at += length
    return fields


def id_of(message: bytes) -> int:
    """A MessageId, or a number that is none. Raises BadMessage."""
    head = _head(message, HEADER)
    return int(head["auth_type"]) << 8 | int(head["auth_id"])


def transaction_id_of(message: bytes) -> int:
    """Raises BadMessage."""
    return int(_head(message, HEADER)["transaction_id"])


@dataclass(frozen=True)
class Negotiate:
    """What the host can do. hashes, groups: identifiers by preference, unknown ones among them."""

    transaction_id: int
    hashes: tuple[int, ...]
    groups: tuple[int, ...]
    secure_channel: int = NO_SECURE_CHANNEL

    def to_bytes(self) -> bytes:
        protocol = np.zeros(1, PROTOCOL)
        protocol["protocol_id"] = PROTOCOL_DHCHAP
        protocol["num_hashes"], protocol["num_groups"] = len(self.hashes), len(self.groups)
        protocol["hashes"][0, : len(self.hashes)] = self.hashes
        protocol["groups"][0, : len(self.groups)] = self.groups
        head = _build(
            MessageId.NEGOTIATE,
            NEGOTIATE,
            self.transaction_id,
            secure_channel=self.secure_channel,
            num_protocols=1,
        )
        return head + protocol.tobytes()

    @classmethod
    def parse(cls, message: bytes) -> Self:
        head = _head(message, NEGOTIATE)
        num_protocols = int(head["num_protocols"])
        (tail,) = _tail(message, NEGOTIATE, [num_protocols * PROTOCOL.itemsize], exact=True)
        for protocol in np.frombuffer(tail, PROTOCOL):
            if protocol["protocol_id"] == PROTOCOL_DHCHAP:
                break
        else:
            raise BadMessage(FailureReason.PROTOCOL_NOT_USABLE, "DH-HMAC-CHAP is not among its protocols")
        num_hashes, num_groups = int(protocol["num_hashes"]), int(protocol["num_groups"])
        if num_hashes > len(protocol["hashes"]) or num_groups > len(protocol["groups"]):
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, "a list that is longer than its place")
        return cls(
            int(head["transaction_id"]),
            tuple(protocol["hashes"][:num_hashes].tolist()),
            tuple(protocol["groups"][:num_groups].tolist()),
            int(head["secure_channel"]),
        )


@dataclass(frozen=True)
class Challenge:
    transaction_id: int
    hash: Hash
    group: DhGroup
    sequence_number: int  # not 0
    challenge: bytes  # as long as a digest
    public_value: bytes  # empty with DhGroup.NULL

    def to_bytes(self) -> bytes:
        head = _build(
            MessageId.CHALLENGE,
            CHALLENGE,
            self.transaction_id,
            hash_bytes=self.hash.num_bytes,
            hash=self.hash,
            group=self.group,
            public_value_bytes=len(self.public_value),
            sequence_number=self.sequence_number,
        )
        return head + self.challenge + self.public_value

    @classmethod
    def parse(cls, message: bytes) -> Self:
        head = _head(message, CHALLENGE)
        try:
            hash_, group = Hash(int(head["hash"])), DhGroup(int(head["group"]))
        except ValueError:
            detail = f"hash {head['hash']} or DH group {head['group']} is unknown"
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, detail) from None
        _check_lengths(head, hash_, group)
        if head["sequence_number"] == 0:
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, "a challenge with sequence number 0")
        tail = _tail(message, CHALLENGE, [hash_.num_bytes, group.num_bytes], exact=False)
        return cls(int(head["transaction_id"]), hash_, group, int(head["sequence_number"]), *tail)


@dataclass(frozen=True)
class Reply:
    transaction_id: int
    response: bytes
    challenge: bytes | None  # for the controller; None: it need not prove itself
    sequence_number: int  # of that challenge, not 0; else 0
    public_value: bytes

    def to_bytes(self) -> bytes:
        head = _build(
            MessageId.REPLY,
            REPLY,
            self.transaction_id,
            hash_bytes=len(self.response),
            has_challenge=self.challenge is not None,
            public_value_bytes=len(self.public_value),
            sequence_number=self.sequence_number,
        )
        return head + self.response + (self.challenge or bytes(len(self.response))) + self.public_value

    @classmethod
    def parse(cls, message: bytes, hash_: Hash, group: DhGroup) -> Self:
        """To a challenge with this hash and group."""
        head = _head(message, REPLY)
        _check_lengths(head, hash_, group)
        response, challenge, public_value = _tail(
            message, REPLY, [hash_.num_bytes, hash_.num_bytes, group.num_bytes], exact=True
        )
        has_challenge, sequence_number = int(head["has_challenge"]), int(head["sequence_number"])
        if has_challenge not in (0, 1):
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, f"challenge valid: {has_challenge}")
        if has_challenge and sequence_number == 0:
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, "a challenge with sequence number 0")
        return cls(
            int(head["transaction_id"]),
            response,
            challenge if has_challenge else None,
            sequence_number if has_challenge else 0,
            public_value,
        )


@dataclass(frozen=True)
class Success1:
    transaction_id: int
    hash_bytes: int
    response: bytes | None  # None: the host sent no challenge

    def to_bytes(self) -> bytes:
        head = _build(
            MessageId.SUCCESS1,
            SUCCESS1,
            self.transaction_id,
            hash_bytes=self.hash_bytes,  # without a response, too: Linux looks at it
            has_response=self.response is not None,
        )
        return head + (self.response or b"")

    @classmethod
    def parse(cls, message: bytes, hash_: Hash) -> Self:
        head = _head(message, SUCCESS1)
        hash_bytes, has_response = int(head["hash_bytes"]), int(head["has_response"])
        if has_response not in (0, 1):
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, f"response valid: {has_response}")
        if hash_bytes != hash_.num_bytes and (has_response or hash_bytes):
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, f"a digest of {hash_bytes} bytes")
        (response,) = _tail(message, SUCCESS1, [hash_.num_bytes if has_response else 0], exact=False)
        return cls(int(head["transaction_id"]), hash_bytes, response if has_response else None)


@dataclass(frozen=True)
class Success2:
    transaction_id: int

    def to_bytes(self) -> bytes:
        return _build(MessageId.SUCCESS2, SUCCESS2, self.transaction_id)

    @classmethod
    def parse(cls, message: bytes) -> Self:
        head = _head(message, SUCCESS2)
        _tail(message, SUCCESS2, [], exact=True)
        return cls(int(head["transaction_id"]))


@dataclass(frozen=True)
class FailureMessage:
    """AUTH_Failure1 or AUTH_Failure2. reason: None for one that is not in the specification."""

    message_id: MessageId
    transaction_id: int
    reason: FailureReason | None

    def to_bytes(self) -> bytes:
        return _build(
            self.message_id,
            FAILURE,
            self.transaction_id,
            reason_code=_REASON_CODE_FAILURE,
            explanation=self.reason,
        )

    @classmethod
    def parse(cls, message: bytes) -> Self:
        head = _head(message, FAILURE)
        message_id = MessageId(id_of(message))
        _tail(message, FAILURE, [], exact=message_id is MessageId.FAILURE2)
        explanation = int(head["explanation"])
        known = head["reason_code"] == _REASON_CODE_FAILURE and explanation in list(FailureReason)
        return cls(message_id, int(head["transaction_id"]), FailureReason(explanation) if known else None)


def _check_lengths(head: np.void, hash_: Hash, group: DhGroup) -> None:
    if head["hash_bytes"] != hash_.num_bytes:
        detail = f"a digest of {head['hash_bytes']} bytes with {hash_.algorithm}"
        raise BadMessage(FailureReason.INCORRECT_PAYLOAD, detail)
    if head["public_value_bytes"] != group.num_bytes:
        detail = f"a public value of {head['public_value_bytes']} bytes in group {group.name.lower()}"
        raise BadMessage(FailureReason.INCORRECT_PAYLOAD, detail)
