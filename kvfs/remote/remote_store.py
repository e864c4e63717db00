"""A store that another process owns: what kvfs.open gives for a mounted drive's folder."""

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict
from typing import Any

import numpy as np

from kvfs.arrays import Array, Pair, as_numpy, float_array, give, to_query
from kvfs.errors import InvalidArgument
from kvfs.layout import DEFAULT_GROUP_TOKENS, GroupLayout, KvGeometry
from kvfs.metadata import SequenceRow
from kvfs.model import Model
from kvfs.objects.remote_objects import RemoteObjectStore
from kvfs.prefix.remote_reuse import RemotePrefixReuse
from kvfs.remote.calls import BYTES_AS_TEXT
from kvfs.remote.connection import Connection
from kvfs.remote.protocol import ARRAY_ALIGNMENT, Flag, Operation, aligned
from kvfs.remote.remote_sequence import Reference, RemoteSequence
from kvfs.sealing.interface import derives_of, names_of
from kvfs.sealing.remote_sealing import RemoteSealingStore
from kvfs.sequence_attributes import check_attribute
from kvfs.space.remote_space import RemoteSpaceStore
from kvfs.sparse import PageCounts, reading_of
from kvfs.telemetry.remote_telemetry import RemoteVisibleStore
from kvfs.telemetry.requests import Requests, request
from kvfs.visible_tokens import common_model, range_array, visible
from spdk_glue.vendor_command import DTYPE_OF_NAME

_FLOAT32 = np.dtype("<f4")


class RemoteStore(
    RemotePrefixReuse, RemoteObjectStore, RemoteSealingStore, RemoteSpaceStore, RemoteVisibleStore
):
    """As kvfs.Store; raises ServerGone when the owner is. Safe to call from several threads.

    A process that was forked from one with a store opens its own.
    """

    def __init__(self, path: str | os.PathLike):
        """path: the folder where the drive is mounted. Raises as Connection does."""
        self.path = os.fspath(path)
        self._connection = Connection(self.path)
        self._models: dict[str, Model] = {}
        self._requests = Requests("client")
        # by handle, as long as anyone holds them: one object for a sequence
        self._sequences: weakref.WeakValueDictionary[int, RemoteSequence] = weakref.WeakValueDictionary()

    def __enter__(self) -> "RemoteStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, name: str, /, **arguments):
        with self._connection as connection:
            return connection.call(name, **arguments)

    @request("flush")
    def flush(self) -> None:
        """Everything appended to any sequence so far survives a kill or a power cut from here on.

        Raises what a posted append has failed with, once the rest is flushed.
        """
        self._call("flush_store")

    def close(self) -> None:
        """Flush and end the connection; the drive stays mounted. Closing twice is allowed."""
        connection = self._connection
        try:
            if connection.is_usable:
                self.flush()
        finally:
            connection.close()

    # models

    def _model(self, facts: dict) -> Model:
        """One object for a model, as long as it is the same."""
        layout = GroupLayout(KvGeometry(**facts["geometry"]), facts["page_size"])
        model = Model(facts["id"], facts["name"], layout.geometry, layout)
        if self._models.get(model.name) != model:
            self._models[model.name] = model
        return self._models[model.name]

    def add_model(
        self,
        name: str,
        *,
        num_layers: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float16",
        group_tokens: int | None = None,
        seal: Iterable[str] | None = None,
    ) -> Model:
        """See Store.add_model."""
        tokens = DEFAULT_GROUP_TOKENS if group_tokens is None else group_tokens
        geometry = asdict(KvGeometry(num_layers, num_query_heads, num_kv_heads, head_dim, dtype, tokens))
        if group_tokens is None:
            del geometry["group_tokens"]  # its owner knows the default
        asked = {} if seal is None else {"seal": names_of(derives_of(seal))}
        return self._model(self._call("add_model", name=name, geometry=geometry, **asked))

    def model(self, name: str) -> Model:
        return self._model(self._call("model", name=name))

    def models(self) -> list[Model]:
        return [self._model(facts) for facts in self._call("models")]

    # sequences

    def _named(self, facts: dict) -> RemoteSequence:
        """The sequence of a reply; the caller has the connection's turn, so that there is one object for it."""
        sequence = self._sequences.get(facts["handle"])
        if sequence is not None:
            sequence._reference.count += 1
            return sequence
        reference = Reference(self._connection, facts["handle"])
        sequence = RemoteSequence(self, self._model(facts["model"]), reference, facts["name"])
        self._sequences[reference.handle] = sequence
        return sequence

    def create_sequence(
        self, model: Model, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> RemoteSequence:
        """An empty sequence, from the first with these attributes. Raises SequenceExists, InvalidArgument."""
        attributes = attributes or {}
        for attribute, value in attributes.items():
            check_attribute(attribute, value)
        values = {attribute: value.decode(BYTES_AS_TEXT) for attribute, value in attributes.items()}
        self._connection.check_open()
        if not isinstance(model, Model) or self._models.get(model.name) is not model:
            raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")
        with self._connection as connection:
            facts = connection.call("create_sequence", model=model.name, name=name, attributes=values)
            return self._named(facts)

    def sequence(self, name: str) -> RemoteSequence:
        """An existing sequence. Raises NoSuchSequence."""
        with self._connection as connection:
            return self._named(connection.call("sequence", name=name))

    def sequences(self) -> list[RemoteSequence]:
        """All sequences, by name. Opens each; `catalogue_rows` is the cheap way to list many."""
        with self._connection as connection:
            return [self._named(facts) for facts in connection.call("sequences")]

    def catalogue_rows(self) -> list[SequenceRow]:
        """The catalogue's row of every sequence, as of its last flush (metadata.SequenceRow)."""
        return [SequenceRow(**row) for row in self._call("catalogue_rows")]

    def delete_sequence(self, name: str) -> None:
        """Forget a sequence; its blocks are free once the catalogue is durable. Raises NoSuchSequence."""
        self.delete_sequences([name])

    def delete_sequences(self, names: Iterable[str]) -> None:
        """The same of many, together much faster. Raises NoSuchSequence with nothing deleted."""
        self._call("delete_sequences", names=list(dict.fromkeys(names)))

    def rename_sequence(self, old_name: str, new_name: str) -> None:
        """Raises NoSuchSequence, SequenceExists."""
        self._call("rename_sequence", old_name=old_name, new_name=new_name)

    # attention

    @request("attend")
    def attend(
        self,
        layer: int,
        queries: Array,
        sequences: "RemoteSequence | Items[RemoteSequence]",
        *,
        causal: bool = True,
        token_ranges: Array | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        query_positions: Array | None = None,
        sinks: Array | None = None,
        compression: float | None = None,
        target_error: float | None = None,
        sparf: tuple[int, int] | None = None,
        exact_if_cached: bool = True,
        counts: PageCounts | None = None,
        out: Pair | None = None,
    ) -> tuple[Any, Any]:
        """As kvfs.Store.attend; a batch that the shared memory does not hold goes in several requests."""
        self._connection.check_open()
        sequences = [sequences] if isinstance(sequences, RemoteSequence) else list(sequences)
        geometry = common_model(sequences, self).geometry
        shape = (len(sequences), None, geometry.num_query_heads, geometry.head_dim)
        meaning = "[num_sequences, num_queries, num_query_heads, head_dim]"
        queries, dtype = to_query(float_array(queries, "queries", shape, meaning, geometry.numpy_dtype))
        layer = geometry.check_layer(layer)
        ranges = None
        if token_ranges is not None:
            ranges = range_array(token_ranges, *queries.shape[:2])
        reading_of(geometry, compression, target_error, sparf, exact_if_cached, counts)
        scale = geometry.head_dim**-0.5 if scale is None else float(scale)
        flags = Flag.CAUSAL if causal else 0
        fields = {"layer": layer, "dtype": DTYPE_OF_NAME[dtype], "scale": scale}
        options = {  # checked by the owner of the drive
            "window": window,
            "sink_tokens": sink_tokens or None,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "query_positions": query_positions,
            "sinks": sinks,
            "compression": compression,
            "target_error": target_error,
            "sparf": None if sparf is None else list(sparf),
            "exact_if_cached": None if exact_if_cached else False,
            "counts": None if counts is None else True,
        }
        options = {name: value for name, value in options.items() if value is not None}
        return give(self._attend(sequences, queries, ranges, options, flags, fields, counts), out)

    def _attend(self, sequences, queries, ranges, options, flags, fields, counts):
        """(out, lse), by halves of the batch, then of the queries, until a request fits."""
        num_sequences, num_queries = queries.shape[:2]
        num_bytes = _attend_bytes(queries)
        if num_bytes <= self._connection.memory.num_bytes or queries.shape[:2] == (1, 1):
            return self._attend_at_once(sequences, queries, ranges, options, flags, fields, counts, num_bytes)
        if num_sequences > 1:
            axis, half = 0, num_sequences // 2
            batches = sequences[:half], sequences[half:]
        else:
            axis, half = 1, num_queries // 2
            batches = sequences, sequences
            if ranges is None:  # halves see what they see in the whole
                num_tokens = [sequences[0].layer_tokens(fields["layer"])]
                ranges = np.stack(visible(num_tokens, num_queries, bool(flags & Flag.CAUSAL), None), axis=-1)
        parts = zip(
            batches,
            np.split(queries, [half], axis),
            (None, None) if ranges is None else np.split(ranges, [half], axis),
            _split_options(options, half, axis),
            strict=True,
        )
        answers = [self._attend(*part, flags, fields, counts) for part in parts]
        return tuple(np.concatenate(column, axis) for column in zip(*answers, strict=True))

    def _attend_at_once(self, sequences, queries, ranges, options, flags, fields, counts, num_bytes):
        with self._connection as connection:
            memory = connection.memory
            offset = connection.place(num_bytes)
            memory.array(offset, queries.shape, queries.dtype)[...] = queries
            answer_offset = offset + aligned(queries.nbytes)
            if ranges is not None:
                flags |= Flag.RANGES
                memory.array(answer_offset, ranges.shape, ranges.dtype)[...] = ranges
                answer_offset += aligned(ranges.nbytes)
            handles = b""
            if len(sequences) > 1:
                handles = np.array([sequence._handle for sequence in sequences], "<u4").tobytes()
            # all is at hand before the wait: what runs after it finds its code and data out of the caches
            out = np.empty(queries.shape, _FLOAT32)
            lse = np.empty(queries.shape[:3], _FLOAT32)
            shared_out = memory.array(answer_offset, out.shape, _FLOAT32)
            shared_lse = memory.array(answer_offset + aligned(out.nbytes), lse.shape, _FLOAT32)
            _, told = connection.ask(
                Operation.ATTEND,
                handles + (json.dumps(options, default=_plain_numbers).encode() if options else b""),
                flags,
                sequence=sequences[0]._handle,
                start=len(handles),
                count=queries.shape[1],
                offset=offset,
                answer_offset=answer_offset,
                **fields,
            )
            out[:], lse[:] = shared_out, shared_lse
            if counts is not None:
                counts.add(PageCounts(**json.loads(told)))
            return out, lse

    # what can be seen

    def counters(self) -> dict:
        """Counters of all layers since the drive was opened, as nested plain dicts."""
        return self._call("counters")

    def check(self) -> list[str]:
        """What is damaged, one line each: the drive's map, the catalogue, its blocks, every page on flash."""
        return self._call("check")


def _split_options(options: dict, half: int, axis: int) -> tuple[dict, dict]:
    if "query_positions" not in options:
        return options, options
    parts = np.split(np.asarray(options["query_positions"]), [half], axis)
    return tuple({**options, "query_positions": part} for part in parts)


def _plain_numbers(value):
    try:
        return as_numpy(value).tolist()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"an option of attend is no number or array: {error}") from error


def _attend_bytes(queries: np.ndarray) -> int:
    """An upper limit: queries, ranges, outputs and their lse."""
    num_sequences, num_queries, num_heads, head_dim = queries.shape
    per_query = num_heads * head_dim * (queries.itemsize + 4) + num_heads * 4 + 16
    return num_sequences * num_queries * per_query + 4 * ARRAY_ALIGNMENT
