"""A sequence of a store that another process owns."""

import operator
import weakref
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs.arrays import Array, Pair, float_array, output_arrays, token_id_array
from kvfs.errors import KvfsError
from kvfs.head_pieces import HeadRows
from kvfs.model import Model
from kvfs.prefix.remote_reuse import RemotePublishedSequence
from kvfs.remote.calls import BYTES_AS_TEXT
from kvfs.remote.protocol import Flag, Operation, aligned
from kvfs.sealing.remote_sealing import RemoteSealedSequence
from kvfs.sequence_attributes import check_attribute
from kvfs.sequence_version import Version
from kvfs.telemetry.requests import request

if TYPE_CHECKING:
    from kvfs.remote.remote_store import RemoteStore

APPEND_PART_BYTES = 1 << 20  # keys or values of one request: the owner packs a part while the next is copied
READ_HEADS_BYTES = 8 << 20  # of one reply


class Reference:
    """How often replies have named a sequence's handle: so many references the owner is given back."""

    def __init__(self, connection, handle: int):
        self._connection = connection
        self.handle = handle
        self.count = 1

    def drop(self) -> None:
        self._connection.drop(self.handle, self.count)


class RemoteSequence(RemotePublishedSequence, RemoteSealedSequence):
    """As kvfs.Sequence. Made by RemoteStore; valid until deleted or the store closes."""

    def __init__(self, store: "RemoteStore", model: Model, reference: Reference, name: str):
        self._store = store
        self._connection = store._connection
        self.model = model
        self._reference = reference
        self._handle = reference.handle
        self._last_name = name
        self._room: dict[int, tuple[int, int]] = {}  # layer: (calls so far, tokens that can be posted)
        weakref.finalize(self, reference.drop).atexit = False

    def __repr__(self) -> str:
        try:
            return f"<Sequence {self.name!r} of {self.model.name!r}, {self.num_tokens} tokens>"
        except KvfsError:
            return f"<Sequence {self._last_name!r} of {self.model.name!r}, out of reach>"

    def _call(self, name: str, /, **arguments):
        with self._connection as connection:
            return connection.call(name, handle=self._handle, **arguments)

    def _check_usable(self) -> None:
        self._connection.check_open()

    # facts

    @property
    def store(self) -> "RemoteStore":
        """The store that it belongs to."""
        return self._store

    @property
    def id(self) -> int:
        """Another sequence may have it once this one is deleted."""
        return self._call("facts")["id"]

    @property
    def name(self) -> str:
        self._last_name = self._call("facts")["name"]
        return self._last_name

    @property
    def created_ns(self) -> int:
        return self._call("facts")["created_ns"]

    @property
    def changed_ns(self) -> int:
        """When tokens were last appended or cut off, in ns since the epoch."""
        return self._call("facts")["changed_ns"]

    @property
    def is_deleted(self) -> bool:
        return self._call("facts")["is_deleted"]

    @property
    def num_token_ids(self) -> int:
        return self._call("facts")["num_token_ids"]

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has."""
        with self._connection as connection:
            fields = {"sequence": self._handle, "flags": Flag.ALL_LAYERS}
            return connection.ask(Operation.NUM_TOKENS, **fields)[0].value

    def layer_tokens(self, layer: int) -> int:
        """Tokens that one layer has; layers differ while a model's forward pass runs."""
        layer = self.model.geometry.check_layer(layer)
        with self._connection as connection:
            return connection.ask(Operation.NUM_TOKENS, sequence=self._handle, layer=layer)[0].value

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [any number]: token ids given to append_tokens. Kept beside the KV, not checked against it."""
        with self._connection as connection:
            return np.frombuffer(connection.ask(Operation.TOKENS, sequence=self._handle)[1], "<u4").copy()

    def version(self) -> Version:
        """What the sequence holds now, in complete tokens."""
        return Version(**self._call("version"))

    def holds(self, version: Version) -> bool:
        """Whether the tokens of a version are all still there, unchanged."""
        return self._call("holds", version={"num_tokens": version.num_tokens, "epoch": version.epoch})

    # growing

    @request("append", of="_store")
    def append(self, layer: int, keys: Array, values: Array) -> None:
        """As kvfs.Sequence.append.

        Tokens that space waits for are posted: the owner takes them while this process goes on. Should it fail
        to (it was deleted by another, say), the sequence's next call raises, whatever it is, and is not done.
        """
        self._check_usable()
        geometry = self.model.geometry
        layer = geometry.check_layer(layer)
        shape = (None, geometry.num_kv_heads, geometry.head_dim)
        meaning = "[num_tokens, num_kv_heads, head_dim]"
        keys = float_array(keys, "keys", shape, meaning, geometry.numpy_dtype)
        values = float_array(values, "values", (len(keys), *shape[1:]), meaning, geometry.numpy_dtype)
        row_bytes = geometry.num_kv_heads * geometry.head_dim * geometry.numpy_dtype.itemsize
        # of keys and values at once two parts fit, one for either side
        part_tokens = max(1, min(APPEND_PART_BYTES, self._connection.memory.num_bytes // 4) // row_bytes)
        with self._connection as connection:
            at_call, room = self._room.get(layer, (0, 0))
            if at_call != connection.num_calls:
                room = 0
            start = 0
            while True:
                count = min(part_tokens, len(keys) - start)
                fields = {
                    "sequence": self._handle,
                    "layer": layer,
                    "count": count,
                    "stop": len(keys) - start,
                    "offset": self._place(connection, keys[start:][:count], values[start:][:count]),
                }
                start += count
                if start < len(keys):
                    connection.post(Operation.APPEND, **fields)
                    continue
                if 0 < len(keys) <= room:
                    room -= len(keys)
                    connection.post(Operation.APPEND, **fields)
                else:
                    room = connection.ask(Operation.APPEND, **fields)[0].value
                self._room[layer] = connection.num_calls, room
                return

    def _place(self, connection, keys: np.ndarray, values: np.ndarray) -> int:
        """Put keys and values into the shared memory, in the storage dtype."""
        dtype = self.model.geometry.numpy_dtype
        behind = aligned(keys.size * dtype.itemsize)
        offset = connection.place(2 * behind)
        for at, rows in ((offset, keys), (offset + behind, values)):
            target = connection.memory.array(at, rows.shape, dtype)
            if rows.dtype == dtype:
                target[...] = rows
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # as kvfs.arrays.to_storage rounds
                    target[...] = rows
        return offset

    def append_tokens(self, token_ids: Array) -> None:
        """Keep token ids beside the KV: what a later prefill needs to know which tokens are here."""
        self._check_usable()
        ids = token_id_array(token_ids)
        with self._connection as connection:
            offset = connection.place(ids.nbytes)
            connection.memory.array(offset, ids.shape, ids.dtype)[:] = ids
            connection.ask(Operation.APPEND_TOKENS, sequence=self._handle, count=ids.size, offset=offset)

    # reading

    @request("read", of="_store")
    def read(
        self, layer: int, start: int = 0, stop: int | None = None, out: Pair | None = None
    ) -> tuple[Any, Any]:
        """As kvfs.Sequence.read."""
        self._check_usable()
        geometry = self.model.geometry
        layer = geometry.check_layer(layer)
        start = operator.index(start)
        flags = Flag.TO_END if stop is None else 0
        stop = 0 if stop is None else operator.index(stop)
        targets: list[np.ndarray] = []
        done = 0
        while True:
            with self._connection as connection:
                fields = {"sequence": self._handle, "layer": layer, "start": start, "stop": stop}
                reply, _ = connection.ask(Operation.READ, flags=flags, **fields)
                if not targets:  # the first part says where the end is
                    shape = (reply.stop - start, geometry.num_kv_heads, geometry.head_dim)
                    targets = output_arrays(out, ("keys", "values"), (shape, shape), geometry.numpy_dtype)
                self._take(connection, *(array[done : done + reply.value] for array in targets))
            done += reply.value
            start, stop, flags = start + reply.value, reply.stop, 0
            if start == stop:
                return tuple(targets if out is None else out)

    def _take(self, connection, keys: np.ndarray, values: np.ndarray) -> None:
        """Copy out the keys and values that the owner has put into the shared memory."""
        offset = 0
        for target in (keys, values):
            target[...] = connection.memory.array(offset, target.shape, target.dtype)
            offset += aligned(target.nbytes)

    def read_heads(self, pieces: Items[HeadRows]) -> memoryview:
        """The rows of each piece one after another, as bytes of the storage dtype."""
        rows = bytearray()
        step = max(1, READ_HEADS_BYTES // self.model.layout.row_bytes)
        for piece in pieces:
            starts = range(piece.start, piece.stop, step) or (piece.start,)
            for start in starts:
                stop = min(start + step, piece.stop) if piece.stop > start else piece.stop
                part = replace(piece, start=start, stop=stop)
                fields = {name: getattr(part, name) for name in HeadRows.__dataclass_fields__}
                with self._connection as connection:
                    rows += connection.call_for_bytes("read_heads", handle=self._handle, **fields)
        return memoryview(rows)

    # attributes

    def attributes(self) -> dict[str, bytes]:
        """What users and kvfs note about the sequence, by name; see sequence_attributes.py."""
        return {name: value.encode(BYTES_AS_TEXT) for name, value in self._call("attributes").items()}

    def set_attribute(self, name: str, value: bytes) -> None:
        """Durable after the next flush. Raises InvalidArgument."""
        check_attribute(name, value)
        self._call("set_attribute", name=name, value=value.decode(BYTES_AS_TEXT))

    def remove_attribute(self, name: str) -> None:
        """Forget an attribute if there is one."""
        self._call("remove_attribute", name=name)

    # durability, shortening and sharing

    @request("flush", of="_store")
    def flush(self) -> None:
        """Everything appended so far, in complete tokens, survives a kill or a power cut from here on."""
        self._call("flush_sequence")

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens. Raises InvalidArgument if a layer has fewer."""
        self._call("truncate", num_tokens=num_tokens)

    def fork(self, name: str) -> "RemoteSequence":
        """A new sequence with the same tokens. Whole groups are shared, nothing of them is copied."""
        with self._connection as connection:
            return self._store._named(connection.call("fork", handle=self._handle, name=name))

    def compact(self) -> None:
        """Have the drive rewrite this sequence's whole groups so that each layer reads in long runs."""
        self._call("compact")
