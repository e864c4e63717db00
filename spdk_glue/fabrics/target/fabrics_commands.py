"""Fabrics commands on one connection: Connect, properties, authentication, Disconnect."""

import logging

import numpy as np

from spdk_glue.command import AdminOpcode
from spdk_glue.controller import ADMIN_QUEUE
from spdk_glue.fabrics.authentication import ControllerAuthenticator
from spdk_glue.fabrics.records import (
    AUTHENTICATION_COMMAND,
    AUTHREQ_TRANSACTION,
    CONNECT_COMMAND,
    CONNECT_DATA,
    CONNECT_NO_FLOW_CONTROL,
    FABRICS_COMMAND,
    PROPERTY_8_BYTES,
    PROPERTY_COMMAND,
    SECURITY_PROTOCOL_NVME,
    FabricsType,
)
from spdk_glue.fabrics.target.association import Association
from spdk_glue.fabrics.target.commands import Command
from spdk_glue.fabrics.target.states import State
from spdk_glue.fabrics.target.subsystem import ConnectRefused
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)


class FabricsCommands:
    """A part of Connection."""

    def _why_no_fabrics_command_now(self, command: Command) -> CommandFailed | None:
        kind = _fabrics_type(command)
        if command.length > self._limits.in_capsule_bytes:  # none has more; a stranger gets no memory
            return CommandFailed(Status.SGL_LENGTH_INVALID, detail="fabrics command")
        if (kind == FabricsType.CONNECT) != (self.state is State.AWAIT_CONNECT):
            return CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail=f"fabrics command {kind:#x}")
        if self.state is State.AUTHENTICATE and kind not in _AUTHENTICATION:
            return CommandFailed(Status.AUTHENTICATION_REQUIRED, do_not_retry=False)
        return None

    def _run_fabrics(self, command: Command) -> None:
        handler = _FABRICS.get(_fabrics_type(command))
        try:
            if handler is None:
                raise CommandFailed(Status.INVALID_OPCODE, detail=f"fabrics {_fabrics_type(command):#x}")
            handler(self, command)
        except ConnectRefused as refusal:
            log.warning("%s: %s", self.peer, refusal)
            self._fail(command, refusal, cdw0=refusal.result)
        except CommandFailed as failure:
            self._fail(command, failure)

    def _connect(self, command: Command) -> None:
        if command.length != CONNECT_DATA.itemsize:
            raise CommandFailed(Status.SGL_LENGTH_INVALID, detail="Connect's data")
        entry = np.frombuffer(command.raw, CONNECT_COMMAND)[0]
        data = command.data.view(CONNECT_DATA)[0]
        association, host = self._subsystems.connect(entry, data, self, self._address, self._now)
        self.qid, self.association = int(entry["qid"]), association
        self._num_entries = int(entry["sqsize"]) + 1
        self._sqhd = 1 % self._num_entries
        self._may_omit_responses = bool(entry["cattr"] & CONNECT_NO_FLOW_CONTROL)
        if not association.is_discovery:  # which tells the drive's name, and no more
            self._authenticator = host.authenticator(association.subnqn)
            self._proof_seconds = host.reauthenticate_seconds
        if self._authenticator is None:
            self._go(State.LIVE)
            self._deadline = None
        else:
            self._go(State.AUTHENTICATE)
            self._deadline = self._now + self._limits.authentication_seconds
        authreq = AUTHREQ_TRANSACTION if self._authenticator is not None else 0
        self._respond(command, cdw0=association.cntlid | authreq << 16)

    def _get_property(self, command: Command) -> None:
        value = self._controller_here().get_property(*self._property(command)[:2])
        self._respond(command, cdw0=value & 0xFFFFFFFF, cdw1=value >> 32)

    def _set_property(self, command: Command) -> None:
        association = self._controller_here()
        association.set_property(*self._property(command))
        if not association.is_enabled:  # event requests end with the reset, without a completion
            for other in list(self._outstanding.values()):
                if other.opcode == AdminOpcode.ASYNC_EVENT_REQUEST:
                    del self._outstanding[other.cid]
        self._respond(command)

    @staticmethod
    def _property(command: Command) -> tuple[int, bool, int]:
        entry = np.frombuffer(command.raw, PROPERTY_COMMAND)[0]
        size = int(entry["attrib"]) & 7
        if size > PROPERTY_8_BYTES:
            raise CommandFailed(Status.INVALID_FIELD, detail="property size")
        return int(entry["ofst"]), size == PROPERTY_8_BYTES, int(entry["value"])

    def _controller_here(self) -> Association:
        if self.qid != ADMIN_QUEUE:
            raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail="on an I/O queue")
        return self.association

    def _disconnect(self, command: Command) -> None:
        if self.qid == ADMIN_QUEUE:
            raise CommandFailed(Status.INVALID_QUEUE, detail="admin queue")
        self._respond(command)
        self._close("the host disconnected the queue")

    def _check_authentication(self, command: Command) -> ControllerAuthenticator:
        entry = np.frombuffer(command.raw, AUTHENTICATION_COMMAND)[0]
        if self._authenticator is None:
            raise CommandFailed(Status.INVALID_FIELD, detail="host has no key here")
        if (entry["secp"], entry["spsp0"], entry["spsp1"]) != (SECURITY_PROTOCOL_NVME, 1, 1):
            raise CommandFailed(Status.INVALID_FIELD, detail="security protocol")
        if not command.length or entry["length"] != command.length:
            raise CommandFailed(Status.INVALID_FIELD, detail="length of the message")
        return self._authenticator

    def _authentication_send(self, command: Command) -> None:
        self._check_authentication(command).receive(command.data.tobytes())
        self._respond(command)
        self._see_authentication()

    def _authentication_receive(self, command: Command) -> None:
        authenticator = self._check_authentication(command)
        self._make_room(command)
        message = authenticator.next_message(command.length)
        command.data[: len(message)] = np.frombuffer(message, np.uint8)
        self._respond(command)
        self._see_authentication()

    def _see_authentication(self) -> None:
        authenticator = self._authenticator
        if authenticator.has_failed:
            log.warning("%s: %s", self.peer, authenticator.error())
            self._close("authentication failed")
            return
        if self.state is State.LIVE and not authenticator.is_authenticated:
            self._go(State.AUTHENTICATE)
        if authenticator.in_progress:
            if self._deadline is None:
                self._deadline = self._now + self._limits.authentication_seconds
        else:
            self._deadline = None
            if self._proof_seconds is not None:
                self._proof_ends = self._now + self._proof_seconds
            if self.state is State.AUTHENTICATE:
                self._go(State.LIVE)


def _fabrics_type(command: Command) -> int:
    return command.raw[FABRICS_COMMAND.fields["fctype"][1]]


_AUTHENTICATION = (FabricsType.AUTHENTICATION_SEND, FabricsType.AUTHENTICATION_RECEIVE)
_FABRICS = {
    FabricsType.CONNECT: FabricsCommands._connect,
    FabricsType.PROPERTY_GET: FabricsCommands._get_property,
    FabricsType.PROPERTY_SET: FabricsCommands._set_property,
    FabricsType.AUTHENTICATION_SEND: FabricsCommands._authentication_send,
    FabricsType.AUTHENTICATION_RECEIVE: FabricsCommands._authentication_receive,
    FabricsType.DISCONNECT: FabricsCommands._disconnect,
}
