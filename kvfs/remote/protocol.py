"""What a client and the drive's owner say to each other, little-endian, over a Unix stream socket.

A client sends a HELLO and gets a reply with its shared memory. From then on each REQUEST, with its body behind
it, is answered by a REPLY with its own, in order. Arrays lie in the shared memory, named by their offsets; all
else goes through the socket, which copies it: nobody can change a message after it was checked.
"""

import json
import socket
from collections import namedtuple
from enum import IntEnum
from io import BufferedReader
from struct import Struct
from struct import error as StructError

import numpy as np

from kvfs.errors import ERRNO, InvalidArgument, KvfsError
from spdk_glue.status import NvmeStatusError

PROTOCOL_VERSION = 3
MAGIC = 0x5246_564B  # "KVFR"
TOKEN_BYTES = 32
MAX_BODY_BYTES = 1 << 20  # of a request
RECEIVED_BYTES = 64 << 10  # at once, by the owner
# arguments of Store.attend that few models need
ATTEND_OPTIONS = {
    *("window", "sink_tokens", "softcap", "alibi_slopes", "query_positions", "sinks"),
    *("compression", "target_error", "sparf", "exact_if_cached", "counts"),
}
ARRAY_ALIGNMENT = 64  # of arrays in the shared memory

HELLO = np.dtype([("magic", "<u4"), ("version", "<u4"), ("token", f"V{TOKEN_BYTES}")])

REQUEST = np.dtype(
    [
        ("magic", "<u4"),
        ("operation", "<u2"),
        ("flags", "<u2"),
        ("number", "<u8"),  # of the request, ever higher: its reply carries it
        ("body_bytes", "<u4"),
        ("sequence", "<u4"),  # handle of the sequence; ATTEND over others than one has them in its body, <u4
        ("layer", "<u4"),
        ("dtype", "<u4"),  # of the queries, as in attention commands (KvDtype)
        ("count", "<u8"),  # tokens, queries per sequence, or references to a handle
        ("start", "<i8"),
        ("stop", "<i8"),
        ("offset", "<u8"),  # of the arrays that the client has put into the shared memory
        ("answer_offset", "<u8"),  # of those that the owner is to put there
        ("scale", "<f8"),
    ]
)

REPLY = np.dtype(
    [
        ("magic", "<u4"),
        ("is_error", "<u4"),
        ("number", "<u8"),
        ("body_bytes", "<u8"),
        ("value", "<i8"),
        ("stop", "<i8"),
    ]
)


class Operation(IntEnum):
    NOTHING = 0  # a reply, and so the end of all requests before; no failure of theirs is told
    CALL = 1  # body: JSON {"call": name, "arguments": {...}}; reply: JSON
    APPEND = 2  # keys, then values [count, num_kv_heads, head_dim]; value: see `APPEND` below
    # queries, then with RANGES int64 [num_sequences, count, 2]; answer: out, then lse. Body: `start` bytes of
    # handles, then, unless there are none, ATTEND_OPTIONS as JSON. Reply with `counts`: PageCounts as JSON
    ATTEND = 3
    READ = 4  # tokens [start, stop); answer: keys, then values; value: tokens given, stop: where it ends
    NUM_TOKENS = 5  # value: of the layer, or of all layers with ALL_LAYERS
    APPEND_TOKENS = 6  # <u4 [count]
    TOKENS = 7  # reply: <u4
    RELEASE = 8  # `count` references to a sequence's handle are gone


# An APPEND makes sure of space for `stop` tokens, its own and those of the same append that follow. Its reply
# says how many more tokens of the layer can be posted: space for them is there.


class Flag:
    """Bits of `flags`: plain numbers, since enum's operators cost microseconds each."""

    POSTED = 1  # no reply; a failure answers the sequence's next request that has one, nothing between is done
    CAUSAL = 2
    RANGES = 4
    TO_END = 8  # READ: up to the layer's last token
    ALL_LAYERS = 16


# records as plain tuples: NumPy takes longer to fill one and to read it than all the rest of a request
Request = namedtuple("Request", REQUEST.names)
Reply = namedtuple("Reply", REPLY.names)
_FORMAT_OF = {"<u2": "H", "<u4": "I", "<u8": "Q", "<i8": "q", "<f8": "d"}
_STRUCTS = {
    kind: Struct("<" + "".join(_FORMAT_OF[field[1]] for field in kind.descr)) for kind in (REQUEST, REPLY)
}
_NO_FIELDS = {kind: dict.fromkeys(kind.names, 0) for kind in (REQUEST, REPLY)}


def record(kind: np.dtype, /, **fields) -> bytes:
    """A REQUEST or REPLY; fields that are not named are zero. Raises InvalidArgument for what does not fit."""
    try:
        return _STRUCTS[kind].pack(*(_NO_FIELDS[kind] | fields).values())
    except StructError as error:
        raise InvalidArgument(f"a number beyond all limits: {error}") from error


def parse_request(buffer) -> Request:
    return Request._make(_STRUCTS[REQUEST].unpack(buffer))


def parse_reply(buffer) -> Reply:
    return Reply._make(_STRUCTS[REPLY].unpack(buffer))


def send(connection: socket.socket, header: bytes, body: bytes = b"") -> None:
    """All of a message."""
    connection.sendall(header + body if body else header)


def receive(connection: socket.socket, buffer) -> bool:
    """Fill the buffer; False at the end of the connection."""
    missing = len(buffer)
    while missing:
        # one call, unless a signal comes or it is long
        count = connection.recv_into(memoryview(buffer)[-missing:], 0, socket.MSG_WAITALL)
        if count == 0:
            return False
        missing -= count
    return True


def reader(connection: socket.socket) -> BufferedReader:
    """For messages of one who sends many: whatever has arrived is taken from the socket at once."""
    return connection.makefile("rb", RECEIVED_BYTES)


def take(messages: BufferedReader, num_bytes: int) -> bytes | None:
    """The next bytes; None at the end of the connection."""
    message = messages.read(num_bytes)
    return message if len(message) == num_bytes else None


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT


def plain(value):
    """NumPy's numbers as JSON has them; for json.dumps."""
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidArgument(f"{value!r} cannot be sent to the process that owns the drive")


# errors: the class by its name, among those that have an errno; the text; the facts

_ERRORS = {error.__name__: error for error in ERRNO}


def encode_error(error: Exception) -> bytes:
    known = next((base for base in type(error).__mro__ if base in ERRNO), None)
    text = str(error) if known else f"the process that owns the drive failed: {type(error).__name__}: {error}"
    message = {"error": (known or KvfsError).__name__, "text": text, "facts": vars(error) if known else {}}
    return json.dumps(message, default=str).encode()


def decode_error(body: bytes) -> Exception:
    """The error as it was raised in the owner: class, text and facts."""
    message = json.loads(body)
    kind = _ERRORS.get(message["error"], KvfsError)
    error = kind.__new__(kind)  # without its constructor, which would make another text
    facts = {name: _fact(value) for name, value in message["facts"].items()}
    error.__dict__.update(facts)
    error.args = (facts.get("opcode"), facts.get("status")) if kind is NvmeStatusError else (message["text"],)
    return error


def _fact(value):
    """JSON has lists where the facts are tuples."""
    if isinstance(value, dict):
        return {key: _fact(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value
