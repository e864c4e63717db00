"""The owner's side of one client: its requests, one after another, on the store.

A client can send anything. Messages come through the socket and are checked after they were copied; of the
shared memory only floats are used in place, and any float is a good one.
"""

import json
import logging
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kvfs.errors import InvalidArgument, KvfsError, NotPermitted, ReadOnly
from kvfs.layout import NUMPY_DTYPE
from kvfs.objects.remote_objects import ClientCaches
from kvfs.remote.calls import CALLS, model_facts
from kvfs.remote.protocol import (
    ARRAY_ALIGNMENT,
    ATTEND_OPTIONS,
    MAGIC,
    MAX_BODY_BYTES,
    PROTOCOL_VERSION,
    REPLY,
    REQUEST,
    Flag,
    Operation,
    Request,
    aligned,
    encode_error,
    parse_request,
    plain,
    reader,
    record,
    send,
    take,
)
from kvfs.remote.rights import Client
from kvfs.remote.shared_memory import SharedMemory
from kvfs.sequence import Sequence
from kvfs.sparse import PageCounts
from kvfs.store import Store
from spdk_glue.status import NvmeError
from spdk_glue.vendor_command import DTYPE_NAME

log = logging.getLogger(__name__)

MAX_HANDLES = 1 << 20
RESERVED_BYTES = 8 << 20  # of space for appends that can then be posted
_HANDLE, _TOKEN_ID = np.dtype("<u4"), np.dtype("<u4")
NO_HANDLE = 0
_FLOAT32, _INT64 = np.dtype("<f4"), np.dtype("<i8")


@dataclass
class Handle:
    """A sequence that a client holds. references: how many replies have named it."""

    number: int
    sequence: Sequence
    may_read: bool
    may_write: bool
    references: int = 0


May = Callable[[Client, Sequence, bool], bool]


class PostFailed(Exception):
    """A posted request of a sequence has failed, and the client does not know yet."""

    def __init__(self, handle: int, encoded: bytes):
        self.handle = handle  # whose failure is told by this
        self.encoded = encoded


class Session:
    """may: what the client may do, as kvfs.remote.rights.may; read_only: nobody may change anything.

    settle: waits for what other clients have posted; called before each request that is not itself posted.
    """

    def __init__(
        self,
        store: Store,
        connection: socket.socket,
        memory: SharedMemory,
        client: Client,
        may: May,
        read_only: bool,
        settle: Callable[[], None],
    ):
        self.store = store
        self._connection = connection
        self.memory = memory
        self.client = client
        self._may = may
        self._read_only = read_only
        self._handles: dict[int, Handle] = {}
        self._handle_of: dict[Sequence, Handle] = {}
        self._next_handle = 1
        self.is_tracing = False
        self._settle = settle
        self.going_along: set[Sequence] = set()  # with this client: half imports, and what names its owner
        self.objects = ClientCaches()
        self._failures: dict[int, bytes] = {}  # by handle: of posted requests, encoded, until a reply has told
        self.served = 0  # the number of the last request that was
        self._not_believed = 0  # to be posted, up to this number

    def run(self) -> None:
        """Serve until the client goes. What it leaves is the store's; its pins, half an import and what is
        temporary go, too."""
        try:
            self._run()
        finally:
            self.objects.unpin_all()
            if self.is_tracing:
                self.store._stop_trace_spans()
            for sequence in self.going_along:
                self._remove_left(sequence)

    def _remove_left(self, sequence: Sequence) -> None:
        """What cannot be removed now goes when the drive is opened the next time."""
        try:
            if not sequence.is_deleted:
                log.info("process %d is gone, and %s goes with it", self.client.pid, sequence.name)
                self.store.delete_sequence(sequence.name)
        except (KvfsError, NvmeError) as error:
            log.warning("what is left of %s stays until the drive is opened again: %s", sequence.name, error)

    def _run(self) -> None:
        with reader(self._connection) as messages:
            while (header := take(messages, REQUEST.itemsize)) is not None:
                request = parse_request(header)
                if request.magic != MAGIC or request.body_bytes > MAX_BODY_BYTES:
                    return
                body = take(messages, request.body_bytes)
                if body is None:
                    return
                is_posted = request.flags & Flag.POSTED
                try:
                    if not is_posted:
                        self._settle()
                    answer, numbers = self._serve(request, body)
                except Exception as error:
                    answer, numbers = self._failed(request, error), {"is_error": 1}
                self.served = request.number
                if is_posted:
                    continue
                reply = record(REPLY, magic=MAGIC, number=request.number, body_bytes=len(answer), **numbers)
                send(self._connection, reply, answer)

    @property
    def posted(self) -> int:
        """The number of the last request that the client has posted."""
        return self.memory.posted

    @property
    def is_behind(self) -> bool:
        """Whether the client has posted what is not served yet."""
        return self.served < self.memory.posted and self.served >= self._not_believed

    def disbelieve(self, posted: int) -> None:
        """The client has named a number, and sent nothing: nobody waits for it again until it has."""
        self._not_believed = posted

    def _failed(self, request: Request, error: Exception) -> bytes:
        """An error as the client is to get it: now, or for a posted request with the sequence's next reply."""
        is_posted = request.flags & Flag.POSTED
        if isinstance(error, PostFailed):
            if not is_posted:
                self._failures.pop(error.handle, None)
            return error.encoded
        if not isinstance(error, (KvfsError, NvmeError)):
            log.exception("%s of %s", request, self.client)
        encoded = encode_error(error)
        if is_posted:
            self._failures[request.sequence if request.sequence in self._handles else NO_HANDLE] = encoded
        return encoded

    def check_posted(self) -> None:
        """Raises what a posted request of any sequence failed with. Its own next call raises it, too."""
        if self._failures:
            first = min(self._failures)  # NO_HANDLE's, which no other call would tell
            raise PostFailed(NO_HANDLE, self._failures[first])

    def _serve(self, request: Request, body: bytes) -> tuple[bytes, dict]:
        """(body, fields) of the reply."""
        match request.operation:
            case Operation.APPEND:
                return b"", {"value": self._append(request)}
            case Operation.ATTEND:
                return self._attend(request, body), {}
            case Operation.NUM_TOKENS:
                sequence = self.readable(request.sequence)
                every = request.flags & Flag.ALL_LAYERS
                return b"", {"value": sequence.num_tokens if every else sequence.layer_tokens(request.layer)}
            case Operation.READ:
                return b"", self._read(request)
            case Operation.APPEND_TOKENS:
                ids = self.memory.array(request.offset, (request.count,), _TOKEN_ID)
                self.writable(request.sequence).append_tokens(ids.copy())
            case Operation.TOKENS:
                return self.readable(request.sequence).tokens.astype(_TOKEN_ID).tobytes(), {}
            case Operation.RELEASE:
                self._release(request.sequence, request.count)
            case Operation.CALL:
                return self._call(body), {}
            case Operation.NOTHING:
                pass
            case _:
                raise InvalidArgument(f"operation {request.operation} is not of protocol {PROTOCOL_VERSION}")
        return b"", {}

    # handles

    def held(self, number: int) -> Handle:
        if number not in self._handles:
            raise _not_held(number)
        if number in self._failures:
            raise PostFailed(number, self._failures[number])
        return self._handles[number]

    def readable(self, number: int) -> Sequence:
        """The sequence of a handle. Raises NotPermitted."""
        handle = self.held(number)
        self._check(handle.may_read, "read", handle.sequence)
        return handle.sequence

    def writable(self, number: int) -> Sequence:
        handle = self.held(number)
        self.check_writable()
        self._check(handle.may_write, "change", handle.sequence)
        return handle.sequence

    def check_writable(self) -> None:
        if self._read_only:
            raise ReadOnly(self.store.path)

    def check_may_change(self, sequence: Sequence) -> None:
        self.check_writable()
        self._check(self._may(self.client, sequence, True), "change", sequence)

    def _check(self, may: bool, verb: str, sequence: Sequence) -> None:
        if not may:
            raise NotPermitted(f"user {self.client.uid} may not {verb} sequence {sequence.name!r}")

    def hold(self, sequence: Sequence) -> dict:
        """Name a sequence in a reply. What may be done with it is decided here, as for files at opening."""
        handle = self._handle_of.get(sequence)
        if handle is None:
            if len(self._handles) >= MAX_HANDLES:
                raise InvalidArgument(f"a client holds at most {MAX_HANDLES} sequences")
            handle = Handle(self._next_handle, sequence, False, False)
            self._next_handle += 1
            self._handles[handle.number] = self._handle_of[sequence] = handle
        handle.may_read, handle.may_write = (self._may(self.client, sequence, write) for write in (False, True))
        handle.references += 1
        return {"handle": handle.number, "name": sequence.name, "model": model_facts(sequence.model)}

    def _release(self, number: int, count: int) -> None:
        handle = self._handles.get(number)
        if handle is None:
            raise _not_held(number)
        handle.references -= count
        if handle.references <= 0:
            del self._handles[number], self._handle_of[handle.sequence]
            if number in self._failures:
                self._failures[NO_HANDLE] = self._failures.pop(number)

    # arrays

    def _kv_views(self, sequence: Sequence, offset: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values behind each other in the shared memory."""
        geometry = sequence.model.geometry
        shape = (num_tokens, geometry.num_kv_heads, geometry.head_dim)
        keys = self.memory.array(offset, shape, geometry.numpy_dtype)
        return keys, self.memory.array(offset + aligned(keys.nbytes), shape, geometry.numpy_dtype)

    def _append(self, request: Request) -> int:
        """How many more tokens of the layer can be posted; 0 where nobody will know."""
        sequence = self.writable(request.sequence)
        keys, values = self._kv_views(sequence, request.offset, request.count)
        if request.stop > request.count:
            sequence._reserve(request.layer, request.stop)
        sequence.append(request.layer, keys, values)
        return 0 if request.flags & Flag.POSTED else sequence._reserve_ahead(request.layer, RESERVED_BYTES)

    def _attend(self, request: Request, body: bytes) -> bytes:
        handles, options = body[: max(0, request.start)], body[max(0, request.start) :]
        if len(handles) % _HANDLE.itemsize:
            raise InvalidArgument(f"handles in {len(handles)} bytes")
        handles = np.frombuffer(handles, _HANDLE).tolist() if handles else [request.sequence]
        sequences = [self.readable(handle) for handle in handles]
        geometry = sequences[0].model.geometry
        if request.dtype not in DTYPE_NAME:
            raise InvalidArgument(f"queries of dtype {request.dtype}")
        shape = (len(sequences), request.count, geometry.num_query_heads, geometry.head_dim)
        queries = self.memory.array(request.offset, shape, NUMPY_DTYPE[DTYPE_NAME[request.dtype]])
        ranges = None
        if request.flags & Flag.RANGES:
            at = request.offset + aligned(queries.nbytes)
            ranges = self.memory.array(at, (*shape[:2], 2), _INT64).copy()
        out = self.memory.array(request.answer_offset, shape, _FLOAT32)
        lse = self.memory.array(request.answer_offset + aligned(out.nbytes), shape[:3], _FLOAT32)
        causal = bool(request.flags & Flag.CAUSAL)
        options = _attend_options(options)
        counts = options["counts"] = PageCounts() if options.get("counts") else None
        out[:], lse[:] = self.store.attend(
            request.layer,
            queries,
            sequences,
            causal=causal,
            token_ranges=ranges,
            scale=request.scale,
            **options,
        )
        return b"" if counts is None else json.dumps(asdict(counts)).encode()

    def _read(self, request: Request) -> dict:
        """As many of the tokens as the shared memory takes; the client asks again for the rest."""
        sequence = self.readable(request.sequence)
        start, stop = request.start, request.stop
        limit = sequence.layer_tokens(request.layer)
        if request.flags & Flag.TO_END:
            stop = limit
        if not 0 <= start <= stop <= limit:
            sequence.read(request.layer, start, stop)  # says what is wrong
        token_bytes = sequence.model.token_bytes // sequence.model.num_layers
        room = self.memory.num_bytes - request.answer_offset - 2 * ARRAY_ALIGNMENT
        count = min(stop - start, max(1, room // token_bytes))
        keys, values = self._kv_views(sequence, request.answer_offset, count)
        sequence.read(request.layer, start, start + count, out=(keys, values))
        return {"value": count, "stop": stop}

    # calls that come seldom

    def _call(self, body: bytes) -> bytes:
        """JSON, or the bytes that the call returns."""
        try:
            message = json.loads(body)
            call, arguments = CALLS[message["call"]], dict(message["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"not a call that the process that owns the drive knows: {error}") from error
        found = call(self, **arguments)
        return bytes(found) if isinstance(found, memoryview) else json.dumps(found, default=plain).encode()


def _attend_options(text: bytes) -> dict:
    """What Store.attend takes beside what a request has fields for."""
    if not text:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"options of attend: {error}") from error
    if not isinstance(options, dict) or not options.keys() <= ATTEND_OPTIONS:
        raise InvalidArgument(f"options of attend are among {', '.join(sorted(ATTEND_OPTIONS))}")
    return options


def _not_held(number: int) -> InvalidArgument:
    return InvalidArgument(f"no sequence is held as number {number}")
