"""The controller's side of DH-HMAC-CHAP: a state table without I/O."""

import hmac
import secrets
from enum import Enum, auto

from spdk_glue.fabrics.authentication.dh_groups import BadPublicValue, DhGroup, KeyExchange
from spdk_glue.fabrics.authentication.dhchap import (
    SEQUENCE_NUMBERS,
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
    MESSAGE_BYTES_MAX,
    NO_SECURE_CHANNEL,
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
    transaction_id_of,
)


class ControllerState(Enum):
    AWAIT_NEGOTIATE = auto()
    SEND_CHALLENGE = auto()
    AWAIT_REPLY = auto()
    SEND_SUCCESS1 = auto()
    AWAIT_SUCCESS2 = auto()
    AUTHENTICATED = auto()
    SEND_FAILURE1 = auto()
    FAILED = auto()


S = ControllerState
NEXT = {  # every transition
    S.AWAIT_NEGOTIATE: {S.SEND_CHALLENGE, S.SEND_FAILURE1, S.FAILED},
    S.SEND_CHALLENGE: {S.AWAIT_REPLY, S.SEND_FAILURE1, S.FAILED},
    S.AWAIT_REPLY: {S.SEND_SUCCESS1, S.SEND_FAILURE1, S.FAILED},
    S.SEND_SUCCESS1: {S.AWAIT_SUCCESS2, S.AUTHENTICATED, S.SEND_FAILURE1, S.FAILED},
    S.AWAIT_SUCCESS2: {S.AUTHENTICATED, S.SEND_FAILURE1, S.FAILED},
    S.AUTHENTICATED: {S.SEND_CHALLENGE, S.SEND_FAILURE1, S.FAILED},  # the host may authenticate again
    S.SEND_FAILURE1: {S.FAILED},
    S.FAILED: set(),
}


class ControllerAuthenticator:
    """One queue's authentication, from after its Connect until the queue is gone.

    Hand it the data of each Authentication Send with `receive`, answer each Authentication Receive with
    `next_message`; neither raises, whatever the host sends. While `is_authenticated` is false, nothing but
    these two commands may be served on the queue. As soon as `has_failed`, close the connection, after the
    completion of the command in hand; `failure` says why. Who closes it when the host falls silent is the
    caller's timer: while `in_progress`, the keep-alive timeout, or 2 minutes without one.
    """

    def __init__(
        self,
        subsystem_nqn: str,
        host_nqn: str,
        credentials: Credentials,
        sequence_numbers: Counter = SEQUENCE_NUMBERS,
    ):
        self.subsystem_nqn = subsystem_nqn
        self.host_nqn = host_nqn
        self.state = S.AWAIT_NEGOTIATE
        self.failure: Failure | None = None
        self.is_authenticated = False  # stays true while the host authenticates again
        self._credentials = credentials
        self._sequence_numbers = sequence_numbers
        self.hash: Hash | None = None  # chosen last
        self.group: DhGroup | None = None
        self._transaction_id = 0
        self._forget()

    def _forget(self) -> None:
        """What one transaction knows."""
        self._key_exchange: KeyExchange | None = None
        self._challenge: Challenge | None = None
        self._response: bytes | None = None

    @property
    def has_failed(self) -> bool:
        return self.state is S.FAILED

    @property
    def in_progress(self) -> bool:
        return self.state not in (S.AUTHENTICATED, S.FAILED)

    def error(self) -> AuthenticationFailed:
        """For a log, once it has failed or is about to."""
        assert self.failure is not None
        return AuthenticationFailed(self.host_nqn, self.failure)

    def receive(self, message: bytes) -> None:
        """The data of an Authentication Send; its completion is always success."""
        if self.state in (S.FAILED, S.SEND_FAILURE1):
            return  # the host will see what was wrong first
        try:
            handler = self._EXPECTED.get(self.state, {}).get(id_of(message))
            if handler is None:
                detail = f"message {id_of(message):04x} came while the state was {self.state.name.lower()}"
                raise BadMessage(FailureReason.INCORRECT_MESSAGE, detail)
            handler(self, message)
        except BadMessage as error:
            self._fail(error.reason, error.detail)

    def next_message(self, num_bytes_max: int = MESSAGE_BYTES_MAX) -> bytes:
        """The answer to an Authentication Receive with so much room; never longer than that."""
        if self.state in self._SENDERS:
            make, sent = self._SENDERS[self.state]
            message = make(self)
            if len(message) <= num_bytes_max:
                sent(self)
                return message
            self._fail(FailureReason.INCORRECT_PAYLOAD, f"room for {num_bytes_max} bytes is not enough")
        elif self.state not in (S.SEND_FAILURE1, S.FAILED):
            detail = f"the host wanted a message while the state was {self.state.name.lower()}"
            self._fail(FailureReason.INCORRECT_MESSAGE, detail)
        if not self.has_failed:
            self._go(S.FAILED)
        reason = self.failure.reason or FailureReason.AUTHENTICATION_FAILED
        return FailureMessage(MessageId.FAILURE1, self._transaction_id, reason).to_bytes()[:num_bytes_max]

    # What comes.

    def _take_negotiate(self, message: bytes) -> None:
        self._transaction_id = transaction_id_of(message)
        offer = Negotiate.parse(message)
        if offer.secure_channel != NO_SECURE_CHANNEL:
            raise BadMessage(FailureReason.SECURE_CHANNEL_MISMATCH, "the host wants TLS to be set up")
        policy = self._credentials.policy
        self.hash = next((hash_ for hash_ in policy.hashes if hash_ in offer.hashes), None)
        if self.hash is None:
            raise BadMessage(FailureReason.HASH_NOT_USABLE, "the host offers no hash that is allowed here")
        self.group = next((group for group in policy.groups if group in offer.groups), None)
        if self.group is None:
            detail = "the host offers no DH group that is allowed here"
            raise BadMessage(FailureReason.DH_GROUP_NOT_USABLE, detail)
        self._go(S.SEND_CHALLENGE)

    def _take_reply(self, message: bytes) -> None:
        reply = Reply.parse(message, self.hash, self.group)
        self._check_transaction(reply.transaction_id)
        exchange = self._exchange(reply.public_value)
        challenge = self._challenge
        expected = exchange.response(
            Role.HOST, self._credentials.host_key, challenge.challenge, challenge.sequence_number
        )
        if not hmac.compare_digest(reply.response, expected):
            raise BadMessage(FailureReason.AUTHENTICATION_FAILED, "the host does not have its key")
        if reply.challenge is not None:
            if reply.challenge == challenge.challenge:
                detail = "the controller's own challenge came back"
                raise BadMessage(FailureReason.AUTHENTICATION_FAILED, detail)
            key = self._credentials.controller_key
            if key is None:
                detail = "the host wants the controller to prove itself, which has no key for that"
                raise BadMessage(FailureReason.AUTHENTICATION_FAILED, detail)
            self._response = exchange.response(Role.CONTROLLER, key, reply.challenge, reply.sequence_number)
        self._go(S.SEND_SUCCESS1)

    def _take_success2(self, message: bytes) -> None:
        self._check_transaction(Success2.parse(message).transaction_id)
        self._succeed()

    def _take_failure2(self, message: bytes) -> None:
        failure = FailureMessage.parse(message)
        self._check_transaction(failure.transaction_id)
        self.failure = failure_of_peer(failure.reason, "host")
        self._go(S.FAILED)

    _EXPECTED = {  # noqa: RUF012 - what may come in which state
        S.AWAIT_NEGOTIATE: {MessageId.NEGOTIATE: _take_negotiate},
        S.AWAIT_REPLY: {MessageId.REPLY: _take_reply, MessageId.FAILURE2: _take_failure2},
        S.AWAIT_SUCCESS2: {MessageId.SUCCESS2: _take_success2, MessageId.FAILURE2: _take_failure2},
        # the host may authenticate again, or find only now that it does not like what it was told
        S.AUTHENTICATED: {MessageId.NEGOTIATE: _take_negotiate, MessageId.FAILURE2: _take_failure2},
    }

    # What goes.

    def _make_challenge(self) -> bytes:
        public_value = b""
        if self.group is not DhGroup.NULL:
            self._key_exchange = KeyExchange(self.group)
            public_value = self._key_exchange.public_value
        self._challenge = Challenge(
            self._transaction_id,
            self.hash,
            self.group,
            self._sequence_numbers.next(),
            secrets.token_bytes(self.hash.num_bytes),
            public_value,
        )
        return self._challenge.to_bytes()

    def _challenge_sent(self) -> None:
        self._go(S.AWAIT_REPLY)

    def _make_success1(self) -> bytes:
        return Success1(self._transaction_id, self.hash.num_bytes, self._response).to_bytes()

    def _success1_sent(self) -> None:
        if self._response is None:
            self._succeed()
        else:
            self._go(S.AWAIT_SUCCESS2)

    _SENDERS = {  # noqa: RUF012 - what goes in which state, and what follows
        S.SEND_CHALLENGE: (_make_challenge, _challenge_sent),
        S.SEND_SUCCESS1: (_make_success1, _success1_sent),
    }

    # How it moves.

    def _exchange(self, public_value: bytes) -> Exchange:
        secret = None
        if self._key_exchange is not None:
            try:
                secret = self._key_exchange.secret(public_value)
            except BadPublicValue as error:
                raise BadMessage(FailureReason.INCORRECT_PAYLOAD, str(error)) from None
        return Exchange(self._transaction_id, self.hash, secret, self.host_nqn, self.subsystem_nqn)

    def _check_transaction(self, transaction_id: int) -> None:
        if transaction_id != self._transaction_id:
            raise BadMessage(FailureReason.INCORRECT_PAYLOAD, "a message of another transaction")

    def _go(self, state: ControllerState) -> None:
        assert state in NEXT[self.state], (self.state, state)
        self.state = state
        if state in (S.FAILED, S.SEND_FAILURE1):
            self.is_authenticated = False

    def _succeed(self) -> None:
        self._go(S.AUTHENTICATED)
        self.is_authenticated = True
        self._forget()

    def _fail(self, reason: FailureReason, detail: str) -> None:
        self.failure = Failure(reason, detail)
        self._go(S.SEND_FAILURE1)

    def __repr__(self) -> str:
        return f"<authentication of {self.host_nqn} to {self.subsystem_nqn}: {self.state.name.lower()}>"
