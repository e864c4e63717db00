"""A controller of an NVMe/TCP target, and its queue pairs: sockets, a keeper, reconnection.

A controller is the association of an admin queue and I/O queues, each a connection of its own. Where one of
them is lost, all are given up, and the keeper, a thread, makes the association anew, with back-off, for as long
as the controller is open; a queue pair makes its connection again when it is used next. The keeper also sends
keep-alives while nobody uses the admin queue; who does, sends them meanwhile.

Each queue proves again who this host is: as often as the address says, or when the target asks for it by
completing a command with "authentication required", which is then sent again.
"""

import logging
import threading
import time
from enum import Enum, auto

import numpy as np

from spdk_glue import command
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics import records
from spdk_glue.fabrics.authentication import AuthenticationFailed, Credentials, HostAuthenticator, read_key_file
from spdk_glue.fabrics.initiator import address as addresses
from spdk_glue.fabrics.initiator.address import Address
from spdk_glue.fabrics.initiator.bring_up import (
    ADMIN_QUEUE_ENTRIES,
    AuthenticateAgain,
    ConnectQueue,
    EnableController,
    Names,
    ShutDownController,
)
from spdk_glue.fabrics.initiator.queue import (
    COMMAND_TIMEOUT_MS,
    MAX_TRANSFER_BYTES,
    Limits,
    Queue,
    connect_socket,
    new_account,
)
from spdk_glue.fabrics.initiator.queue_pair import NamespaceFacts, QueuePair
from spdk_glue.fabrics.initiator.steps import TIMEOUT_MS, place, run_steps
from spdk_glue.identify import FLBAS_FORMAT, IDENTIFY_NAMESPACE, VWC_PRESENT, Cns
from spdk_glue.status import (
    BadLocation,
    ConnectionLost,
    ConnectionRefused,
    NvmeError,
    NvmeStatusError,
    Status,
    decode,
)

log = logging.getLogger(__name__)

KEEP_ALIVE_MS = 15_000
RECONNECT_MS = 15_000  # that users wait
BACK_OFF_MS_MIN, BACK_OFF_MS_MAX = 50, 2000
MAX_REFUSALS = 3  # of one queue, by a target that is there
WANTED_QUEUES = 64
MAX_QUEUE_DEPTH = 1024
MEMORY_PAGE = 4096  # in which MDTS counts
SHUT_DOWN_MS = 10_000  # for a drive to write what it has in memory
FIRST_VENDOR_OPCODE = 0xC0  # of admin commands, which may take as long as they need
KEEP_ALIVE_CID = 0xFFFF
ABORTED = Status.ABORTED_SQ_DELETION


class Link(Enum):
    CONNECTED = auto()
    LOST = auto()
    CLOSED = auto()


class Controller:
    """See the module. Raises ConnectionRefused, AuthenticationFailed, KeyFileError, BadLocation."""

    def __init__(self, where: Address, *, keep_alive_ms: int = KEEP_ALIVE_MS, reconnect_ms: int = RECONNECT_MS):
        self.address = where
        self.transport_id = where.target
        self.reconnect_ms = reconnect_ms
        self._keep_alive_ms = keep_alive_ms
        host_id, hostnqn = where.identity()
        self._names = Names(host_id, hostnqn, where.subnqn)
        self._credentials = _credentials(where)
        self._changed = threading.Condition()
        self._link = Link.LOST
        self._generation = 0
        self._why = "not connected yet"
        self._cache_lost = False
        self._target_asks = False  # now and then, for a proof of who this host is
        self._admin_lock = threading.Lock()
        self._queue_pairs: set[QueuePair] = set()
        self._free_queue_ids: list[int] = []
        self.account = new_account()
        self.identity: np.void | None = None  # IDENTIFY_CONTROLLER
        self._connect()
        self._free_queue_ids = list(range(self._num_queues, 0, -1))
        self._keeper = threading.Thread(target=self._keep, name="kvfs-nvme-keeper", daemon=True)
        self._keeper.start()

    def __repr__(self) -> str:
        return f"Controller({str(self.address)!r})"

    # connecting

    def _connect(self) -> None:
        """Make the association. Raises ConnectionRefused and what authentication raises."""
        self.account.written = self.account.flushed = 0
        admin = self._connect_queue(Limits(records.ADMIN_QUEUE_ID, ADMIN_QUEUE_ENTRIES - 1), None)
        try:
            enabled = EnableController(WANTED_QUEUES)
            run_steps(enabled, admin)
            if self.identity is not None and enabled.identity["sn"] != self.identity["sn"]:
                raise ConnectionRefused(f"{self.transport_id}: another drive answers there now")
        except BaseException:
            admin.close()
            raise
        self.identity = enabled.identity
        self._num_queues = enabled.num_queues
        self._max_queue_depth = min(records.cap_max_queue_entries(enabled.cap) - 1, MAX_QUEUE_DEPTH)
        # maxcmd, where told, is how many commands a queue may have outstanding
        if enabled.identity["maxcmd"]:
            self._max_queue_depth = min(self._max_queue_depth, int(enabled.identity["maxcmd"]))
        page = MEMORY_PAGE << (enabled.cap >> 48 & 0xF)
        mdts = int(enabled.identity["mdts"])
        self.max_transfer_bytes = min(page << mdts, MAX_TRANSFER_BYTES) if mdts else MAX_TRANSFER_BYTES
        self._in_capsule_bytes = max(0, int(enabled.identity["ioccsz"]) * 16 - 64)
        with self._changed:
            if self._link == Link.CLOSED:  # meanwhile
                admin.close()
                return
            self._admin, self._link = admin, Link.CONNECTED
            self._admin_proven_at = time.monotonic()
            self._generation += 1
            self._changed.notify_all()

    def _connect_queue(self, limits: Limits, cntlid: int | None) -> Queue:
        where = self.address
        try:
            connection, agreement = connect_socket(
                where.host, where.port, where.header_digest, where.data_digest
            )
            queue = Queue(connection, agreement, limits, self.account)
            try:
                sequence = ConnectQueue(
                    self._names,
                    limits.queue_id,
                    limits.depth + 1,
                    records.CNTLID_DYNAMIC if cntlid is None else cntlid,
                    self._keep_alive_ms,
                    self._new_authenticator if self._credentials else None,
                    self._credentials is not None and self._credentials.controller_key is not None,
                )
                run_steps(sequence, queue)
            except BaseException:
                queue.close()
                raise
        except ConnectionRefused as error:
            raise ConnectionRefused(f"{self.transport_id}: {error}") from error
        if cntlid is None:
            self._cntlid = sequence.cntlid
        return queue

    def _new_authenticator(self) -> HostAuthenticator:
        return HostAuthenticator(self._names.hostnqn, self._names.subnqn, self._credentials)

    def is_proof_due(self, proven_at: float) -> bool:
        seconds = self.address.reauthenticate_seconds
        return self._credentials is not None and seconds is not None and time.monotonic() - proven_at >= seconds

    def are_refused_for_proof(self, completions: np.ndarray) -> np.ndarray:
        """bool [n]: whether the target wants this host to prove itself first, and it can."""
        if self._credentials is None or not completions["status"].any():
            return np.zeros(len(completions), bool)
        return decode(completions["status"]) == Status.AUTHENTICATION_REQUIRED

    def prove_again(self, queue: Queue, generation: int) -> None:
        """On a queue with nothing under way. Without success the association is lost.

        Raises AuthenticationFailed; a connection that broke shows when the queue is used.
        """
        try:
            run_steps(AuthenticateAgain(self._new_authenticator), queue)
        except ConnectionRefused as error:
            self.lose(generation, str(error))
        except AuthenticationFailed as error:
            self.lose(generation, str(error))
            raise

    def connect_io_queue(self, queue_id: int, depth: int, facts: NamespaceFacts) -> tuple[Queue, int]:
        """(a queue, the association it belongs to).

        Raises ConnectionLost after reconnect_ms, or where the target refuses this queue alone.
        """
        give_up = time.monotonic() + self.reconnect_ms / 1000
        refusals = 0
        while True:
            generation = self.wait_connected()
            limits = Limits(
                queue_id,
                min(depth, self._max_queue_depth),
                self._in_capsule_bytes,
                self.max_transfer_bytes,
                facts.block_bytes,
                facts.nsid,
            )
            try:
                return self._connect_queue(limits, self._cntlid), generation
            except NvmeError as error:
                is_alive = self._is_alive(generation, str(error))
                refusals = refusals + 1 if is_alive else 0
                if refusals == MAX_REFUSALS or time.monotonic() > give_up:
                    raise ConnectionLost(f"no queue: {error}") from error
                if is_alive:  # the other queues go on meanwhile
                    time.sleep(BACK_OFF_MS_MIN / 1000)

    def _is_alive(self, generation: int, why: str) -> bool:
        """Whether an association's admin queue answers; if not, it is lost, because of `why`."""
        with self._admin_lock:
            if self.generation != generation:
                return False
            entry = records.property_get(records.Property.CSTS)
            entry["cid"] = 0
            completions, was_lost = self._admin.transfer(entry, *place(None), timeout_ms=TIMEOUT_MS)
            asks = self.are_refused_for_proof(completions).any()
        is_alive = not was_lost and (asks or not completions["status"][0])
        if not is_alive:
            self.lose(generation, why)
        return is_alive

    # losing

    @property
    def may_have_lost_writes(self) -> bool:
        """Whether the connection went at some time with writes in the drive that no Flush had made durable."""
        return self._cache_lost

    @property
    def why_lost(self) -> str:
        """Of the latest loss, or the latest failure to connect again."""
        return self._why.removeprefix(f"{self.transport_id}: ")

    @property
    def generation(self) -> int | None:
        """Of the association; None while there is none."""
        with self._changed:
            return self._generation if self._link == Link.CONNECTED else None

    def lose(self, generation: int, why: str) -> None:
        """A connection of an association is of no use any more: give all of it up, so that it is made anew."""
        with self._changed:
            if generation != self._generation or self._link != Link.CONNECTED:
                return
            self._link, self._why = Link.LOST, why
            if self.identity["vwc"] & VWC_PRESENT and self.account.flushed < self.account.written:
                self._cache_lost = True
            self._admin.shut_down()
            for queue_pair in list(self._queue_pairs):
                queue_pair.shut_down()
            self._changed.notify_all()
        log.info("%s: connection lost: %s", self.transport_id, why)

    def wait_connected(self) -> int:
        """The association, once there is one. Raises ConnectionLost after reconnect_ms."""
        with self._changed:
            self._check_open()
            self._changed.wait_for(lambda: self._link != Link.LOST, self.reconnect_ms / 1000)
            self._check_open()
            if self._link == Link.LOST:
                raise ConnectionLost(
                    f"{self.transport_id}: no connection for {self.reconnect_ms / 1000:g} s: "
                    f"see whether the target runs and can be reached ({self.why_lost})"
                )
            return self._generation

    def _check_open(self) -> None:
        if self._link == Link.CLOSED:
            raise ValueError("the controller is closed")

    def _keep(self) -> None:
        back_off_ms = BACK_OFF_MS_MIN
        while True:
            with self._changed:
                if self._link == Link.CONNECTED:
                    self._changed.wait(self._keep_alive_ms / 3000)
                if self._link == Link.CLOSED:
                    return
                is_lost = self._link == Link.LOST
            if not is_lost:
                back_off_ms = BACK_OFF_MS_MIN
                self._send_keep_alive()
                continue
            try:
                with self._admin_lock:
                    self._admin.close()
                    self._connect()
            except (NvmeError, OSError) as error:
                with self._changed:
                    self._why = str(error)
                    self._changed.wait_for(lambda: self._link == Link.CLOSED, back_off_ms / 1000)
                back_off_ms = min(2 * back_off_ms, BACK_OFF_MS_MAX)

    def _send_keep_alive(self) -> None:
        if not self._keep_alive_ms or not self._admin_lock.acquire(blocking=False):
            return  # who has the admin queue does it
        try:
            generation = self.generation
            if generation is None:
                return
            if self.is_proof_due(self._admin_proven_at):
                self._prove_admin(generation)
            entry = command.keep_alive()
            entry["cid"] = KEEP_ALIVE_CID
            completions, was_lost = self._admin.transfer(entry, *place(None), timeout_ms=self._keep_alive_ms)
            if self.are_refused_for_proof(completions).any():
                self._target_asks = True
                self._prove_admin(generation)
            elif was_lost or completions["status"][0]:
                self.lose(generation, self._admin.fault or "a keep-alive was refused")
        except AuthenticationFailed as error:
            log.error("%s: %s", self.transport_id, error)
        finally:
            self._admin_lock.release()

    def _prove_admin(self, generation: int) -> None:
        self.prove_again(self._admin, generation)
        self._admin_proven_at = time.monotonic()

    # commands

    def admin(self, entry: np.ndarray, data: np.ndarray | None) -> np.ndarray:
        """Run one admin command, its data uint8 [any]: COMPLETION_ENTRY [1].

        Raises ConnectionLost, AuthenticationFailed, ValueError for more data than one command moves.
        """
        with self._admin_lock:
            completion = self._run_admin(entry, data)
            if self.are_refused_for_proof(completion).any():
                self._target_asks = True
                self._prove_admin(self._generation)
                completion = self._run_admin(entry, data)
            return completion

    def _run_admin(self, entry: np.ndarray, data: np.ndarray | None) -> np.ndarray:
        """With the admin queue held."""
        generation = self.wait_connected_here()
        entry = entry.copy()
        entry["cid"] = 0
        size = 0 if data is None else data.nbytes
        if size > self.max_transfer_bytes:
            raise ValueError(f"{size} bytes are more than one command moves ({self.max_transfer_bytes})")
        try:
            if self._admin.submit(entry, *place(data)):
                completion = self._wait_for_admin(int(entry["opcode"][0]))
                if completion is not None:
                    return completion
        except BaseException:  # whatever it is: the command's memory is not the target's any more
            self.lose(generation, "an admin command was given up")
            raise
        why = self._admin.fault or "no answer to an admin command"
        self.lose(generation, why)
        raise ConnectionLost(f"{self.transport_id}: the connection was lost during an admin command: {why}")

    def wait_connected_here(self) -> int:
        """As wait_connected, for who holds the admin queue, which the keeper needs to connect it."""
        while self.generation is None:
            self._admin_lock.release()
            try:
                self.wait_connected()
            finally:
                self._admin_lock.acquire()
        return self._generation

    def _wait_for_admin(self, opcode: int) -> np.ndarray | None:
        """The completion of the submitted command; None: the connection is lost."""
        limit_ms = None if opcode >= FIRST_VENDOR_OPCODE else COMMAND_TIMEOUT_MS
        start = last_keep_alive = time.monotonic()
        slice_ms = max(1, self._keep_alive_ms // 4) if self._keep_alive_ms else 1000
        is_asked = False  # a keep-alive is under way
        found = np.empty(0, COMPLETION_ENTRY)
        while True:
            arrived = self._admin.poll(slice_ms)
            is_mine = arrived["cid"] != KEEP_ALIVE_CID
            is_asked = is_asked and bool(is_mine.all())
            found = np.concatenate([found, arrived[is_mine]])
            now = time.monotonic()
            if self._admin.fault:
                return found if len(found) and decode(int(found["status"][0])) != ABORTED else None
            if len(found) and not is_asked:
                return found
            if limit_ms and now - start > limit_ms / 1000:
                return None
            if self._keep_alive_ms and not is_asked and now - last_keep_alive > self._keep_alive_ms / 3000:
                entry = command.keep_alive()
                entry["cid"] = KEEP_ALIVE_CID
                is_asked, last_keep_alive = self._admin.submit(entry, *place(None)), now

    def namespaces(self) -> list[NamespaceFacts]:
        """The active namespaces."""
        page = np.zeros(4096, np.uint8)
        self._checked(command.identify(Cns.ACTIVE_NAMESPACES), page)
        found = []
        for nsid in page.view("<u4"):
            if not nsid:
                break
            data = np.zeros(IDENTIFY_NAMESPACE.itemsize, np.uint8)
            self._checked(command.identify(Cns.NAMESPACE, int(nsid)), data)
            geometry = data.view(IDENTIFY_NAMESPACE)[0]
            lbads = int(geometry["lbaf"][int(geometry["flbas"]) & FLBAS_FORMAT]["lbads"])
            if not 9 <= lbads <= 16:
                raise NvmeError(f"{self.transport_id}: namespace {nsid} has blocks of 2**{lbads} bytes")
            found.append(NamespaceFacts(int(nsid), 1 << lbads, int(geometry["nsze"])))
        return found

    def _checked(self, entry: np.ndarray, data: np.ndarray) -> None:
        field = int(self.admin(entry, data)["status"][0])
        if field:
            raise NvmeStatusError(int(entry["opcode"][0]), decode(field), nsid=int(entry["nsid"][0]))

    # queue pairs

    def create_queue_pair(self, depth: int, facts: NamespaceFacts) -> QueuePair:
        """A queue pair of at most `depth` outstanding commands. Raises ConnectionLost, NvmeError."""
        with self._changed:
            self._check_open()
            if not self._free_queue_ids:
                raise NvmeError(
                    f"{self.transport_id}: no further queue pair: the target grants {self._num_queues}"
                )
            queue_id = self._free_queue_ids.pop()
        try:
            queue_pair = QueuePair(self, queue_id, depth, facts)
        except BaseException:
            self._give_back(queue_id)
            raise
        with self._changed:
            self._queue_pairs.add(queue_pair)
        return queue_pair

    def _give_back(self, queue_id: int) -> None:
        with self._changed:
            self._free_queue_ids.append(queue_id)

    def forget(self, queue_pair: QueuePair) -> None:
        with self._changed:
            if queue_pair in self._queue_pairs:
                self._queue_pairs.remove(queue_pair)
                self._free_queue_ids.append(queue_pair.queue_id)

    def close(self) -> None:
        """Close the queue pairs, let the drive write what it has in memory, and go.

        Raises QueuePairInUse where a thread works on one.
        """
        if self._link == Link.CLOSED:
            return
        for queue_pair in list(self._queue_pairs):
            queue_pair.close()
        with self._changed:
            was_connected = self._link == Link.CONNECTED
            self._link = Link.CLOSED
            self._changed.notify_all()
        with self._admin_lock:
            try:
                if was_connected:
                    if self._target_asks or self.is_proof_due(self._admin_proven_at):
                        self._prove_admin(self._generation)
                    run_steps(ShutDownController(SHUT_DOWN_MS), self._admin)
            except NvmeError as error:
                log.info("%s: not shut down: %s", self.transport_id, error)
            finally:
                self._admin.close()
        self._keeper.join()


def _credentials(where: Address) -> Credentials | None:
    """The keys that the address names, or the host's default one. Raises KeyFileError, BadKey, BadLocation."""
    path = where.key_file or (addresses.KEY_FILE if addresses.KEY_FILE.exists() else None)
    if path is None:
        if where.controller_key_file is not None:  # who wants a proof must not go without
            raise BadLocation(f"{where}: a controller-key-file needs a key-file, the host's own")
        return None
    controller_key = None if where.controller_key_file is None else read_key_file(where.controller_key_file)
    return Credentials(read_key_file(path), controller_key)
