"""Whole sequences to and from safetensors files, in pieces of a few MiB."""

import os
from collections.abc import Callable, Mapping

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.kv_tree.safetensors_format import (
    KINDS,
    TOKEN_ID_BYTES,
    SafetensorsHeader,
    SafetensorsLayout,
    Tensor,
    layer_name,
)
from kvfs.kv_tree.snapshot import Snapshot
from kvfs.model import Model
from kvfs.sequence import Sequence
from kvfs.sequence_attributes import IMPORTING
from kvfs.store import Store

PIECE_BYTES = 8 << 20

Progress = Callable[[int, int], None]  # bytes done, of how many


class SafetensorsReader:
    """The bytes of a snapshot's safetensors file."""

    def __init__(self, snapshot: Snapshot):
        model = snapshot.sequence.model
        self.snapshot = snapshot
        self._layout = SafetensorsLayout(
            model.name, model.geometry, snapshot.num_tokens, snapshot.num_token_ids
        )
        self._header = self._layout.header()
        self._kv_stop = len(self._header) + self._layout.kv_bytes
        self.size = self._kv_stop + snapshot.num_token_ids * TOKEN_ID_BYTES

    def read(self, offset: int, size: int) -> memoryview | bytes:
        """Up to size bytes, fewer at the end. Raises FileError ESTALE."""
        stop = min(offset + size, self.size)
        header_bytes = len(self._header)
        parts: list = []
        if offset < header_bytes:
            parts.append(self._header[offset:stop])
        start, limit = max(offset, header_bytes), min(stop, self._kv_stop)
        if start < limit:
            pieces, skip = self._layout.pieces(start - header_bytes, limit - header_bytes)
            parts.append(self.snapshot.read_heads(pieces)[skip : skip + limit - start])
        start = max(offset, self._kv_stop)
        if start < stop:
            tokens = self.snapshot.token_ids().astype("<u4").tobytes()
            parts.append(tokens[start - self._kv_stop : stop - self._kv_stop])
        return parts[0] if len(parts) == 1 else b"".join(parts)


def export_sequence(sequence: Sequence, file, progress: Progress | None = None) -> int:
    """Write a sequence, as it is now, to a binary file; how many bytes that were. Raises FileError, OSError."""
    reader = SafetensorsReader(Snapshot.of(sequence))
    for offset in range(0, reader.size, PIECE_BYTES):
        piece = reader.read(offset, PIECE_BYTES)
        file.write(piece)
        if progress is not None:
            progress(offset + len(piece), reader.size)
    return reader.size


def model_of_file(store: Store, file, name: str | None = None) -> Model:
    """The model that a safetensors file's metadata tell of, added if it is new. name: what to call it instead.

    Raises InvalidArgument.
    """
    header = _header(file)
    name = name or header.metadata.get("model")
    if name is None:
        raise InvalidArgument("its metadata do not name a model: say which it is of")
    for model in store.models():
        if model.name == name:
            return model
    geometry = header.geometry
    return store.add_model(name, **vars(geometry))


def import_sequence(
    store: Store,
    model: Model,
    name: str,
    file,
    attributes: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Sequence:
    """A new sequence from a safetensors file, durable when this returns. Where it fails nothing of it stays.

    Raises InvalidArgument, SequenceExists, OutOfSpace, OSError.
    """
    header = _header(file)
    num_tokens = header.num_tokens(model.geometry)
    # with this attribute a crash leaves nothing: whoever opens the drive next removes what has it
    sequence = store.create_sequence(model, name, {IMPORTING: b"", **(attributes or {})})
    try:
        _append_all(sequence, header, num_tokens, file, progress)
        sequence.flush()
        sequence.remove_attribute(IMPORTING)
        sequence.flush()
    except BaseException:
        if not sequence.is_deleted:
            store.delete_sequence(sequence.name)
        raise
    return sequence


def _append_all(sequence: Sequence, header: SafetensorsHeader, num_tokens: int, file, progress) -> None:
    geometry = sequence.model.geometry
    token_bytes = geometry.token_bytes // geometry.num_layers
    step = max(1, PIECE_BYTES // token_bytes // geometry.group_tokens) * geometry.group_tokens
    done = 0
    for layer in range(geometry.num_layers):
        keys, values = (header.tensors[f"{layer_name(layer)}.{kind}"] for kind in KINDS)
        for start in range(0, num_tokens, step):
            stop = min(start + step, num_tokens)
            sequence.append(
                layer,
                _read_rows(file, keys, start, stop, geometry.numpy_dtype),
                _read_rows(file, values, start, stop, geometry.numpy_dtype),
            )
            done += (stop - start) * token_bytes
            if progress is not None:
                progress(done, num_tokens * geometry.token_bytes)
    tokens = header.tensors.get("tokens")
    if tokens is not None and tokens.shape[0]:
        sequence.append_tokens(np.frombuffer(_read(file, tokens.start, tokens.stop - tokens.start), "<u4"))


def _header(file) -> SafetensorsHeader:
    size = os.fstat(file.fileno()).st_size
    return SafetensorsHeader.parse(lambda offset, count: _read(file, offset, count), size)


def _read(file, offset: int, size: int) -> bytes:
    data = bytearray(size)
    _read_into(file, memoryview(data), offset)
    return bytes(data)


def _read_rows(file, tensor: Tensor, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
    """Tokens [start, stop) of a tensor [heads, tokens, dim], as a view [tokens, heads, dim]."""
    num_heads, num_tokens, head_dim = tensor.shape
    rows = np.empty((num_heads, stop - start, head_dim), dtype)
    for head in range(num_heads):
        offset = tensor.start + (head * num_tokens + start) * head_dim * dtype.itemsize
        _read_into(file, memoryview(rows[head].view(np.uint8)).cast("B"), offset)
    return rows.transpose(1, 0, 2)


def _read_into(file, buffer: memoryview, offset: int) -> None:
    """Raises InvalidArgument where the file has become shorter."""
    while buffer:
        count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            raise InvalidArgument("truncated while it was read")
        buffer, offset = buffer[count:], offset + count
