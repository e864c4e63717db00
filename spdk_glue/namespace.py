"""The host's view of one drive's NVMe namespace: blocks of any drive, and attention over them of a kvfs drive.

The file system reaches the drive through `Namespace` alone, flash on a raw drive through `BlockNamespace`. They
check lengths before they leave, split what is larger than the drive's transfer limit, and turn error
completions into NvmeStatusError with what the drive's error log says.
"""

import threading
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from spdk_glue import command, dma, status
from spdk_glue.command import (
    DATASET_RANGE,
    CommandSet,
    IoOpcode,
)
from spdk_glue.command_probes import CommandProbes
from spdk_glue.controller import ADMIN_QUEUE
from spdk_glue.dma import EXTENT
from spdk_glue.held_blocks import HeldBlocks
from spdk_glue.identify import (
    ERROR_LOG_ENTRIES,
    ERROR_LOG_ENTRY,
    FLBAS_FORMAT,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    LBA_UNKNOWN,
    Cns,
    LogPage,
)
from spdk_glue.kvfs_drive import attention_of
from spdk_glue.optional_commands import OptionalCommands
from spdk_glue.queue_pair import QueuePair
from spdk_glue.request_id import current
from spdk_glue.status import NvmeStatusError, Status

QUEUE_DEPTH = 1024
MEMORY_PAGE = 4096  # the controller's smallest (CAP.MPSMIN 0), in which MDTS counts


class Transport(Protocol):
    """A connection to one namespace of a drive.

    nsid: the namespace's identifier; max_transfer_bytes: of one command, where less than what the drive says;
    counters: of what crossed it, as transports/inproc.py has them; None where nothing counts
    is_connected: False while it is known that nothing gets through
    """

    admin: QueuePair
    nsid: int
    max_transfer_bytes: int | None
    counters: object | None
    is_connected: bool

    def create_queue_pair(self, depth: int = 256) -> QueuePair: ...

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        """Fill a DMA buffer of whole blocks as one Read would, where a drive beside the host has a short way;
        False: the command is to be sent."""

    def attend_now(self, descriptor: np.ndarray, answer: np.ndarray) -> bool:
        """Fill an attention descriptor's answer, uint8 of its exact length, where a drive beside the host has a
        short way; False: the commands are to be sent."""

    def close(self) -> None: ...


class Flight:
    """A Submit and its Fetch, which are sent together: their arrays, to be used again. The ticket is free again
    when both have succeeded."""

    def __init__(self, nsid: int, ticket: int):
        self.ticket = ticket
        self.entries = np.concatenate(
            [
                command.vendor(IoOpcode.ATTENTION_SUBMIT, ticket),
                command.vendor(IoOpcode.ATTENTION_FETCH, ticket),
            ]
        )
        self.entries["nsid"] = nsid
        words = self.entries.view(np.uint64).reshape(2, -1)
        self._requests = words[:, command.REQUEST_OFFSET // words.itemsize]
        self.addresses, self.lengths = np.zeros(2, np.int64), np.zeros(2, np.int64)

    def place(self, block_bytes: int, descriptor: np.ndarray, answer: np.ndarray) -> None:
        """Where the data lie, uint8 each, and whose request it is, for the next time; who calls keeps them."""
        self._requests[:] = current.request or 0
        for one, data in enumerate((descriptor, answer)):
            self.addresses[one], self.lengths[one] = dma.address_of(data), data.nbytes
            self.entries["cdw12"][one] = -(-data.nbytes // block_bytes) - 1


@dataclass
class Pending:
    """A batch of commands in flight on a queue pair of its own."""

    queue_pair: QueuePair
    entries: np.ndarray
    cids: list[int]
    start_ns: int


class BlockNamespace(HeldBlocks, OptionalCommands):
    """Blocks of one drive. Safe to use from several threads: each operation takes an idle queue pair."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self._lock = threading.Lock()
        self.probes = CommandProbes()
        self._idle: list[QueuePair] = []
        self._admin_lock = threading.Lock()
        self.controller = self._identify(Cns.CONTROLLER, IDENTIFY_CONTROLLER)
        self.nsid = transport.nsid
        geometry = self._identify(Cns.NAMESPACE, IDENTIFY_NAMESPACE, nsid=self.nsid)
        self.format_index = int(geometry["flbas"]) & FLBAS_FORMAT
        lba_format = geometry["lbaf"][self.format_index]
        self.block_bytes = 1 << int(lba_format["lbads"])
        self.metadata_bytes = int(lba_format["ms"])  # of each block; reads and writes here move none
        self.num_lbas = int(geometry["nsze"])
        self.endurance_group = int(geometry["endgid"])
        # MDTS is a power of two of memory pages; 0 means that only the 16-bit block count limits
        mdts = int(self.controller["mdts"])
        limits = [MEMORY_PAGE << mdts] if mdts else []
        if transport.max_transfer_bytes:
            limits.append(transport.max_transfer_bytes)
        limits = [limit // self.block_bytes for limit in limits]
        self.max_transfer_lbas = min([command.MAX_LBAS_PER_COMMAND, *limits])

    @property
    def serial_number(self) -> str:
        return self.controller["sn"].decode("ascii", "replace").strip()

    # admin

    def _identify(
        self, cns: int, record: np.dtype, nsid: int = 0, command_set: int = CommandSet.NVM
    ) -> np.void:
        data = np.zeros(record.itemsize, np.uint8)
        self.admin(command.identify(cns, nsid, command_set), data)
        return data.view(record)[0]

    def log_page(self, log_id: int, record: np.dtype, count: int = 1) -> np.ndarray:
        """`count` records of a log page."""
        data = np.zeros(record.itemsize * count, np.uint8)
        self.admin(command.get_log_page(log_id, data.nbytes), data)
        return data.view(record)

    def admin(self, entry: np.ndarray, data: np.ndarray | None = None) -> int:
        """Execute one admin command; CDW0 of its completion."""
        with self._admin_lock:
            completions = self.transport.admin.execute(entry, [data])
        self._check(entry, completions, ADMIN_QUEUE)
        return int(completions["cdw0"][0])

    # blocks

    @contextmanager
    def _queue_pair(self, entries: np.ndarray):
        """An idle one, for these commands."""
        queue_pair, start_ns = self._take(len(entries)), perf_counter_ns()
        try:
            yield queue_pair
            self.probes.of(entries).since(start_ns, len(entries))
        finally:
            self._give_back(queue_pair, len(entries))

    def _take(self, num_commands: int) -> QueuePair:
        with self._lock:
            queue_pair = self._idle.pop() if self._idle else None
        queue_pair = queue_pair or self.transport.create_queue_pair(QUEUE_DEPTH)
        with self._lock:
            self.probes.num_outstanding += num_commands
        return queue_pair

    def _give_back(self, queue_pair: QueuePair, num_commands: int) -> None:
        with self._lock:
            self.probes.num_outstanding -= num_commands
            self._idle.append(queue_pair)

    def _run(self, entries: np.ndarray, buffers: Sequence[np.ndarray | None]) -> np.ndarray:
        entries["nsid"] = self.nsid
        with self._queue_pair(entries) as queue_pair:
            for start in range(0, len(entries), queue_pair.depth):
                batch = slice(start, start + queue_pair.depth)
                completions = queue_pair.execute(entries[batch], buffers[batch])
                self._check(entries[batch], completions)
        return completions

    def read_extents(self, extents: np.ndarray) -> None:
        """Read EXTENT [n], places of the namespace into memory; offsets and lengths are whole blocks."""
        self._transfer(command.read, extents)

    def write_extents(self, extents: np.ndarray, placement_id: int | None = None) -> None:
        """Write EXTENT [n]: memory to places of the namespace."""
        self._transfer(command.write, extents, placement_id=placement_id)

    def write_in_order(self, extents: np.ndarray) -> None:
        """As write_extents, each command after the end of the one before: what a zone takes. Commands that are
        outstanding together may be executed in any order."""
        entries, *places = self._commands(command.write, extents)
        with self._queue_pair(entries) as queue_pair:
            for one in range(len(entries)):
                part = slice(one, one + 1)
                completions = queue_pair.transfer(entries[part], *(place[part] for place in places))
                self._check(entries[part], completions)

    def _transfer(self, builder, extents: np.ndarray, **hints) -> None:
        """All of it at the queue's depth, without an object per command."""
        entries, *places = self._commands(builder, extents, **hints)
        with self._queue_pair(entries) as queue_pair:
            completions = queue_pair.transfer(entries, *places)
        self._check(entries, completions)

    def _commands(self, builder, extents: np.ndarray, **hints) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(SUBMISSION_ENTRY [n], int64 [n] addresses, int64 [n] bytes), none larger than the drive takes."""
        if not len(extents):
            raise ValueError("no extent to transfer")
        if ((extents["offset"] | extents["length"]) % self.block_bytes).any() or not extents["length"].all():
            raise ValueError(f"extents are whole blocks of {self.block_bytes} bytes, at least one")
        addresses, offsets, sizes = (extents[name].astype(np.int64) for name in EXTENT.names)
        limit = self.max_transfer_lbas * self.block_bytes
        pieces = -(-sizes // limit)
        before = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limit
        lengths = np.minimum(np.repeat(sizes, pieces) - before, limit)
        first_lbas = (np.repeat(offsets, pieces) + before) // self.block_bytes
        entries = builder(first_lbas, lengths // self.block_bytes, **hints)
        entries["nsid"] = self.nsid
        return entries, np.repeat(addresses, pieces) + before, lengths

    def _transfers(self, builder, extents, **hints) -> tuple[np.ndarray, list]:
        """(entries, buffers) of the commands that move (first LBA, buffer) pairs, at least one."""
        if not extents:
            raise ValueError("no extent to transfer")
        lbas, counts, buffers = [], [], []
        for first_lba, data in extents:
            if data.nbytes == 0 or data.nbytes % self.block_bytes:
                raise ValueError(
                    f"{data.nbytes} bytes are not a whole number of {self.block_bytes}-byte blocks"
                )
            view = data.reshape(-1).view(np.uint8)
            num_lbas = view.nbytes // self.block_bytes
            for start in range(0, num_lbas, self.max_transfer_lbas):
                count = min(self.max_transfer_lbas, num_lbas - start)
                lbas.append(first_lba + start)
                counts.append(count)
                buffers.append(view[start * self.block_bytes : (start + count) * self.block_bytes])
        return builder(lbas, counts, **hints), buffers

    def read(self, first_lba: int, num_lbas: int) -> np.ndarray:
        """uint8 [num_lbas * block_bytes]. Blocks never written, or deallocated, read as zeros."""
        data = dma.allocate(num_lbas * self.block_bytes)
        self.read_scattered([(first_lba, data)])
        return data

    def read_scattered(self, extents: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read each (first LBA, DMA buffer) pair, all in one batch."""
        if len(extents) == 1 and self.read_now(*extents[0]):
            return
        self._run(*self._transfers(command.read, extents))

    def read_now(self, first_lba: int, data: np.ndarray) -> bool:
        """Read whole blocks into a DMA buffer if the transport has a short way; False if not, with no error."""
        start_ns = perf_counter_ns()
        if data.nbytes % self.block_bytes or not self.transport.read_now(first_lba, data):
            return False
        self.probes.read.since(start_ns)
        return True

    def write(self, first_lba: int, data: np.ndarray, placement_id: int | None = None) -> None:
        """Write whole blocks; `data` is contiguous and, to avoid a copy, DMA memory."""
        self._run(*self._transfers(command.write, [(first_lba, data)], placement_id=placement_id))

    def write_scattered(
        self, extents: Sequence[tuple[int, np.ndarray]], placement_id: int | None = None
    ) -> None:
        """Write each (first LBA, buffer) pair; the drive gets them as one batch, in order."""
        self._run(*self._transfers(command.write, extents, placement_id=placement_id))

    def submit_write(
        self, extents: Sequence[tuple[int, np.ndarray]], placement_id: int | None = None
    ) -> Pending:
        """As write_scattered, without waiting; `complete` ends it. The buffers must not change meanwhile.

        Raises QueueFull for more commands than a queue pair takes, with nothing written.
        """
        entries, buffers = self._transfers(command.write, extents, placement_id=placement_id)
        entries["nsid"] = self.nsid
        queue_pair, start_ns = self._take(len(entries)), perf_counter_ns()
        try:
            return Pending(queue_pair, entries, queue_pair.submit(entries, buffers), start_ns)
        except BaseException:
            self._give_back(queue_pair, len(entries))
            raise

    def is_done(self, pending: Pending) -> bool:
        return pending.queue_pair.is_done(pending.cids)

    def wait(self, pending: Pending) -> np.ndarray:
        """Wait for a submitted batch: its completions, whatever their status."""
        completions = pending.queue_pair.wait(pending.cids)
        self.probes.written.since(pending.start_ns, len(pending.cids))
        self._give_back(pending.queue_pair, len(pending.cids))
        return completions

    def complete(self, pending: Pending) -> None:
        """Wait for a submitted batch; raises NvmeStatusError where a command of it failed."""
        self._check(pending.entries, self.wait(pending))

    def flush(self) -> None:
        """All completed writes and deallocations are durable when this returns."""
        self._run(command.flush(), [None])

    def deallocate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Give back (first LBA, number of LBAs) ranges."""
        for start in range(0, len(ranges), command.MAX_DATASET_RANGES):
            batch = ranges[start : start + command.MAX_DATASET_RANGES]
            data = np.zeros(len(batch), DATASET_RANGE)
            data["first_lba"] = [first for first, _ in batch]
            data["num_lbas"] = [count for _, count in batch]
            self._run(command.deallocate(len(batch)), [data.view(np.uint8)])

    # what others compose

    def execute(self, entry: np.ndarray, data: np.ndarray | None = None) -> int:
        """Run one I/O command as it is, with the nsid that it names; CDW0 of its completion.

        Its length is the caller's to check: see kvfs/nvme/raw_command.py.
        """
        with self._queue_pair(entry) as queue_pair:
            completions = queue_pair.execute(entry, [data])
        self._check(entry, completions)
        return int(completions["cdw0"][0])

    # errors

    def _check(self, entries: np.ndarray, completions: np.ndarray, queue_id: int | None = None) -> None:
        if not completions["status"].any():
            return
        failed = int(np.flatnonzero(completions["status"])[0])
        entry, completion = entries[failed], completions[failed]
        field = int(completion["status"])
        lba, detail = None, ""
        if status.has_more(field) and queue_id != ADMIN_QUEUE:
            lba, detail = self._explain(int(completion["sqid"]), int(completion["cid"]))
        raise NvmeStatusError(
            int(entry["opcode"]),
            status.decode(field),
            nsid=int(entry["nsid"]),
            do_not_retry=bool(field & 1 << 15),
            lba=lba,
            detail=detail,
        )

    def _explain(self, queue_id: int, cid: int) -> tuple[int | None, str]:
        """What the error log says of a command: its LBA where it has one, and a short text."""
        entries = self.log_page(LogPage.ERROR_INFORMATION, ERROR_LOG_ENTRY, ERROR_LOG_ENTRIES)
        mine = entries[(entries["sqid"] == queue_id) & (entries["cid"] == cid) & (entries["error_count"] > 0)]
        if not len(mine):
            return None, ""
        newest = mine[np.argmax(mine["error_count"])]
        lba = int(newest["lba"])
        return None if lba == LBA_UNKNOWN else lba, newest["detail"].decode("ascii", "replace")

    def close_queue_pairs(self) -> None:
        """For who goes on with the transport: all operations have ended."""
        while self._idle:
            self._idle.pop().close()

    def close(self) -> None:
        try:
            self.close_queue_pairs()
        finally:
            self.transport.close()


class Namespace(BlockNamespace):
    """Blocks and attention of a kvfs drive. Raises NotAKvfsDrive for any other, OtherAttentionVersion."""

    def __init__(self, transport: Transport):
        super().__init__(transport)
        self.attention = attention_of(self.controller)
        self._one_flight_bytes = int(self.attention["one_flight_bytes"])
        self._flights: list[Flight] = []  # idle
        self._ticket_lock = threading.Lock()
        self._next_ticket = 0

    def attend(self, descriptor: np.ndarray, answer_bytes: int) -> np.ndarray:
        """Submit an attention descriptor, fetch its answer: uint8 [answer_bytes]."""
        answer = self.attend_now(descriptor, answer_bytes)
        if answer is None:
            answer = self.attention_fetch(self.attention_submit(descriptor), answer_bytes)
        return answer

    def attend_now(self, descriptor: np.ndarray, answer_bytes: int, may_wait: bool = True) -> np.ndarray | None:
        """As `attend` if there is a shorter way than to submit and then to fetch; None if not, or if it fails.

        may_wait: whether the caller has nothing to do until a drive elsewhere has computed.
        """
        answer = np.empty(answer_bytes, np.uint8)
        start_ns = perf_counter_ns()
        if self.transport.attend_now(descriptor, answer):
            self.probes.attention.since(start_ns)
            return answer
        if (
            may_wait
            and descriptor.nbytes <= self._one_flight_bytes
            and answer_bytes <= int(self.attention["max_transfer_bytes"])
        ):
            return self._attend_in_one_flight(descriptor, answer_bytes)
        return None

    def _attend_in_one_flight(self, descriptor: np.ndarray, answer_bytes: int) -> np.ndarray | None:
        """Submit and Fetch sent together. None if one of them fails: alone they tell what is wrong."""
        try:
            flight = self._flights.pop()
        except IndexError:
            flight = Flight(self.nsid, self._new_ticket())
        answer = np.zeros(answer_bytes, np.uint8)
        flight.place(self.block_bytes, descriptor, answer)
        with self._queue_pair(flight.entries) as queue_pair:
            completions = queue_pair.transfer(flight.entries, flight.addresses, flight.lengths)
        submitted, fetched = completions["status"].tolist()
        if submitted or fetched or int(completions["cdw0"][1]) != answer_bytes:
            if not submitted:  # the answer may wait there
                with suppress(NvmeStatusError):
                    self.attention_cancel(flight.ticket)
            return None
        self._flights.append(flight)
        return answer

    def _new_ticket(self) -> int:
        with self._ticket_lock:
            self._next_ticket = (self._next_ticket + 1) & 0xFFFFFFFF
            return self._next_ticket

    def attention_submit(self, descriptor: np.ndarray) -> int:
        ticket = self._new_ticket()
        self._vendor(IoOpcode.ATTENTION_SUBMIT, ticket, descriptor)
        return ticket

    def attention_fetch(self, ticket: int, answer_bytes: int) -> np.ndarray:
        answer = np.zeros(answer_bytes, np.uint8)
        completions = self._vendor(IoOpcode.ATTENTION_FETCH, ticket, answer)
        if int(completions["cdw0"][0]) != answer_bytes:
            raise NvmeStatusError(
                IoOpcode.ATTENTION_FETCH,
                Status.DATA_TRANSFER_ERROR,
                detail=f"an answer of {int(completions['cdw0'][0])} bytes where {answer_bytes} were expected",
            )
        return answer

    def attention_cancel(self, ticket: int) -> None:
        self._run(command.vendor(IoOpcode.ATTENTION_CANCEL, ticket), [None])

    def seal_groups(self, payload: np.ndarray) -> None:
        self._vendor(IoOpcode.SEAL_GROUPS, 0, payload)

    def _vendor(self, opcode: IoOpcode, ticket: int, data: np.ndarray) -> np.ndarray:
        limit = int(self.attention["max_transfer_bytes"])
        if data.nbytes > limit:
            raise ValueError(f"{data.nbytes} bytes in one {opcode.name}; this drive takes at most {limit}")
        num_pages = -(-data.nbytes // self.block_bytes)
        return self._run(command.vendor(opcode, ticket, num_pages, current.request or 0), [data])
