"""Bringing up queues and a controller: which command comes next, and what its answer means. No I/O.

A sequence has `step`, the command to run now or None at its end, and `answered`, which takes its completion:

    while (step := sequence.step()) is not None:
        sequence.answered(run(step.entry, step.data))

    ConnectQueue           CONNECT -> [AUTHENTICATE ...] -> DONE
    AuthenticateAgain      AUTHENTICATE ... -> DONE
    EnableController       READ_CAPABILITIES -> ENABLE -> WAIT_READY ... -> IDENTIFY -> COUNT_QUEUES -> DONE
    ShutDownController     SHUT_DOWN -> WAIT_SHUT_DOWN ... -> DONE
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol
from uuid import UUID

import numpy as np

from spdk_glue import command, status
from spdk_glue.command import Feature
from spdk_glue.fabrics import records
from spdk_glue.fabrics.authentication import MESSAGE_BYTES_MAX
from spdk_glue.fabrics.records import ADMIN_QUEUE_ID, CNTLID_DYNAMIC, CONNECT_DATA, FabricsType, Property
from spdk_glue.identify import IDENTIFY_CONTROLLER, Cns
from spdk_glue.status import ConnectionRefused, Status

ADMIN_QUEUE_ENTRIES = 32  # the least that every target has
POLL_MS = 10  # between two looks at CSTS
MAX_CONTROLLER_ID = 0xFFEF


class State(Enum):
    CONNECT = auto()
    AUTHENTICATE = auto()
    READ_CAPABILITIES = auto()
    ENABLE = auto()
    WAIT_READY = auto()
    IDENTIFY = auto()
    COUNT_QUEUES = auto()
    SHUT_DOWN = auto()
    WAIT_SHUT_DOWN = auto()
    DONE = auto()


NEXT = {
    State.CONNECT: {State.AUTHENTICATE, State.DONE},
    State.AUTHENTICATE: {State.AUTHENTICATE, State.DONE},
    State.READ_CAPABILITIES: {State.ENABLE},
    State.ENABLE: {State.WAIT_READY},
    State.WAIT_READY: {State.WAIT_READY, State.IDENTIFY},
    State.IDENTIFY: {State.COUNT_QUEUES, State.DONE},
    State.COUNT_QUEUES: {State.DONE},
    State.SHUT_DOWN: {State.WAIT_SHUT_DOWN},
    State.WAIT_SHUT_DOWN: {State.WAIT_SHUT_DOWN, State.DONE},
    State.DONE: set(),
}


@dataclass
class Step:
    """entry: SUBMISSION_ENTRY [1]; data: uint8, sent with it or to be filled; pause_ms: to wait before."""

    entry: np.ndarray
    data: np.ndarray | None = None
    pause_ms: int = 0


@dataclass(frozen=True)
class Names:
    """Who connects to what."""

    host_id: UUID
    hostnqn: str
    subnqn: str


class Authenticator(Protocol):
    """One authentication of one queue: see authentication/host.py, which has all of it."""

    wants_to_send: bool
    wants_to_receive: bool
    is_authenticated: bool

    def next_message(self) -> bytes: ...

    def receive(self, message: bytes) -> None: ...

    def error(self) -> Exception: ...


class _Sequence:
    """step() is the command of the state; answered() has the state take the completion and give the next."""

    state: State
    _commands: dict[State, Callable[[], Step]]
    _answers: dict[State, Callable[[np.ndarray], State]]

    def step(self) -> Step | None:
        if self.state == State.DONE:
            return None
        self._step = self._commands[self.state]()
        return self._step

    def answered(self, completion: np.ndarray) -> None:
        """completion: COMPLETION_ENTRY [1]. Raises ConnectionRefused."""
        following = self._answers[self.state](completion)
        assert following in NEXT[self.state], f"{self.state} to {following}"
        self.state = following


def _refuse_error(completion: np.ndarray, what: str) -> None:
    code = status.decode(int(completion["status"][0]))
    if code == Status.AUTHENTICATION_REQUIRED:
        raise ConnectionRefused("the target wants authentication first")
    if code:
        raise ConnectionRefused(f"{what} failed: {status.describe(code)}")


class ConnectQueue(_Sequence):
    """cntlid: of the controller that the target has made, once the admin queue is connected."""

    def __init__(
        self,
        names: Names,
        queue_id: int,
        num_entries: int,
        cntlid: int = CNTLID_DYNAMIC,
        keep_alive_ms: int = 0,
        new_authenticator: Callable[[], Authenticator] | None = None,
        insists: bool = False,
    ):
        """new_authenticator: for a target that wants it; insists: authenticate to any target"""
        self.state = State.CONNECT
        self.cntlid = cntlid
        self._names, self._queue_id, self._num_entries = names, queue_id, num_entries
        self._keep_alive_ms = keep_alive_ms
        self._new_authenticator, self._insists = new_authenticator, insists
        self._authenticator: Authenticator | None = None
        self._commands = {State.CONNECT: self._connect, State.AUTHENTICATE: self._authenticate}
        self._answers = {State.CONNECT: self._connected, State.AUTHENTICATE: self._authenticated}

    def _connect(self) -> Step:
        names = self._names
        data = records.connect_data(names.host_id, names.hostnqn, names.subnqn, self.cntlid)
        keep_alive_ms = self._keep_alive_ms if self._queue_id == ADMIN_QUEUE_ID else 0
        entry = records.connect(self._queue_id, self._num_entries, keep_alive_ms=keep_alive_ms)
        return Step(entry, data.view(np.uint8))

    def _connected(self, completion: np.ndarray) -> State:
        code = status.decode(int(completion["status"][0]))
        if code:
            raise ConnectionRefused(self._why(code, records.result_of(completion, records.CONNECT_FAULT)))
        granted = records.result_of(completion, records.CONNECT_RESULT)
        cntlid = int(granted["cntlid"])
        if cntlid > MAX_CONTROLLER_ID or self.cntlid not in (CNTLID_DYNAMIC, cntlid):
            raise ConnectionRefused(f"the target gives the impossible controller identifier {cntlid:#06x}")
        self.cntlid = cntlid
        required = int(granted["authreq"])
        if required & records.AUTHREQ_SECURE_CHANNEL:
            raise ConnectionRefused("the target wants TLS, which this host does not have")
        if not (required & records.AUTHREQ_TRANSACTION or self._insists):
            return State.DONE
        if self._new_authenticator is None:
            raise ConnectionRefused("the target wants authentication: name the host's key file (key-file=FILE)")
        self._authenticator = self._new_authenticator()
        return State.AUTHENTICATE

    def _why(self, code: int, fault: np.void) -> str:
        names = self._names
        in_data = bool(fault["iattr"] & records.FAULT_IN_DATA)
        if code == Status.CONNECT_INVALID_PARAMETERS and in_data:
            if fault["ipo"] == CONNECT_DATA.fields["subnqn"][1]:
                return f"there is no subsystem {names.subnqn}"
            if fault["ipo"] == CONNECT_DATA.fields["hostnqn"][1]:
                return f"the host {names.hostnqn} is refused"
        known = {
            Status.CONNECT_INVALID_HOST: f"the host {names.hostnqn} is not on the target's list",
            Status.CONNECT_CONTROLLER_BUSY: "the subsystem has no controller left for this host, or is in use",
            Status.CONNECT_INCOMPATIBLE_FORMAT: "the target is of another version",
            Status.CONNECT_RESTART_DISCOVERY: "the subsystem is elsewhere: discover it again",
        }
        return known.get(code) or f"Connect failed: {status.describe(code)}"

    def _authenticate(self) -> Step:
        self._is_sending = self._authenticator.wants_to_send
        if self._is_sending:
            message = self._authenticator.next_message()
            entry = records.authentication(FabricsType.AUTHENTICATION_SEND, len(message))
            return Step(entry, np.frombuffer(message, np.uint8).copy())
        entry = records.authentication(FabricsType.AUTHENTICATION_RECEIVE, MESSAGE_BYTES_MAX)
        return Step(entry, np.zeros(MESSAGE_BYTES_MAX, np.uint8))

    def _authenticated(self, completion: np.ndarray) -> State:
        authenticator = self._authenticator
        if not self._is_sending or authenticator.wants_to_send or authenticator.wants_to_receive:
            _refuse_error(completion, "authentication")
        if not self._is_sending:
            authenticator.receive(self._step.data.tobytes())
        if authenticator.wants_to_send or authenticator.wants_to_receive:
            return State.AUTHENTICATE
        if not authenticator.is_authenticated:
            raise authenticator.error()
        _refuse_error(completion, "authentication")
        return State.DONE


class AuthenticateAgain(ConnectQueue):
    """Over a queue that was authenticated when it was connected; nothing else is under way on it."""

    def __init__(self, new_authenticator: Callable[[], Authenticator]):
        self.state = State.AUTHENTICATE
        self._authenticator = new_authenticator()
        self._commands = {State.AUTHENTICATE: self._authenticate}
        self._answers = {State.AUTHENTICATE: self._authenticated}


class EnableController(_Sequence):
    """Over a connected admin queue. After it: `cap`, `identity` (IDENTIFY_CONTROLLER record) and `num_queues`:
    I/O queues that the target grants of those wanted."""

    def __init__(self, wanted_queues: int):
        self.state = State.READ_CAPABILITIES
        self.cap = 0
        self.identity: np.void | None = None
        self.num_queues = 0
        self._wanted_queues = wanted_queues
        self._waited_ms = 0
        self._commands = {
            State.READ_CAPABILITIES: lambda: Step(records.property_get(Property.CAP)),
            State.ENABLE: lambda: Step(
                records.property_set(Property.CC, records.CC_ENABLE | records.CC_ENTRY_SIZES)
            ),
            State.WAIT_READY: lambda: Step(
                records.property_get(Property.CSTS), pause_ms=POLL_MS if self._waited_ms else 0
            ),
            State.IDENTIFY: self._identify,
            State.COUNT_QUEUES: self._count_queues,
        }
        self._answers = {
            State.READ_CAPABILITIES: self._has_capabilities,
            State.ENABLE: self._is_enabled,
            State.WAIT_READY: self._has_status,
            State.IDENTIFY: self._is_identified,
            State.COUNT_QUEUES: self._has_queues,
        }

    def _has_capabilities(self, completion: np.ndarray) -> State:
        _refuse_error(completion, "reading the controller's capabilities")
        self.cap = int(records.result_of(completion, records.PROPERTY_RESULT)["value"])
        if not self.cap & records.CAP_NVM_COMMAND_SET:
            raise ConnectionRefused("the controller has no I/O commands")
        return State.ENABLE

    @staticmethod
    def _is_enabled(completion: np.ndarray) -> State:
        _refuse_error(completion, "enabling the controller")
        return State.WAIT_READY

    def _has_status(self, completion: np.ndarray) -> State:
        _refuse_error(completion, "reading the controller's status")
        csts = int(records.result_of(completion, records.PROPERTY_RESULT)["value"])
        if csts & records.CSTS_FATAL:
            raise ConnectionRefused("the controller says that it has failed (CSTS.CFS)")
        if csts & records.CSTS_READY:
            return State.IDENTIFY
        if self._waited_ms >= max(records.cap_timeout_ms(self.cap), records.CAP_TIMEOUT_MS):
            raise ConnectionRefused(f"the controller is not ready after {self._waited_ms} ms")
        self._waited_ms += POLL_MS
        return State.WAIT_READY

    def _identify(self) -> Step:
        return Step(command.identify(Cns.CONTROLLER), np.zeros(IDENTIFY_CONTROLLER.itemsize, np.uint8))

    def _is_identified(self, completion: np.ndarray) -> State:
        _refuse_error(completion, "Identify")
        self.identity = self._step.data.view(IDENTIFY_CONTROLLER)[0]
        if not self._wanted_queues:
            return State.DONE
        if self.identity["icdoff"]:
            raise ConnectionRefused("the target wants a capsule's data at an offset, which NVMe/TCP has not")
        return State.COUNT_QUEUES

    def _count_queues(self) -> Step:
        wanted = self._wanted_queues - 1  # counts are less one, submission and completion queues
        return Step(command.set_features(Feature.NUM_QUEUES, wanted | wanted << 16))

    def _has_queues(self, completion: np.ndarray) -> State:
        _refuse_error(completion, "asking for I/O queues")
        granted = int(completion["cdw0"][0])
        self.num_queues = min(self._wanted_queues, (granted & 0xFFFF) + 1, (granted >> 16) + 1)
        return State.DONE


class ShutDownController(_Sequence):
    """So that a drive has everything on its media when its host leaves."""

    def __init__(self, max_wait_ms: int):
        self.state = State.SHUT_DOWN
        self._left_ms = max_wait_ms
        value = records.CC_ENABLE | records.CC_ENTRY_SIZES | records.CC_SHUTDOWN_NORMAL
        self._commands = {
            State.SHUT_DOWN: lambda: Step(records.property_set(Property.CC, value)),
            State.WAIT_SHUT_DOWN: lambda: Step(records.property_get(Property.CSTS)),
        }
        self._answers = {State.SHUT_DOWN: self._is_told, State.WAIT_SHUT_DOWN: self._has_status}

    @staticmethod
    def _is_told(completion: np.ndarray) -> State:
        _refuse_error(completion, "shutting the controller down")
        return State.WAIT_SHUT_DOWN

    def _has_status(self, completion: np.ndarray) -> State:
        _refuse_error(completion, "reading the controller's status")
        csts = int(records.result_of(completion, records.PROPERTY_RESULT)["value"])
        if csts & records.CSTS_SHUTDOWN == records.CSTS_SHUTDOWN_COMPLETE or self._left_ms <= 0:
            return State.DONE
        self._left_ms -= POLL_MS
        self._commands[State.WAIT_SHUT_DOWN] = lambda: Step(
            records.property_get(Property.CSTS), pause_ms=POLL_MS
        )
        return State.WAIT_SHUT_DOWN
