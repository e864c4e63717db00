"""Commands that take long run on other threads; an Attention Fetch waits for its ticket on none."""

from spdk_glue.command import AdminOpcode, IoOpcode
from spdk_glue.controller import ADMIN_QUEUE
from spdk_glue.fabrics.target.commands import Command

# Commands that may take long: they run beside the others.
BACKGROUND = {
    True: {AdminOpcode.FLASH_MAINTENANCE, AdminOpcode.GET_LBA_STATUS},
    False: {IoOpcode.FLUSH, IoOpcode.DATASET_MANAGEMENT, IoOpcode.VERIFY, IoOpcode.SEAL_GROUPS},
}
LONG_WRITE_BYTES = 128 << 10  # programming them takes longer than to wake a thread for it


class WaitingCommands:
    """A part of Connection."""

    def _start_background(self) -> None:
        while self._background and self._num_background < self._limits.num_background:
            command = self._background.popleft()
            self._num_background += 1
            self._make_room(command)
            self._later(lambda command=command: self._run_in_background(command))

    def _run_in_background(self, command: Command) -> None:
        """On a thread of its own."""
        status, cdw0 = self._execute_one(command)

        def done() -> None:
            self._num_background -= 1
            if self.is_open:
                self._respond(command, cdw0, status=status)

        self._due.append(done)
        self._wake_owner()

    def _is_long_write(self, command: Command) -> bool:
        """Or one behind such: the Writes of a connection keep their order."""
        if command.opcode != IoOpcode.WRITE or self.qid == ADMIN_QUEUE:
            return False
        return command.length >= LONG_WRITE_BYTES or self._is_writing or bool(self._writes)

    def _start_writes(self) -> None:
        """All that have their data, as one batch; those that get theirs meanwhile are the next."""
        if self._is_writing or not self._writes:
            return
        batch, self._writes = self._writes, []
        self._is_writing = True
        self._later(lambda: self._write(batch))

    def _write(self, batch: list[Command]) -> None:
        """On a thread of its own."""
        completions = self._execute(batch)

        def done() -> None:
            self._is_writing = False
            if self.is_open:
                for command, completion in zip(batch, completions, strict=True):
                    self._complete(command, completion)

        self._due.append(done)
        self._wake_owner()

    def _wait_for_ticket(self, command: Command) -> None:
        """An Attention Fetch: of a ticket that is there, when that is done."""
        tickets = self.association.tickets
        ticket = tickets.drives_ticket(command.cdw10) if tickets is not None else None
        if ticket is None:
            self._run_for_request(command)
            return
        self._fetches[command.cid] = command

        def done() -> None:
            if self._fetches.pop(command.cid, None) is command:
                self._run_for_request(command)

        is_here = True  # called at once, from within: the owner polls anyway

        def from_any_thread() -> None:
            self._due.append(done)
            if not is_here:
                self._wake_owner()

        self._subsystems.drive.when_fetchable(ticket, from_any_thread)
        is_here = False
