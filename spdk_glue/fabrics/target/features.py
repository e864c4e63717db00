"""Set and Get Features of one controller."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spdk_glue.command import Feature
from spdk_glue.controller import Request
from spdk_glue.fabrics.target.identity import fill
from spdk_glue.status import CommandFailed, Status

SAVE = 1 << 31  # CDW10 of Set Features
CURRENT, DEFAULT, SAVED, CAPABILITIES = range(4)  # SEL of Get Features, CDW10[10:8]
CAPABILITY_CHANGEABLE = 1 << 2
HOST_IDENTIFIER_BYTES = 16
EXTENDED_HOST_IDENTIFIER = 1 << 0  # CDW11
NO_TEMPERATURE = 0xFFFF


@dataclass
class _Value:
    default: int
    current: int
    accept: Callable[[int], int] | None  # a value from the host to the one that holds; None: not changeable


class Features:
    """max_io_queues: granted to a host; host_id: of Connect; on_keep_alive: called with a new timeout in ms;
    on_event_configuration: with the value set"""

    def __init__(
        self,
        max_io_queues: int,
        host_id: bytes,
        keep_alive_ms: int,
        on_keep_alive: Callable[[int], int],
        on_event_configuration: Callable[[int], None],
    ):
        self._max_io_queues = max_io_queues
        self._host_id = host_id
        self._on_event_configuration = on_event_configuration
        most = max_io_queues - 1
        self._values = {
            Feature.ARBITRATION: _Value(0, 0, lambda value: value),
            Feature.POWER_MANAGEMENT: _Value(0, 0, self._power_state),
            Feature.TEMPERATURE_THRESHOLD: _Value(NO_TEMPERATURE, NO_TEMPERATURE, lambda value: value),
            Feature.ERROR_RECOVERY: _Value(0, 0, lambda value: value & 0xFFFF),
            Feature.VOLATILE_WRITE_CACHE: _Value(1, 1, None),
            Feature.NUM_QUEUES: _Value(most | most << 16, most | most << 16, self._num_queues),
            Feature.ASYNC_EVENT_CONFIGURATION: _Value(0, 0, self._event_configuration),
            Feature.KEEP_ALIVE_TIMER: _Value(keep_alive_ms, keep_alive_ms, on_keep_alive),
        }

    @property
    def num_io_queues(self) -> int:
        """That the host may connect."""
        return (self._values[Feature.NUM_QUEUES].current & 0xFFFF) + 1

    def set(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                request.result = self._set(request)
            except CommandFailed as failure:
                request.fail(failure)

    def _set(self, request: Request) -> int:
        which = request.cdw10 & 0xFF
        if request.cdw10 & SAVE:
            raise CommandFailed(Status.FEATURE_NOT_SAVEABLE, detail=f"feature {which:#x}")
        if which == Feature.HOST_IDENTIFIER:
            raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail="Connect has set it")
        value = self._values.get(which)
        if value is None:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"feature {which:#x}")
        if value.accept is None:
            raise CommandFailed(Status.FEATURE_NOT_CHANGEABLE, detail=f"feature {which:#x}")
        value.current = value.accept(request.cdw11)
        return value.current if which == Feature.NUM_QUEUES else 0

    def get(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                request.result = self._get(request)
                if request.data is not None:
                    is_host_id = request.cdw10 & 0xFF == Feature.HOST_IDENTIFIER
                    fill(request, self._host_id if is_host_id else b"")
            except CommandFailed as failure:
                request.fail(failure)

    def _get(self, request: Request) -> int:
        which, select = request.cdw10 & 0xFF, request.cdw10 >> 8 & 7
        if which == Feature.HOST_IDENTIFIER:
            is_long = request.data is not None and request.data.nbytes >= HOST_IDENTIFIER_BYTES
            if select != CAPABILITIES and not (is_long and request.cdw11 & EXTENDED_HOST_IDENTIFIER):
                raise CommandFailed(Status.INVALID_FIELD, detail="host id of 64 bits")
            return 0
        value = self._values.get(which)
        if value is None or select > CAPABILITIES:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"feature {which:#x}")
        if select == CAPABILITIES:
            return CAPABILITY_CHANGEABLE if value.accept else 0
        return value.current if select == CURRENT else value.default

    def _num_queues(self, wanted: int) -> int:
        submission, completion = wanted & 0xFFFF, wanted >> 16
        if 0xFFFF in (submission, completion):
            raise CommandFailed(Status.INVALID_FIELD, detail="65536 queues")
        granted = min(submission, completion, self._max_io_queues - 1)
        return granted | granted << 16

    @staticmethod
    def _power_state(state: int) -> int:
        if state & 0x1F:
            raise CommandFailed(Status.INVALID_FIELD, detail=f"power state {state & 0x1F}")
        return 0

    def _event_configuration(self, value: int) -> int:
        self._on_event_configuration(value)
        return value
