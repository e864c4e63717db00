"""DH-HMAC-CHAP: what both sides share. What each may choose, what it knows, how a challenge is answered.

The response to a challenge is an HMAC with the shared key over: the challenge (first mixed with the secret of
the DH exchange, if there was one), its sequence number, the transaction, what kind of channel this is, whose
response it is, and both names. So a response proves the key for this one challenge, this exchange, this
direction and this pair.

Source: NVM Express Base Specification 2.0, section 8.13.5.
"""

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass
from enum import Enum

from spdk_glue.fabrics.authentication.dh_groups import DhGroup
from spdk_glue.fabrics.authentication.keys import BadKey, Hash, Key
from spdk_glue.fabrics.authentication.messages import NO_SECURE_CHANNEL, FailureReason
from spdk_glue.status import NvmeError

# A group of 128 bits' strength matches the hashes; with larger ones only the time grows (Python: 14 ms a side
# for ffdhe3072, 120 ms for ffdhe8192). NULL and ffdhe2048 are for whoever asks for them.
DEFAULT_GROUPS = (DhGroup.FFDHE3072, DhGroup.FFDHE4096)
DEFAULT_HASHES = (Hash.SHA512, Hash.SHA384, Hash.SHA256)


@dataclass(frozen=True)
class Policy:
    """What may be agreed on, by preference. The controller chooses by its own; the host checks the choice."""

    hashes: tuple[Hash, ...] = DEFAULT_HASHES
    groups: tuple[DhGroup, ...] = DEFAULT_GROUPS

    def __post_init__(self):
        for name, choices in (("hash", self.hashes), ("DH group", self.groups)):
            if not choices or len(set(choices)) != len(choices):
                raise ValueError(f"a policy needs at least one {name}, none of them twice")


@dataclass(frozen=True)
class Credentials:
    """What one host and one subsystem know of each other.

    host_key: with which the host proves itself. controller_key: with which the controller does; a host that
    has it insists on that, a controller that has it can. Raises BadKey if both are one secret.
    """

    host_key: Key
    controller_key: Key | None = None
    policy: Policy = Policy()

    def __post_init__(self):
        if self.controller_key is not None and self.host_key.has_secret_of(self.controller_key):
            raise BadKey("host and controller have the same secret; each needs its own")


class Counter:
    """Sequence numbers or transaction identifiers: they follow each other from a random one, without 0.

    For any threads.
    """

    def __init__(self, num_bits: int):
        self._last = secrets.randbits(num_bits)
        self._mask = (1 << num_bits) - 1
        self._lock = threading.Lock()

    def next(self) -> int:
        with self._lock:
            self._last = self._last + 1 & self._mask or 1
            return self._last


SEQUENCE_NUMBERS = Counter(32)
TRANSACTION_IDS = Counter(16)


class Role(Enum):
    """Whose response it is, as the response says it."""

    HOST = b"HostHost"
    CONTROLLER = b"Controller"


@dataclass(frozen=True)
class Exchange:
    """What is agreed on when a challenge is answered. dh_secret: None without a DH exchange."""

    transaction_id: int
    hash: Hash
    dh_secret: bytes | None
    host_nqn: str
    subsystem_nqn: str

    def response(self, role: Role, key: Key, challenge: bytes, sequence_number: int) -> bytes:
        """The role's proof that it has the key."""
        algorithm = self.hash.algorithm
        if self.dh_secret is not None:
            mixing_key = hashlib.new(algorithm, self.dh_secret).digest()
            challenge = hmac.digest(mixing_key, challenge, algorithm)
        own, other = self.host_nqn, self.subsystem_nqn
        if role is Role.CONTROLLER:
            own, other = other, own
        text = b"".join(
            (
                challenge,
                sequence_number.to_bytes(4, "little"),
                self.transaction_id.to_bytes(2, "little"),
                bytes([NO_SECURE_CHANNEL]),
                role.value,
                own.encode(),
                b"\0",
                other.encode(),
            )
        )
        return hmac.digest(key.bound_to(own), text, algorithm)

    def __repr__(self) -> str:
        return f"<transaction {self.transaction_id} with {self.hash.algorithm}>"


@dataclass(frozen=True)
class Failure:
    """Why an authentication failed: the reason as it went over the wire, and the same for people.

    by_peer: the other side ended it. reason: None if the peer gave one that is not in the specification.
    """

    reason: FailureReason | None
    detail: str
    by_peer: bool = False

    def __str__(self) -> str:
        return self.detail


class AuthenticationFailed(NvmeError):
    """Host and controller did not prove to each other who they are: with whom, and why."""

    def __init__(self, peer_nqn: str, failure: Failure):
        self.peer_nqn = peer_nqn
        self.failure = failure
        super().__init__(peer_nqn, failure)

    def __str__(self) -> str:
        return f"authentication with {self.peer_nqn} failed: {self.failure}"


def failure_of_peer(reason: FailureReason | None, peer: str) -> Failure:
    """That a peer (host, controller) said in its AUTH_Failure message."""
    if reason is FailureReason.AUTHENTICATION_FAILED:
        detail = f"the {peer} refused: the keys of the two sides differ, or it lacks one that is asked for"
    else:
        text = reason.name.lower().replace("_", " ") if reason else "for a reason that is unknown here"
        detail = f"the {peer} refused: {text}"
    return Failure(reason, detail, by_peer=True)
