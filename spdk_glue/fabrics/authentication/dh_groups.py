"""Diffie-Hellman over the finite fields of RFC 7919: what makes a recorded exchange useless for guessing keys.

The secret of an exchange only goes into the challenge that the shared key answers, so it protects weak keys
from a listener's dictionary, and lives for one exchange.

Python's `pow` does the arithmetic. It does not run in constant time; an exponent serves two powers and is
thrown away, which leaves nothing to average over. The `cryptography` package has announced the removal of these
groups, and nothing else in Python has them.
"""

import functools
import secrets
from enum import IntEnum


class BadPublicValue(ValueError):
    """A public value that would let its sender know, or choose, the secret."""


class DhGroup(IntEnum):
    """Groups by their identifiers in messages; NULL: no exchange."""

    NULL = 0
    FFDHE2048 = 1
    FFDHE3072 = 2
    FFDHE4096 = 3
    FFDHE6144 = 4
    FFDHE8192 = 5

    @property
    def num_bytes(self) -> int:
        """Of a public value and of the secret."""
        return 0 if self is DhGroup.NULL else _PARAMETERS[self][0] // 8


# Bits of the prime, the number X that makes it a safe prime, bits of an exponent (appendix A of the RFC:
# twice the group's strength).
_PARAMETERS = {
    DhGroup.FFDHE2048: (2048, 560316, 225),
    DhGroup.FFDHE3072: (3072, 2625351, 275),
    DhGroup.FFDHE4096: (4096, 5736041, 325),
    DhGroup.FFDHE6144: (6144, 15705020, 375),
    DhGroup.FFDHE8192: (8192, 10965728, 400),
}
_GENERATOR = 2


@functools.cache
def _e_times_power_of_two(num_bits: int) -> int:
    """floor(e * 2**num_bits): the sum of 1/k!, with 64 bits more than wanted."""
    total = term = 1 << num_bits + 64
    for k in range(1, num_bits):
        term //= k
        if not term:
            break
        total += term
    return total >> 64


@functools.cache
def prime(group: DhGroup) -> int:
    """p = 2^b - 2^(b-64) + (floor(2^(b-130) e) + X) 2^64 - 1, section 3 and appendix A of the RFC."""
    bits, x, _ = _PARAMETERS[group]
    return (1 << bits) - (1 << bits - 64) + (_e_times_power_of_two(bits - 130) + x << 64) - 1


class KeyExchange:
    """One side of one exchange in a group other than NULL."""

    __slots__ = ("_exponent", "group", "public_value")

    def __init__(self, group: DhGroup):
        self.group = group
        self._exponent = 1 + secrets.randbelow((1 << _PARAMETERS[group][2]) - 1)
        public_value = pow(_GENERATOR, self._exponent, prime(group))
        self.public_value = public_value.to_bytes(group.num_bytes, "big")

    def secret(self, peer_value: bytes) -> bytes:
        """Shared with the peer. Raises BadPublicValue, also if the value is our own come back."""
        p = prime(self.group)
        value = int.from_bytes(peer_value, "big")
        if len(peer_value) != self.group.num_bytes or not 1 < value < p - 1:
            raise BadPublicValue("a public value outside the group")
        if peer_value == self.public_value:
            raise BadPublicValue("our own public value came back")
        return pow(value, self._exponent, p).to_bytes(self.group.num_bytes, "big")

    def __repr__(self) -> str:
        return f"<{self.group.name.lower()} exchange>"
