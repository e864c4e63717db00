"""Handlers of the vendor commands: attention tickets, and sealing of token groups."""

from collections.abc import Sequence

from accel.attention_unit import AttentionUnit
from accel.sealing import Sealing
from spdk_glue.command import IoOpcode
from spdk_glue.controller import Handler, Request
from spdk_glue.status import CommandFailed


class VendorCommands:
    def __init__(self, unit: AttentionUnit, sealing: Sealing):
        self._unit = unit
        self._sealing = sealing

    def handlers(self) -> dict[int, Handler]:
        return {
            IoOpcode.ATTENTION_SUBMIT: _each(self._submit),
            IoOpcode.ATTENTION_FETCH: _each(self._fetch),
            IoOpcode.ATTENTION_CANCEL: _each(self._cancel),
            IoOpcode.SEAL_GROUPS: _each(self._seal_groups),
        }

    def _submit(self, request: Request) -> None:
        self._unit.submit(request.cdw10, request.data)

    def _fetch(self, request: Request) -> None:
        request.result = self._unit.fetch(request.cdw10, request.data)

    def _cancel(self, request: Request) -> None:
        self._unit.cancel(request.cdw10)

    def _seal_groups(self, request: Request) -> None:
        self._sealing.seal(request.data)


def _each(handler) -> Handler:
    """A handler of one request as a handler of a run of them, each with its own status."""

    def run(requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                handler(request)
            except CommandFailed as failure:
                request.fail(failure)

    return run
