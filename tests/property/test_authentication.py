"""Whatever arrives: no authenticator raises anything, and none takes a forged proof."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_glue.fabrics.authentication import (
    ControllerAuthenticator,
    Credentials,
    DhGroup,
    Hash,
    HostAuthenticator,
    Key,
    Policy,
)
from spdk_glue.fabrics.authentication.messages import BadMessage, Challenge, MessageId, Reply, Success1, id_of

HOST_NQN, DRIVE_NQN = "nqn.2026-11.io.kvfs:host", "nqn.2026-11.io.kvfs:drive"
SHA256, NULL, FFDHE2048 = Hash.SHA256, DhGroup.NULL, DhGroup.FFDHE2048
POLICY = Policy((Hash.SHA384, SHA256), (NULL,))
CREDENTIALS = Credentials(Key.generate(SHA256), Key.generate(), POLICY)


def meaning(message, hash_, group):
    """What a message says; reserved bytes and padding say nothing."""
    parsers = {
        MessageId.CHALLENGE: Challenge.parse,
        MessageId.REPLY: lambda raw: Reply.parse(raw, hash_, group),
        MessageId.SUCCESS1: lambda raw: Success1.parse(raw, hash_),
    }
    try:
        parser = parsers.get(id_of(message))
        return parser(message) if parser else message
    except BadMessage:
        return None


class Attacker:
    """Between host and controller; sends on, changes, cuts, repeats and exchanges messages."""

    def __init__(self, random, heard):
        self.random = random
        self.heard = heard  # messages of other sessions, and of this one
        self.sent, self.arrived = {}, {}

    def forward(self, message):
        arrived = self.change(message) if self.random.random() < 0.4 else message
        self.heard.append(message)
        if len(message) >= 2 and id_of(message) not in self.sent:
            self.sent[id_of(message)], self.arrived[id_of(message)] = message, arrived
        return arrived

    def change(self, message):
        draw, length = self.random, len(message)
        kind = draw.randrange(7)
        if kind == 0 and length:  # one bit
            at = draw.randrange(8 * length)
            changed = bytearray(message)
            changed[at // 8] ^= 1 << at % 8
            return bytes(changed)
        if kind == 1 and length:  # a byte of the head, to a number that means something
            changed = bytearray(message)
            changed[draw.randrange(min(16, length))] = draw.choice(
                [0, 1, 2, 3, 4, 5, 32, 48, 64, 0xF0, 0xF1, 255]
            )
            return bytes(changed)
        if kind == 2:
            return message[: draw.randrange(length + 1)]
        if kind == 3:
            return message + draw.randbytes(draw.choice([1, 4, 64, 3000]))
        if kind == 4:
            return draw.randbytes(draw.randrange(0, 400))
        if kind == 5 and length > 16:  # the head of this, the body of another
            return message[:16] + draw.choice(self.heard or [message])[16:]
        return draw.choice(self.heard or [message])


def attack(random, heard, credentials):
    attacker = Attacker(random, heard)
    host = HostAuthenticator(HOST_NQN, DRIVE_NQN, credentials)
    drive = ControllerAuthenticator(DRIVE_NQN, HOST_NQN, credentials)
    for _ in range(8):
        if random.random() < 0.05:
            drive.receive(attacker.forward(random.choice(heard or [b""])))
        if random.random() < 0.03:
            drive.next_message(random.randrange(0, 100))
        if host.wants_to_send:
            drive.receive(attacker.forward(host.next_message()))
        elif host.wants_to_receive:
            host.receive(attacker.forward(drive.next_message()))
    return attacker, host, drive


def check(attacker, host, drive):
    """That both know what they claim to know."""

    for side in (host, drive):
        assert side.failure is None or (str(side.error()) and not side.is_authenticated)
    if not (drive.is_authenticated or host.is_authenticated):
        return
    chosen = Challenge.parse(attacker.sent[MessageId.CHALLENGE])

    def meanings(message_id):
        return [
            meaning(one[message_id], chosen.hash, chosen.group) for one in (attacker.sent, attacker.arrived)
        ]

    def intact(message_id):
        sent, arrived = meanings(message_id)
        return sent == arrived

    if drive.is_authenticated:
        reply, arrived = meanings(MessageId.REPLY)
        assert intact(MessageId.CHALLENGE) and arrived.response == reply.response
        assert arrived.public_value == reply.public_value
    if host.is_authenticated:
        assert intact(MessageId.CHALLENGE) and intact(MessageId.REPLY) and intact(MessageId.SUCCESS1)
        assert host.hash in POLICY.hashes and host.group in (NULL, FFDHE2048)


@pytest.mark.parametrize("group, num_sessions", [(NULL, 6000), (FFDHE2048, 150)], ids=["null", "ffdhe2048"])
@pytest.mark.parametrize("seed", range(3))
def test_attacked_sessions(seed, group, num_sessions):
    """One forged session that succeeds is a drive that anyone can read."""
    draw = random.Random(f"{seed} {group}")
    credentials = replace(CREDENTIALS, policy=Policy(POLICY.hashes, (group,)))
    heard, num_authenticated, num_failed = [], 0, 0
    for _ in range(num_sessions):
        attacker, host, drive = attack(draw, heard, credentials)
        check(attacker, host, drive)
        num_authenticated += host.is_authenticated and drive.is_authenticated
        num_failed += host.has_failed or drive.has_failed
        del heard[:-50]
    assert num_authenticated > num_sessions // 50 and num_failed > num_sessions // 2, (
        "the attack reaches nothing"
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=6), st.integers(0, 4096), st.booleans())
def test_any_bytes(messages, room, starts_well):
    """Bytes from nowhere end an authentication, and nothing else."""
    drive = ControllerAuthenticator(DRIVE_NQN, HOST_NQN, CREDENTIALS)
    host = HostAuthenticator(HOST_NQN, DRIVE_NQN, CREDENTIALS)
    first = host.next_message()
    if starts_well:
        drive.receive(first)
    for message in messages:
        drive.receive(message)
        assert len(drive.next_message(room)) <= room
        if host.wants_to_receive:
            host.receive(message)
        if host.wants_to_send:
            host.next_message()
    assert not drive.is_authenticated and not host.is_authenticated
