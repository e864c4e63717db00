"""kvfs as a contender of the decode benchmark: a store whose cache and tails lie within the memory cap."""

import tempfile
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.decode_shape import (
    GROUP_SIZE,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_QUERY_HEADS,
    DecodedToken,
    Shape,
    prompt,
)

SEQUENCE = "decode"
OVERHEAD_BYTES = 44 << 20  # the drive's map and index, the catalogue, units under way


def _add_model(store, num_layers: int, dtype: str):
    return store.add_model(
        f"decode-{num_layers}-{dtype}",
        num_layers=num_layers,
        num_query_heads=NUM_QUERY_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


class KvfsWriter:
    """Makes the drive, layer by layer; `close` makes it durable."""

    def __init__(self, shape: Shape, path: Path, dtype: str):
        kvfs.format(path, 2 * shape.kv_bytes + (256 << 20))
        self._store = kvfs.open(path, cache_bytes=8 << 20)
        self._sequence = self._store.create_sequence(_add_model(self._store, shape.num_layers, dtype), SEQUENCE)

    def write(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        self._sequence.append(layer, keys, values)

    def close(self) -> None:
        self._store.close()


class Kvfs:
    """Settings: cache_bytes. New tokens stay in the tail until they fill a group, as always."""

    DTYPE = "float16"

    @staticmethod
    def options(shape: Shape) -> dict:
        """More of Store.attend's, for subclasses."""
        return {}

    @classmethod
    def tune(cls, shape: Shape, path: Path) -> int:
        """The cap less a tail per layer and what else the process keeps; compiles the kernels by the way."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            drive = Path(folder) / "compile.kvfs"
            kvfs.format(drive, "64MiB")
            with kvfs.open(drive) as store:
                model = _add_model(store, 1, cls.DTYPE)
                sequence = store.create_sequence(model, SEQUENCE)
                small = Shape(shape.cap_bytes, 1, 4 * model.group_tokens)
                sequence.append(0, *prompt(small, 0))
                sequence.flush()
                sequence.append(0, *(array[:1] for array in prompt(small, 0)))
                queries = np.zeros((1, 1, NUM_QUERY_HEADS, HEAD_DIM), np.float16)
                store.attend(0, queries, sequence)
                cls.compile(store, sequence, queries, cls.options(small))
        tail_bytes = shape.num_layers * model.group_tokens * shape.layer_bytes // shape.num_tokens
        return max(8 << 20, shape.cap_bytes - tail_bytes - OVERHEAD_BYTES)

    @staticmethod
    def compile(store, sequence, queries, options: dict) -> None:
        """What a subclass compiles beside this, on a small drive."""

    def __init__(self, shape: Shape, path: Path, cache_bytes: int):
        self._options = self.options(shape)
        self._store = kvfs.open(path, cache_bytes=cache_bytes)
        self._sequence = self._store.sequence(SEQUENCE)
        in_words = f"{self.DTYPE} pages, drive's cache {cache_bytes >> 20} MiB"
        self.setting = f"{in_words}, {GROUP_SIZE} query heads per KV head in one pass"

    def attend(self, layer: int, token: DecodedToken) -> np.ndarray:
        self._sequence.append(layer, token.keys, token.values)
        out, _ = self._store.attend(layer, token.queries[None, None], self._sequence, **self._options)
        return out[0, 0]

    def close(self) -> None:
        self._store.close()


class KvfsInt8(Kvfs):
    """The same over quantized pages: half the bytes on flash, for an error that the report shows."""

    DTYPE = "int8"
