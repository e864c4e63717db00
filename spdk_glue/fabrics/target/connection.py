"""One TCP connection of a host, which is one queue: PDUs in, batches of PDUs out, commands run in between.

    AWAIT_IC        nothing is agreed yet; ICReq
    AWAIT_CONNECT   which host, which controller, which queue; Connect
    AUTHENTICATE    nothing but Authentication Send and Receive
    LIVE            everything
    CLOSED          after the last batch: the peer broke a rule, its controller ended, or it said goodbye

A command is read from its capsule, waits for its data (R2T, H2CData) as far as the connection's memory allows,
and runs: most of them here and in batches, long ones in the background, an Attention Fetch once its ticket is
done. So no command waits for another's flash or compute but those that run in one batch with it.

There is no I/O, no thread and no clock here: `wake` asks the owner to call `poll`, `later` runs a function on
some other thread, and every call that needs the time is told it.
"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from spdk_glue import status as nvme_status
from spdk_glue.command import SUBMISSION_ENTRY, AdminOpcode, Direction, IoOpcode
from spdk_glue.controller import ADMIN_QUEUE, Request
from spdk_glue.fabrics import pdu
from spdk_glue.fabrics.authentication import ControllerAuthenticator
from spdk_glue.fabrics.pdu import DATA, FRAME, FatalError, FatalPduError, Framing, PduFlag, PduType
from spdk_glue.fabrics.target.association import Association
from spdk_glue.fabrics.target.attention_pairs import PAIR, AttentionPairs
from spdk_glue.fabrics.target.buffers import Buffers
from spdk_glue.fabrics.target.commands import Command, parse
from spdk_glue.fabrics.target.fabrics_commands import FabricsCommands
from spdk_glue.fabrics.target.outbox import Outbox
from spdk_glue.fabrics.target.read_runs import ReadRuns
from spdk_glue.fabrics.target.states import NEXT, State
from spdk_glue.fabrics.target.subsystem import Subsystems
from spdk_glue.fabrics.target.waiting_commands import BACKGROUND, WaitingCommands
from spdk_glue.request_id import working_for
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import record_struct

READ_RUN_MIN = 2  # Reads that are worth arrays of their own
LOOK_SECONDS = 1.0  # an admin connection looks at the time, others at their controller

_DATA, _unpack_frames = record_struct(DATA), record_struct(FRAME).iter_unpack
_ENTRY_START, _ENTRY_STOP = 8, 72  # of the submission entry in a capsule's header


class Connection(AttentionPairs, ReadRuns, WaitingCommands, FabricsCommands):
    """address: IP and port that the host reached us at.

    framing: what is to be looked for in what arrives; the owner reads it before each receive.
    """

    def __init__(
        self,
        subsystems: Subsystems,
        address: tuple[str, int],
        peer: str,
        *,
        wake: Callable[[], None],
        later: Callable[[Callable[[], None]], object],
        now: float,
    ):
        self._subsystems = subsystems
        self._limits = limits = subsystems.limits
        self._address = address
        self.peer = peer
        self._wake_owner = wake
        self._later = later
        self.state = State.AWAIT_IC
        self.closed_because = ""
        self.framing = Framing(from_host=True, max_data_bytes=limits.max_h2c_data_bytes)
        self._out = Outbox(Framing(from_host=False))
        self._now = now
        self._deadline: float | None = now + limits.handshake_seconds

        self.qid = ADMIN_QUEUE
        self.association: Association | None = None
        self._authenticator: ControllerAuthenticator | None = None
        self._proof_seconds: float | None = None  # after which the host has to prove itself again
        self._proof_ends: float | None = None
        self._num_entries = 2  # until Connect says more: nothing has to be outstanding
        self._sqhd = 0
        self._may_omit_responses = False
        self._outstanding: dict[int, Command] = {}  # by cid
        self._ready: list[Command] = []
        self._wanting: deque[Command] = deque()  # data, for which there is no memory yet
        self._transfers: dict[int, Command] = {}  # by transfer tag
        self._next_tag = 0
        self._buffered_bytes = 0  # of commands whose data come from the host
        self._last_transfer = now
        self._buffers = Buffers(limits.buffer_bytes)
        self._sent_memory: list[np.ndarray] = []  # free once the batch under way is sent
        self._arena: np.ndarray | None = None  # for runs of Reads
        self._answer = np.empty(0, np.uint8)  # of attention in one flight
        self._fetches: dict[int, Command] = {}  # that wait for their ticket, by cid
        self._background: deque[Command] = deque()
        self._num_background = 0
        self._writes: list[Command] = []  # long ones, and those behind them
        self._is_writing = False
        self._due: deque[Callable[[], None]] = deque()  # filled from any thread, run by `poll`

    # What the owner calls.

    @property
    def is_open(self) -> bool:
        return self.state is not State.CLOSED

    def receive(self, frames: np.ndarray, buffer: np.ndarray, now: float) -> Iterator[np.ndarray]:
        """Take FRAME [n], whose data lie in `buffer`. Yields PIECE [n], each to be sent before the next."""
        self._now = now
        kinds, position = frames["header"][:, 0].tolist(), 0
        refused = int(frames["fes"][-1]) if kinds else 0
        stop_at = len(frames) - 1 if refused else len(frames)
        try:
            while position < stop_at and self.is_open:
                stop = position + 1
                while stop < stop_at and kinds[stop] == kinds[position]:
                    stop += 1
                yield from self._take(kinds[position], frames[position:stop], buffer)
                yield from self._progress()
                position = stop
            if refused and self.is_open:
                position = stop_at
                raise FatalPduError(FatalError(refused), "not a PDU as agreed", int(frames["fei"][-1]))
        except FatalPduError as error:
            header = frames["header"][position].tobytes()
            hlen = min(header[pdu.HLEN_OFFSET], pdu.MAX_HEADER_BYTES)
            self._out.whole(pdu.terminate(PduType.C2H_TERMINATE, error, header[:hlen]))
            self._close(str(error))
        yield from self._flush()

    def poll(self, now: float) -> Iterator[np.ndarray]:
        """What others have finished, and what the time says. Yields as `receive`."""
        self._now = now
        while self._due:
            self._due.popleft()()
        if self.is_open:
            self._check_controller(now)
        if self.is_open:
            self._check_time(now)
            yield from self._progress()
        yield from self._flush()

    def seconds_to_poll(self, now: float) -> float:
        """When `poll` is to be called at the latest, if nothing comes."""
        if self._due:
            return 0.0
        return LOOK_SECONDS if self._deadline is None else max(0.0, min(LOOK_SECONDS, self._deadline - now))

    def wake(self) -> None:
        self._wake_owner()

    def end(self, why: str = "the peer closed the connection") -> None:
        """The connection is no more. Its queue goes, and with an admin queue the controller."""
        if self.is_open:
            self._close(why)
        if self.association is not None:
            self.association.drop_queue(self.qid, self)
            if self.association.ended is not None:
                self._subsystems.forget(self.association)

    def abort(self, cid: int) -> bool:
        """Whether this command was waiting and ends now. From any thread."""
        command = self._fetches.pop(cid, None)
        if command is None:
            return False
        failure = CommandFailed(Status.ABORTED_BY_REQUEST, do_not_retry=False)
        self._due.append(lambda: self._fail(command, failure))
        self._wake_owner()
        return True

    # States and times.

    def _go(self, state: State) -> None:
        assert state in NEXT[self.state], (self.state, state)
        self.state = state

    def _close(self, why: str) -> None:
        self._go(State.CLOSED)
        self.closed_because = why
        self._ready.clear()
        self._wanting.clear()
        self._transfers.clear()
        self._fetches.clear()
        self._background.clear()
        self._writes.clear()

    def _check_controller(self, now: float) -> None:
        association = self.association
        if association is None:
            return
        if self.qid == ADMIN_QUEUE and association.ended is None:
            association.check_time(now)
        if association.ended is not None:
            self._close(association.ended)
        elif not association.has_queue(self.qid, self):
            self._close("the controller was reset")
        elif self.qid == ADMIN_QUEUE:
            for cid, event in association.events.due():
                self._respond(self._outstanding[cid], cdw0=event.result)

    def _check_time(self, now: float) -> None:
        if self.state is State.LIVE and self._proof_ends is not None and now >= self._proof_ends:
            self._go(State.AUTHENTICATE)  # an idle host learns of it with its next command
        if self._deadline is not None and now >= self._deadline:
            self._close(f"too slow in state {self.state.name.lower()}")
        elif self._transfers and now - self._last_transfer > self._limits.stall_seconds:
            self._close("the host does not send the data that it was asked for")

    # PDUs.

    def _take(self, kind: int, frames: np.ndarray, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """A run of PDUs of one type."""
        if self.state is State.AWAIT_IC:
            if kind != PduType.IC_REQUEST:
                raise FatalPduError(FatalError.SEQUENCE_ERROR, f"PDU type {kind:#x} before ICReq")
            self._initialise(frames[0])
        elif kind == PduType.CAPSULE_COMMAND:
            yield from self._take_commands(frames, buffer)
        elif kind == PduType.H2C_DATA:
            for header, data_at, length, _, _, is_intact, _ in _unpack_frames(frames.tobytes()):
                self._take_data(header, buffer[data_at : data_at + length], bool(is_intact))
        elif kind == PduType.H2C_TERMINATE:
            record = frames[0]["header"][: pdu.TERMINATE.itemsize].view(pdu.TERMINATE)[0]
            self._close(f"the host ends the connection: reason {record['fes']}, at {record['fei']}")
        else:
            raise FatalPduError(FatalError.SEQUENCE_ERROR, f"PDU type {kind:#x} in a connection")

    def _initialise(self, frame: np.void) -> None:
        request = frame["header"].view(pdu.IC_REQUEST)[0]
        if request["pfv"] != pdu.PFV:
            at = pdu.IC_REQUEST.fields["pfv"][1]
            raise FatalPduError(FatalError.INVALID_HEADER_FIELD, f"PDU format {request['pfv']}", at)
        if request["hpda"] > pdu.MAX_PDA:
            at = pdu.IC_REQUEST.fields["hpda"][1]
            raise FatalPduError(FatalError.INVALID_HEADER_FIELD, f"data alignment {request['hpda']}", at)
        header_digest = bool(request["digests"] & PduFlag.HEADER_DIGEST)
        data_digest = bool(request["digests"] & PduFlag.DATA_DIGEST)
        response = pdu.ic_response(
            header_digest=header_digest,
            data_digest=data_digest,
            max_h2c_data_bytes=self._limits.max_h2c_data_bytes,
        )
        self._out.whole(response.tobytes())
        self.framing = Framing(True, header_digest, data_digest, max_data_bytes=self._limits.max_h2c_data_bytes)
        self._out.framing = Framing(False, header_digest, data_digest, 4 * (int(request["hpda"]) + 1))
        self._go(State.AWAIT_CONNECT)

    def _take_commands(self, frames: np.ndarray, buffer: np.ndarray) -> Iterator[np.ndarray]:
        if len(self._outstanding) + len(frames) > self._num_entries:
            detail = f"more commands than the queue's {self._num_entries} entries"
            raise FatalPduError(FatalError.LIMIT_EXCEEDED, detail)
        if self.association is not None:
            self.association.saw_host(self._now)
        if len(frames) == PAIR and self._answer_pair(frames, buffer):
            return
        if len(frames) >= READ_RUN_MIN and self.qid != ADMIN_QUEUE and self.state is State.LIVE:
            capsules = np.ascontiguousarray(frames["header"][:, _ENTRY_START:_ENTRY_STOP])
            entries = capsules.view(SUBMISSION_ENTRY)[:, 0]
            if self._is_read_run(entries, frames):
                yield from self._run_reads(entries)
                return
        for header, data_at, length, _, _, is_intact, _ in _unpack_frames(frames.tobytes()):
            capsule = header[_ENTRY_START:_ENTRY_STOP]
            self._admit(capsule, buffer[data_at : data_at + length], bool(is_intact))

    def _take_data(self, header: bytes, data: np.ndarray, is_intact: bool) -> None:
        """H2CData: the next part of what an R2T asked for."""

        def refuse(fes: FatalError, field: str, detail: str) -> FatalPduError:
            return FatalPduError(fes, detail, DATA.fields[field][1])

        _, flags, _, _, _, cid, tag, offset, length, _ = _DATA.unpack(header[: _DATA.size])
        command = self._transfers.get(tag)
        if command is None:
            raise refuse(FatalError.INVALID_HEADER_FIELD, "ttag", f"data for transfer tag {tag:#x}")
        if command.cid != cid:
            raise refuse(FatalError.INVALID_HEADER_FIELD, "cid", f"data for command {cid:#x}")
        if length != len(data):
            raise refuse(FatalError.INVALID_HEADER_FIELD, "length", f"{length} bytes of data said")
        if offset != command.received or offset + length > command.length:
            detail = f"data at {offset} to {offset + length} of {command.received} to {command.length}"
            raise refuse(FatalError.DATA_OUT_OF_RANGE, "offset", detail)
        is_last = offset + length == command.length
        if bool(flags & PduFlag.LAST) != is_last:
            raise refuse(FatalError.INVALID_HEADER_FIELD, "flags", "the last data are not marked as such")
        command.data[offset : offset + length] = data
        command.received += length
        command.is_intact &= is_intact
        self._last_transfer = self._now
        if is_last:
            del self._transfers[tag]
            self._ready.append(command)

    # One command.

    def _admit(self, raw: bytes, in_capsule: np.ndarray, is_intact: bool) -> None:
        command, failure = parse(raw, len(in_capsule), self._limits)
        self._sqhd = (self._sqhd + 1) % self._num_entries
        if command.cid in self._outstanding:
            conflict = CommandFailed(Status.COMMAND_ID_CONFLICT, detail=f"cid {command.cid:#x}")
            self._log_failure(command, conflict)
            status = nvme_status.encode(conflict.status, do_not_retry=True)
            self._out.response(command.cid, self._sqhd, self.qid, status)
            return
        self._outstanding[command.cid] = command
        failure = failure or self._why_not_now(command)
        if failure is not None:
            self._fail(command, failure)
            return
        if command.is_in_capsule:
            command.is_intact = is_intact
            self._hold(command)
            command.data[:] = in_capsule
            self._ready.append(command)
        elif command.direction == Direction.HOST_TO_DRIVE and command.length:
            self._wanting.append(command)
        else:
            self._ready.append(command)

    def _why_not_now(self, command: Command) -> CommandFailed | None:
        if command.is_fabrics:
            return self._why_no_fabrics_command_now(command)
        if self.state is State.AWAIT_CONNECT:
            return CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail="before Connect")
        if self.state is State.AUTHENTICATE:
            return CommandFailed(Status.AUTHENTICATION_REQUIRED, do_not_retry=False)
        if self.qid == ADMIN_QUEUE and not self.association.is_enabled:
            return CommandFailed(Status.COMMAND_SEQUENCE_ERROR, detail="not enabled")
        return None

    def _hold(self, command: Command) -> None:
        """Memory for data that come from the host."""
        command.memory = self._buffers.take(command.length)
        command.data = command.memory[: command.length]
        self._buffered_bytes += command.length

    def _ask_for_data(self) -> None:
        while self._wanting:
            command = self._wanting[0]
            if self._buffered_bytes and self._buffered_bytes + command.length > self._limits.buffer_bytes:
                return
            self._wanting.popleft()
            self._hold(command)
            while self._next_tag in self._transfers:
                self._next_tag = (self._next_tag + 1) & 0xFFFF
            tag, self._next_tag = self._next_tag, (self._next_tag + 1) & 0xFFFF
            if not self._transfers:
                self._last_transfer = self._now
            self._transfers[tag] = command
            self._out.r2t(command.cid, tag, 0, command.length)

    def _progress(self) -> Iterator[np.ndarray]:
        """Run what is ready, in the order of its arrival, neighbours together."""
        while self._ready:
            ready, self._ready = self._ready, []
            run: list[Command] = []
            run_bytes = 0
            for command in ready:
                special = self._special(command)
                if run and (special or run_bytes + command.length > self._limits.buffer_bytes):
                    self._run(run)
                    yield from self._flush()
                    run, run_bytes = [], 0
                if not self.is_open:
                    return
                if special:
                    special(self, command)
                else:
                    run.append(command)
                    run_bytes += command.length
            if run:
                self._run(run)
            yield from self._flush()
        if self.is_open:
            self._ask_for_data()
            self._start_background()
            self._start_writes()

    def _special(self, command: Command) -> Callable[["Connection", Command], None] | None:
        """How a command runs that does not simply go to the drive."""
        if not command.is_intact:
            return Connection._fail_damaged
        if command.is_fabrics:
            return Connection._run_fabrics
        if command.opcode in BACKGROUND[self.qid == ADMIN_QUEUE]:
            return lambda self, command: self._background.append(command)
        if self._is_long_write(command):
            return lambda self, command: self._writes.append(command)
        if self.qid == ADMIN_QUEUE:
            return _ADMIN.get(command.opcode)
        return _ATTENTION.get(command.opcode)

    def _fail_damaged(self, command: Command) -> None:
        failure = CommandFailed(Status.TRANSIENT_TRANSPORT_ERROR, detail="data digest", do_not_retry=False)
        self._fail(command, failure)

    def _run(self, commands: list[Command]) -> None:
        """In the drive, at once."""
        for command in commands:
            self._make_room(command)
        if len(commands) == 1:
            (command,) = commands
            status, cdw0 = self._execute_one(command)
            self._respond(command, cdw0, status=status)
            return
        for command, completion in zip(commands, self._execute(commands), strict=True):
            self._complete(command, completion)

    def _run_for_request(self, command: Command) -> None:
        """In the drive, whose log and trace then name the host's request."""
        with working_for(command.request):
            self._run([command])

    def _make_room(self, command: Command) -> None:
        """Memory for data that go to the host: zeros, where the drive may fill less than all."""
        if command.direction == Direction.DRIVE_TO_HOST and command.length:
            command.memory = self._buffers.take(command.length)
            command.data = command.memory[: command.length]
            if command.opcode != IoOpcode.READ or self.qid == ADMIN_QUEUE:
                command.data[:] = 0

    def _execute(self, commands: list[Command]) -> list[tuple]:
        """COMPLETION_ENTRY of each, as tuples."""
        entries = np.frombuffer(b"".join([command.raw for command in commands]), SUBMISSION_ENTRY)
        return self.association.execute(self.qid, entries, [command.data for command in commands]).tolist()

    def _execute_one(self, command: Command) -> tuple[int, int]:
        """Status field and CDW0."""
        request = Request(command.opcode, command.nsid, *command.dwords, command.data)
        return self.association.controller.execute_one(self.qid, command.cid, request)

    def _complete(self, command: Command, completion: tuple) -> None:
        cdw0, cdw1, _, _, _, status = completion
        del self._outstanding[command.cid]
        data = command.data if command.direction == Direction.DRIVE_TO_HOST else None
        self._send_answer(command.cid, status, cdw0, cdw1, data)
        self._release(command)

    def _send_answer(self, cid: int, status: int, cdw0: int, cdw1: int, data: np.ndarray | None) -> None:
        """Data go with success only; then they can stand for the response, if it says nothing more."""
        if data is not None and nvme_status.decode(status) == Status.SUCCESS:
            may_omit = self._may_omit_responses and not cdw0 and not cdw1
            self._out.data(cid, data, PduFlag.LAST | (PduFlag.SUCCESS if may_omit else 0))
            if may_omit:
                return
        self._out.response(cid, self._sqhd, self.qid, status, cdw0, cdw1)

    def _respond(self, command: Command, cdw0: int = 0, cdw1: int = 0, status: int = 0) -> None:
        self._complete(command, (cdw0, cdw1, 0, 0, 0, status))

    def _fail(self, command: Command, failure: CommandFailed, cdw0: int = 0) -> None:
        self._log_failure(command, failure)
        self._respond(
            command, cdw0, status=nvme_status.encode(failure.status, do_not_retry=failure.do_not_retry)
        )

    def _log_failure(self, command: Command, failure: CommandFailed) -> None:
        if self.association is not None:
            self.association.controller.note_failure(self.qid, command.cid, command.opcode, failure)

    def _release(self, command: Command) -> None:
        """The memory is used again once what was answered is sent."""
        if command.memory is not None:
            if command.direction == Direction.HOST_TO_DRIVE:
                self._buffered_bytes -= command.length
            self._sent_memory.append(command.memory)
            command.memory = command.data = None

    def _flush(self) -> Iterator[np.ndarray]:
        if len(self._out):
            yield self._out.take()
        while self._sent_memory:
            self._buffers.give_back(self._sent_memory.pop())

    # Commands of the admin queue that are about others.

    def _request_event(self, command: Command) -> None:
        try:
            self.association.events.request(command.cid)
        except CommandFailed as failure:
            self._fail(command, failure)

    def _keep_alive(self, command: Command) -> None:
        self._respond(command)

    def _abort(self, command: Command) -> None:
        """CDW0: 1 where the command was not found waiting; then it completes by itself, or is gone."""
        qid, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        if qid == ADMIN_QUEUE and self.association.events.abort(cid):
            failure = CommandFailed(Status.ABORTED_BY_REQUEST, do_not_retry=False)
            self._fail(self._outstanding[cid], failure)
            self._respond(command, cdw0=0)
            return
        queue = self.association.queues.get(qid)
        self._respond(command, cdw0=0 if queue is not None and queue.abort(cid) else 1)


_ADMIN = {
    AdminOpcode.ASYNC_EVENT_REQUEST: Connection._request_event,
    AdminOpcode.KEEP_ALIVE: Connection._keep_alive,
    AdminOpcode.ABORT: Connection._abort,
}
_ATTENTION = {
    IoOpcode.ATTENTION_SUBMIT: Connection._run_for_request,
    IoOpcode.ATTENTION_FETCH: Connection._wait_for_ticket,
    IoOpcode.ATTENTION_CANCEL: Connection._run_for_request,
}
