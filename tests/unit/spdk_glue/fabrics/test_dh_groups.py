"""The finite fields of RFC 7919."""

import random

import pytest

from spdk_glue.fabrics.authentication.dh_groups import BadPublicValue, DhGroup, KeyExchange, prime

GROUPS = [group for group in DhGroup if group is not DhGroup.NULL]
# The last bytes above the 64 bits of ones, from the RFC's appendix A.
LOW_WORDS = {
    DhGroup.FFDHE2048: 0x886B423861285C97,
    DhGroup.FFDHE3072: 0x25E41D2B66C62E37,
    DhGroup.FFDHE4096: 0xC68A007E5E655F6A,
    DhGroup.FFDHE6144: 0xA40E329CD0E40E65,
    DhGroup.FFDHE8192: 0xD68C8BB7C5C6424C,
}


@pytest.mark.parametrize("group", GROUPS, ids=lambda one: one.name)
def test_primes(group):
    """A modulus that is off by a bit has subgroups in which secrets can be guessed."""
    p = prime(group)
    assert p.bit_length() == group.num_bytes * 8
    assert p & (1 << 64) - 1 == (1 << 64) - 1 == p >> p.bit_length() - 64
    assert p >> 64 & (1 << 64) - 1 == LOW_WORDS[group]
    q = (p - 1) // 2
    assert pow(2, q, p) == 1, "2 generates the group of order q"
    if group <= DhGroup.FFDHE4096:  # the larger ones take seconds; the formula is the same
        base = random.Random(group).randrange(2, q)
        assert pow(base, p - 1, p) == 1 and pow(base, q - 1, q) == 1


@pytest.mark.parametrize("group", GROUPS, ids=lambda one: one.name)
def test_both_sides_get_one_secret(group):
    host, controller = KeyExchange(group), KeyExchange(group)
    assert host.public_value != controller.public_value
    secret = host.secret(controller.public_value)
    assert secret == controller.secret(host.public_value)
    assert len(secret) == len(host.public_value) == group.num_bytes


def test_short_secrets_are_padded():
    """One in 256 secrets begins with a zero byte; who drops it answers wrongly then."""
    group = DhGroup.FFDHE2048
    exchange = KeyExchange(group)
    exchange._exponent = 1  # so that the secret is the peer's value
    assert exchange.secret((5).to_bytes(256, "big")) == (5).to_bytes(256, "big")


@pytest.mark.parametrize("group", GROUPS, ids=lambda one: one.name)
def test_public_values_that_give_the_secret_away(group):
    """0, 1, -1 and what is not below the prime make a secret that the peer has chosen."""
    exchange, p, num_bytes = KeyExchange(group), prime(group), group.num_bytes
    for value in (0, 1, p - 1, p, p + 1, (1 << 8 * num_bytes) - 1):
        with pytest.raises(BadPublicValue):
            exchange.secret(value.to_bytes(num_bytes, "big"))
    for wrong in (b"", bytes(num_bytes - 1) + b"\5\5", bytes(num_bytes - 2) + b"\5", exchange.public_value):
        with pytest.raises(BadPublicValue):
            exchange.secret(wrong)
    assert exchange.secret((2).to_bytes(num_bytes, "big")) == exchange.public_value


def test_exponents_are_not_shown():
    exchange = KeyExchange(DhGroup.FFDHE2048)
    assert str(exchange._exponent) not in repr(exchange) and f"{exchange._exponent:x}" not in repr(exchange)
