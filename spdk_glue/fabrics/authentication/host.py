"""The host's side of DH-HMAC-CHAP: a state table without I/O."""

import hmac
import secrets
from enum import Enum, auto

from spdk_glue.fabrics.authentication.dh_groups import BadPublicValue, DhGroup, KeyExchange
from spdk_glue.fabrics.authentication.dhchap import (
    SEQUENCE_NUMBERS,
    TRANSACTION_IDS,
    AuthenticationFailed,
    Counter,
    Credentials,
    Exchange,
    Failure,
    Role,
    failure_of_peer,
)
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


class HostState(Enum):
    SEND_NEGOTIATE = auto()
    AWAIT_CHALLENGE = auto()
    SEND_REPLY = auto()
    AWAIT_SUCCESS1 = auto()
    SEND_SUCCESS2 = auto()
    AUTHENTICATED = auto()
    SEND_FAILURE2 = auto()
    FAILED = auto()


S = HostState
NEXT = {  # every transition
    S.SEND_NEGOTIATE: {S.AWAIT_CHALLENGE},
    S.AWAIT_CHALLENGE: {S.SEND_REPLY, S.SEND_FAILURE2, S.FAILED},
    S.SEND_REPLY: {S.AWAIT_SUCCESS1},
    S.AWAIT_SUCCESS1: {S.SEND_SUCCESS2, S.AUTHENTICATED, S.SEND_FAILURE2, S.FAILED},
    S.SEND_SUCCESS2: {S.AUTHENTICATED},
    S.AUTHENTICATED: set(),
    S.SEND_FAILURE2: {S.FAILED},
    S.FAILED: set(),
}


class HostAuthenticator:
    """One authentication of one queue; to authenticate again, take a new one.

    While `wants_to_send`, send `next_message` by Authentication Send; while `wants_to_receive`, hand the data
    of an Authentication Receive (MESSAGE_BYTES_MAX of room) to `receive`, which does not raise, whatever the
    controller sends. When neither is so, `is_authenticated` or `has_failed` tells the outcome, and `failure`
    why; then close the connection. With a controller key in the credentials the controller must prove itself,
    too.
    """

    def __init__(
        self,
        host_nqn: str,
        subsystem_nqn: str,
        credentials: Credentials,
        transaction_ids: Counter = TRANSACTION_IDS,
        sequence_numbers: Counter = SEQUENCE_NUMBERS,
    ):
        self.host_nqn = host_nqn
        self.subsystem_nqn = subsystem_nqn
        self.state = S.SEND_NEGOTIATE
        self.failure: Failure | None = None
        self.hash: Hash | None = None
        self.group: DhGroup | None = None
        self._credentials = credentials
        self._transaction_id = transaction_ids.next()
        self._sequence_numbers = sequence_numbers
        self._reply: Reply | None = None
        self._expected: bytes | None = None  # the controller's response, if it must give one

    @property
    def wants_to_send(self) -> bool:
        return self.state in self._SENDERS

    @property
    def wants_to_receive(self) -> bool:
        return self.state in self._EXPECTED

    @property
    def is_authenticated(self) -> bool:
        return self.state is S.AUTHENTICATED

    @property
    def has_failed(self) -> bool:
        return self.state is S.FAILED

    def error(self) -> AuthenticationFailed:
        """To raise, once it has failed."""
        assert self.failure is not None
        return AuthenticationFailed(self.subsystem_nqn, self.failure)

    def next_message(self) -> bytes:
        """The data of the next Authentication Send; only while `wants_to_send`."""
        make, state = self._SENDERS[self.state]
        message = make(self)
        self._go(state)
        return message

    def receive(self, message: bytes) -> None:
        """The data of an Authentication Receive, padded or not; only while `wants_to_receive`."""
        expected, handler = self._EXPECTED[self.state]
        try:
            message_id = id_of(message)
            if message_id == MessageId.FAILURE1:
                self.failure = failure_of_peer(FailureMessage.parse(message).reason, "controller")
                self._go(S.FAILED)
                return
            if message_id != expected:
                detail = f"message {message_id:04x} came instead of {expected.name.lower()}"
                raise BadMessage(FailureReason.INCORRECT_MESSAGE, detail)
            handler(self, message)
        except BadMessage as error:
            self.failure = Failure(error.reason, error.detail)
            self._go(S.SEND_FAILURE2)

    def command_failed(self, why: str) -> None:
        """That the controller refused an Authentication command itself, or the connection ended."""
        self.failure = Failure(None, why, by_peer=True)
        self.state = S.FAILED  # from wherever it was

    # What goes.

    def _make_negotiate(self) -> bytes:
        policy = self._credentials.policy
        return Negotiate(self._transaction_id, policy.hashes, policy.groups).to_bytes()

    def _make_reply(self) -> bytes:
        return self._reply.to_bytes()

    def _make_success2(self) -> bytes:
        return Success2(self._transaction_id).to_bytes()

    def _make_failure2(self) -> bytes:
        reason = self.failure.reason or FailureReason.AUTHENTICATION_FAILED
        return FailureMessage(MessageId.FAILURE2, self._transaction_id, reason).to_bytes()

    _SENDERS = {  # noqa: RUF012 - what goes in which state, and what follows
        S.SEND_NEGOTIATE: (_make_negotiate, S.AWAIT_CHALLENGE),
        S.SEND_REPLY: (_make_reply, S.AWAIT_SUCCESS1),
        S.SEND_SUCCESS2: (_make_success2, S.AUTHENTICATED),
        S.SEND_FAILURE2: (_make_failure2, S.FAILED),
    }

    # What comes.

    def _take_challenge(self, message: bytes) -> None:
        challenge = Challenge.parse(message)
        self._check_transaction(challenge.transaction_id)
        policy = self._credentials.policy
        if challenge.hash not in policy.hashes:
            detail = f"the controller chose {challenge.hash.algorithm}, which was not offered"
            raise BadMessage(FailureReason.HASH_NOT_USABLE, detail)
        if challenge.group not in policy.groups:
            detail = f"the controller chose DH group {challenge.group.name.lower()}, which was not offered"
            raise BadMessage(FailureReason.DH_GROUP_NOT_USABLE, detail)
        self.hash, self.group = challenge.hash, challenge.group
        secret, public_value = self._exchange_keys(challenge)
        exchange = Exchange(self._transaction_id, self.hash, secret, self.host_nqn, self.subsystem_nqn)
        response = exchange.response(
            Role.HOST, self._credentials.host_key, challenge.challenge, challenge.sequence_number
        )
        own_challenge, sequence_number = None, 0
        if self._credentials.controller_key is not None:
            own_challenge, sequence_number = (
                secrets.token_bytes(self.hash.num_bytes),
                self._sequence_numbers.next(),
            )
            self._expected = exchange.response(
                Role.CONTROLLER, self._credentials.controller_key, own_challenge, sequence_number
            )
        self._reply = Reply(self._transaction_id, response, own_challenge, sequence_number, public_value)
        self._go(S.SEND_REPLY)

    def _take_success1(self, message: bytes) -> None:
        success = Success1.parse(message, self.hash)
        self._check_transaction(success.transaction_id)
        if (success.response is None) != (self._expected is None):
            detail = "the controller did not prove itself" if self._expected else "a response to no challenge"
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, detail)
        if self._expected is None:
            self._go(S.AUTHENTICATED)
        elif hmac.compare_digest(success.response, self._expected):
            self._go(S.SEND_SUCCESS2)
        else:
            raise BadMessage(FailureReason.AUTHENTICATION_FAILED, "the controller does not have its key")

    _EXPECTED = {  # noqa: RUF012 - what may come in which state, besides AUTH_Failure1
        S.AWAIT_CHALLENGE: (MessageId.CHALLENGE, _take_challenge),
        S.AWAIT_SUCCESS1: (MessageId.SUCCESS1, _take_success1),
    }

    # How it moves.

    def _exchange_keys(self, challenge: Challenge) -> tuple[bytes | None, bytes]:
        """(shared secret or None, our public value)"""
        if challenge.group is DhGroup.NULL:
            return None, b""
        key_exchange = KeyExchange(challenge.group)
        try:
            return key_exchange.secret(challenge.public_value), key_exchange.public_value
        except BadPublicValue as error:
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, str(error)) from None

    def _check_transaction(self, transaction_id: int) -> None:
        if transaction_id != self._transaction_id:
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, "a message of another transaction")

    def _go(self, state: HostState) -> None:
        assert state in NEXT[self.state], (self.state, state)
        self.state = state

    def __repr__(self) -> str:
        return f"<authentication of {self.host_nqn} to {self.subsystem_nqn}: {self.state.name.lower()}>"
