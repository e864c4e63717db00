"""How fast sparse attention decodes from flash: the decode benchmark's turns, on keys like a model's own.

Contenders read the same tokens from the same disk within the same memory cap. "Cold": the drive's cache is
emptied before each token, so that every page comes from flash. Sketches are measured twice: cold, and with a
cache that keeps what it can, as FlexGen's way keeps the layers that its cap has room for.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvfs_bench import decode
from kvfs_bench.decode_kvfs import Kvfs, KvfsWriter
from kvfs_bench.decode_process import drop_from_page_cache
from kvfs_bench.decode_rivals import FlexGen, LayerFile
from kvfs_bench.decode_shape import Shape, reference
from kvfs_bench.figures import Figure
from kvfs_bench.sparse_quality import COMPRESSION, PUBLISHED_CHANNELS, PUBLISHED_PART
from kvfs_bench.sparse_statistics import HeadStatistics

FULL, QUICK = decode.FULL, decode.QUICK
TURNS = 3
DENSE, SKETCH, SPARF, FLEXGEN = decode.KVFS, "kvfs_sketch", "kvfs_sparf", decode.FLEXGEN
KEPT = "kvfs_sketch_kept"
RATIO_GOAL = {DENSE: 4.0, FLEXGEN: 11.1}
MB, GB = 1e6, 1e9


class ColdKvfs(Kvfs):
    """kvfs whose cache is empty when a token begins."""

    def attend(self, layer: int, token) -> np.ndarray:
        if layer == 0:
            self._store._drive.cache.clear()
        return super().attend(layer, token)


class ColdSketch(ColdKvfs):
    DERIVE = "sketch"

    @staticmethod
    def options(shape: Shape) -> dict:
        return {"compression": COMPRESSION}

    @classmethod
    def compile(cls, store, sequence, queries, options: dict) -> None:
        sequence.flush()
        sequence.seal(cls.DERIVE)
        store._drive.cache.clear()  # a call whose pages are all cached is answered by them, and compiles less
        store.attend(0, queries, sequence, **options)


class KeptSketch(ColdSketch):
    """The cache stays as it is: sketches have priority in it."""

    attend = Kvfs.attend


class ColdSparF(ColdSketch):
    DERIVE = "channel_major_keys"

    @staticmethod
    def options(shape: Shape) -> dict:
        return {"sparf": (PUBLISHED_CHANNELS, shape.num_tokens // PUBLISHED_PART)}


class SealedWriter(KvfsWriter):
    """A drive with what a sparse method reads."""

    def __init__(self, shape: Shape, path: Path, contender: type[ColdSketch]):
        super().__init__(shape, path, contender.DTYPE)
        self._derive = contender.DERIVE

    def close(self) -> None:
        self._sequence.flush()
        self._sequence.seal(self._derive)
        super().close()


CLASSES = {DENSE: ColdKvfs, SKETCH: ColdSketch, KEPT: KeptSketch, SPARF: ColdSparF, FLEXGEN: FlexGen}
MEANING = {
    DENSE: "kvfs, all pages",
    SPARF: f"SparF as published, r {PUBLISHED_CHANNELS}, k 1/{PUBLISHED_PART}",
    FLEXGEN: decode.MEANING[FLEXGEN],
}


def _write(shape: Shape, folder: Path, status: Callable[[str], None]) -> dict[str, Path]:
    paths = {name: folder / name for name in CLASSES}
    writers = [
        KvfsWriter(shape, paths[DENSE], Kvfs.DTYPE),
        SealedWriter(shape, paths[SKETCH], ColdSketch),
        SealedWriter(shape, paths[KEPT], KeptSketch),
        SealedWriter(shape, paths[SPARF], ColdSparF),
        LayerFile(shape, paths[FLEXGEN], is_head_major=False),
    ]
    decode.write_prompt(shape, writers, status)
    for path in paths.values():
        drop_from_page_cache(path)
    return paths


def measure(
    directory: Path, heads: HeadStatistics, quick: bool, status: Callable[[str], None]
) -> tuple[list[Figure], dict[str, str]]:
    """(figures, settings in words)."""
    shape = replace(QUICK if quick else FULL, statistics=heads)
    runs, disk, settings = decode.measure_shape(
        shape, directory, 1 if quick else TURNS, status, CLASSES, _write
    )
    return list(_figures(shape, runs, disk)), settings


def _figures(shape: Shape, runs: dict[str, decode.Run], disk: decode.Disk) -> Iterator[Figure]:
    ours = runs[SKETCH]
    for name in (DENSE, SPARF, FLEXGEN):
        ratio = ours.tokens_per_second / runs[name].tokens_per_second
        yield Figure(
            f"sparse.speed.ratio_vs_{name}",
            ratio,
            "ratio",
            rival=MEANING[name],
            rival_value=runs[name].tokens_per_second,
            ratio=ratio,
            goal=RATIO_GOAL.get(name),
        )
    for name in (DENSE, FLEXGEN):
        ratio = runs[KEPT].tokens_per_second / runs[name].tokens_per_second
        yield Figure(f"sparse.speed.kept_vs_{name}", ratio, "ratio", goal=RATIO_GOAL[name])
    expected = reference(shape, shape.checked_layer, ours.num_steps)
    for name, run in runs.items():
        limit = disk.bandwidth / run.disk_bytes if disk.bandwidth and run.disk_bytes else None
        yield Figure(f"sparse.speed.{name}.tokens_per_second", run.tokens_per_second, "tokens/s", limit=limit)
        yield Figure(
            f"sparse.speed.{name}.disk_bytes_per_token",
            run.disk_bytes / MB,
            "MB",
            rival="all of K and V",
            rival_value=shape.kv_bytes / MB,
            ratio=run.disk_bytes / shape.kv_bytes,
        )
        yield Figure(f"sparse.speed.{name}.disk_bandwidth", run.disk_bandwidth / GB, "GB/s")
        cpu = statistics.mean(step.cpu_seconds for step in run.steps)
        yield Figure(f"sparse.speed.{name}.cpu_seconds_per_token", cpu, "s")
        error = np.linalg.norm(run.out - expected) / np.linalg.norm(expected)
        yield Figure(f"sparse.speed.{name}.relative_error", float(error), "of the output, L2")
