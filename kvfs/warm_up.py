"""Compiling ahead: what the first appends, flushes and attention of a machine would otherwise wait for.

Kernels are compiled on first use and kept on disk, most of them once for a machine, the attention's once for
each shape of a model: some seconds, which the first user sees. A small drive that is used once has them made.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import kvfs

NUM_REST = 88  # tokens beside a whole group: the drive attends over that, the host over some of these
DRIVE_BYTES = 64 << 20


class Shape(NamedTuple):
    """What an attention kernel is compiled for. group_size: query heads of a KV head."""

    dtype: str
    head_dim: int
    group_size: int


# of Llama 3 and Qwen 2 and 3, and their small ones
COMMON_SHAPES = (
    *(Shape(dtype, head_dim, 4) for dtype in ("float16", "bfloat16") for head_dim in (64, 128)),
    Shape("bfloat16", 128, 8),
)


def shapes_of(store) -> list[Shape]:
    """Of a store's models."""
    return sorted(
        {
            Shape(model.dtype, model.head_dim, model.num_query_heads // model.num_kv_heads)
            for model in store.models()
        }
    )


def warm_up(
    shapes: Iterable[Shape] = COMMON_SHAPES, report: Callable[[Shape, float], None] = lambda *_: None
) -> None:
    """Compile, or find on disk, what models of these shapes need. report: called with each and its seconds.

    Raises InvalidArgument for a shape that no model has.
    """
    with tempfile.TemporaryDirectory(prefix="kvfs-warm-up-") as folder:
        path = Path(folder, "drive.kvfs")
        kvfs.format(path, DRIVE_BYTES)
        with kvfs.open(path, cache_bytes="8MiB") as store:
            for shape in shapes:
                started = time.perf_counter()
                _use(store, shape)
                report(shape, time.perf_counter() - started)


def _use(store, shape: Shape) -> None:
    name = "-".join(map(str, shape))
    model = store.add_model(
        name,
        num_layers=1,
        num_query_heads=shape.group_size,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )
    sequence = store.create_sequence(model, name)
    for num_tokens, dtype in (model.group_tokens, np.float32), (NUM_REST, model.geometry.numpy_dtype):
        rows = np.ones((num_tokens, 1, shape.head_dim), np.float32).astype(dtype)
        sequence.append(0, rows, rows)
    sequence.flush()
    for num_queries in (1, 2):
        queries = np.ones((1, num_queries, shape.group_size, shape.head_dim), np.float32)
        store.attend(0, queries.astype(model.geometry.numpy_dtype), [sequence])
    store.delete_sequence(name)
