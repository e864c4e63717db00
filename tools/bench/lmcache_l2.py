"""kvfs beside LMCache's own adapters of a disk, driven by the loops of `lmcache bench l2`.

Objects of 1 MiB, 16 at once. Every byte that is loaded is compared with what was stored, outside the measured
time. In turns, each contender stores, ends, is opened again, and loads. `cold`: its files are out of the page
cache then (kvfs and fs_native with direct I/O do not use it in any case), and kvfs has nothing of them in
memory; `warm`: LMCache's `fs` finds them in the page cache, where it has just written them. fio reads as much
of a file beside it each time.
"""

import importlib.util
import json
import os
import shutil
import statistics
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvfs_bench.decode_process import drop_from_page_cache
from kvfs_bench.figures import Figure
from kvfs_bench.limits import fio_read_bandwidth

OBJECT_BYTES = 1 << 20
OBJECTS_AT_ONCE = 16
ALIGNMENT = 4096
FIO_DEPTH = 16
DRIVE_BYTES = 16 << 30  # sparse; small drives have small superblocks, which end more often
INSTALL = "pip install 'kvfs[lmcache]'"


class LMCacheMissing(RuntimeError):
    """There is no LMCache to measure against."""

    def __init__(self):
        super().__init__(f"LMCache is not installed here: {INSTALL}")


@dataclass(frozen=True)
class Sizes:
    num_rounds: int
    num_turns: int

    @property
    def num_bytes(self) -> int:
        return self.num_rounds * OBJECTS_AT_ONCE * OBJECT_BYTES


FULL = Sizes(24, 3)
QUICK = Sizes(2, 1)


@dataclass(frozen=True)
class Contender:
    """adapter: LMCache's JSON, over a folder"""

    name: str
    adapter: dict
    is_cold: bool


def contenders(folder: Path, sizes: Sizes) -> list[Contender]:
    drive = {"path": str(folder / "kvfs" / "drive.kvfs"), "size": DRIVE_BYTES}
    kvfs = {"type": "plugin", "module_path": "kvfs.engines.lmcache", "class_name": "KvfsL2Adapter"}
    direct = {"type": "fs_native", "base_path": str(folder / "fs_native"), "use_odirect": True}
    return [
        Contender("kvfs", {**kvfs, "adapter_params": drive}, True),
        Contender("fs_native, direct", direct, True),
        Contender("fs, warm", {"type": "fs", "base_path": str(folder / "fs")}, False),
        Contender("fs, cold", {"type": "fs", "base_path": str(folder / "fs")}, True),
    ]


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """Raises LMCacheMissing."""
    if importlib.util.find_spec("lmcache") is None:
        raise LMCacheMissing
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        found: dict[str, list[tuple[float, float]]] = {}
        disk = []
        for turn in range(sizes.num_turns):
            entries = contenders(folder, sizes)
            for entry in entries[turn % len(entries) :] + entries[: turn % len(entries)]:
                found.setdefault(entry.name, []).append(_Bench(sizes).run(entry, folder))
            if (limit := _disk_limit(folder, sizes)) is not None:
                disk.append(limit)
    return _figures(found, statistics.median(disk) if disk else None)


def _disk_limit(folder: Path, sizes: Sizes) -> float | None:
    """Bytes/s of fio's direct reads of 1 MiB, 16 under way."""
    path = folder / "fio.dat"
    if not path.exists():
        part = np.random.default_rng(1).bytes(64 << 20)
        with open(path, "wb") as file:
            for _ in range(0, sizes.num_bytes, len(part)):
                file.write(part)
    drop_from_page_cache(path)
    found = fio_read_bandwidth(path, 0, path.stat().st_size, OBJECT_BYTES, (FIO_DEPTH,))
    return found and found[0]


class _Bench:
    """Memory of one round, as `lmcache bench l2` makes it: each contender's own, since what one does to it
    (kvfs has it in huge pages) would be there for the next."""

    def __init__(self, sizes: Sizes):
        from lmcache.cli.commands.bench.l2_adapter_bench import data

        self._sizes = sizes
        num_bytes = OBJECTS_AT_ONCE * OBJECT_BYTES
        self._memory = data.make_aligned_tensor(2 * num_bytes, ALIGNMENT)
        self._memory_desc = data.create_l1_memory_desc(self._memory, ALIGNMENT)
        to_store, to_load = (
            data.make_memory_objects(self._memory, OBJECTS_AT_ONCE, OBJECT_BYTES, start)
            for start in (0, num_bytes)
        )
        self._to_store, self._to_load = to_store, to_load
        self._stored, self._loaded = self._memory.numpy().view(np.uint64).reshape(2, -1)
        self._noise = np.random.default_rng(0).integers(0, 1 << 64, len(self._stored), np.uint64)

    def _open(self, adapter: dict):
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

        config = parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(adapter)]))
        return create_l2_adapter(config.adapters[0], l1_memory_desc=self._memory_desc)

    def _keys(self, number: int) -> list[list]:
        from lmcache.cli.commands.bench.l2_adapter_bench.data import make_object_keys

        return [make_object_keys(OBJECTS_AT_ONCE, key_offset=number * OBJECTS_AT_ONCE)]

    def _content(self, number: int) -> np.ndarray:
        """Of a round: noise that no other round has."""
        return self._noise + np.uint64(number)

    def _fill(self, number: int) -> list[list]:
        self._stored[:] = self._content(number)
        return [self._to_store]

    def _verify(self, number: int) -> None:
        if not np.array_equal(self._loaded, self._content(number)):
            raise RuntimeError(f"round {number}: what was loaded is not what was stored")

    def _check_then_load(self, number: int) -> list[list]:
        """The round before is compared between the measured times."""
        if number:
            self._verify(number - 1)
        return [self._to_load]

    def run(self, contender: Contender, folder: Path) -> tuple[float, float]:
        """(stored, loaded) bytes/s, medians of the rounds."""
        from lmcache.cli.commands.bench.l2_adapter_bench.runner import bench_load, bench_store

        place = folder / contender.adapter["type"].replace("plugin", "kvfs")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.sync()  # nothing of the one before is still on its way to the disk
        rates = []
        for bench, memory in ((bench_store, self._fill), (bench_load, self._check_then_load)):
            adapter = self._open(contender.adapter)
            try:
                shape = 1, OBJECTS_AT_ONCE, OBJECT_BYTES, self._sizes.num_rounds
                result = bench(adapter, *shape, self._keys, memory, lambda text: None)
                if sum(result.success_counts) != self._sizes.num_rounds * OBJECTS_AT_ONCE:
                    raise RuntimeError(f"{contender.name}: not all objects were transferred: {result}")
            finally:
                adapter.close()
            rates.append(OBJECTS_AT_ONCE * OBJECT_BYTES / statistics.median(result.round_durations))
            if contender.is_cold:
                for file in filter(Path.is_file, place.rglob("*")):
                    drop_from_page_cache(file)
        self._verify(self._sizes.num_rounds - 1)
        shutil.rmtree(place)
        return rates[0], rates[1]


def _figures(found: dict[str, list[tuple[float, float]]], disk: float | None) -> list[Figure]:
    """Medians over the turns, of rates and of ratios within a turn."""
    figures = []
    for which, operation in enumerate(("store", "load")):
        ours = [turn[which] for turn in found["kvfs"]]
        for name, goal in (("fs_native, direct", 1.5), ("fs, warm", 1.0), ("fs, cold", None)):
            theirs = [turn[which] for turn in found[name]]
            if operation == "store":
                goal = 1.0
            ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
            value, rival_value = statistics.median(ours) / 1e9, statistics.median(theirs) / 1e9
            label = f"lmcache_l2.{operation}.over {name}"
            limit = disk / 1e9 if disk and operation == "load" else None
            figures.append(Figure(label, value, "GB/s", name, rival_value, ratio, limit))
            figures.append(Figure(f"{label}.ratio", ratio, "", goal=goal))
        if disk and operation == "load":
            figures.append(Figure("lmcache_l2.load.of the disk", statistics.median(ours) / disk, ""))
            figures.append(Figure("lmcache_l2.disk, 1 MiB direct, depth 16", disk / 1e9, "GB/s"))
    return figures
