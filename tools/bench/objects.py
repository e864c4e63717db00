"""Keyed objects against files of the same bytes on the same disk, and the cap against an ideal LRU.

Put and get of 1 MiB objects, in batches, from and to memory that is aligned as engines' pinned memory is.
Beside them, in turns in the same run: a file per object written and read with O_DIRECT by as many threads as
are best, as engines' file backends do, and fio on the drive's own file. All reads are cold: none goes through
the kernel's cache, and the drive keeps no object in memory.
"""

import os
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import limits
from kvfs_bench.figures import Figure
from spdk_glue import dma

OBJECT_BYTES = 1 << 20
BATCH = 16  # objects of one call
FILE_THREADS = (4, 16)  # of the rival; its best counts
GB = 1e9
# the trace: more is offered than fits, some of it again and again
TRACE_OBJECT_BYTES = 16 << 10
TRACE_EXPONENT = 1.0  # of Zipf's law
TRACE_SEED = 7


@dataclass(frozen=True)
class Sizes:
    num_objects: int
    rounds: int
    cap_objects: int
    trace_length: int


FULL = Sizes(512, 3, 256, 20_000)
QUICK = Sizes(32, 1, 16, 400)


def _median(values: list[float]) -> float:
    return statistics.median(values)


# transfers


class Files:
    """A file per object: written whole and synced, or read whole, past the kernel's cache."""

    def __init__(self, folder: Path, num_threads: int):
        self.folder = folder
        self._threads = ThreadPoolExecutor(num_threads)

    def put(self, keys: list[bytes], objects: list[np.ndarray]) -> None:
        list(self._threads.map(self._write, keys, objects))

    def get(self, keys: list[bytes], buffers: list[np.ndarray]) -> None:
        list(self._threads.map(self._read, keys, buffers))

    def _open(self, key: bytes, flags: int) -> int:
        return os.open(self.folder / key.hex(), flags | os.O_DIRECT, 0o600)

    def _write(self, key: bytes, data: np.ndarray) -> None:
        descriptor = self._open(key, os.O_WRONLY | os.O_CREAT)
        try:
            if os.pwritev(descriptor, [data], 0) != data.nbytes:
                raise OSError("a short write")
        finally:
            os.close(descriptor)

    def _read(self, key: bytes, buffer: np.ndarray) -> None:
        descriptor = self._open(key, os.O_RDONLY)
        try:
            if os.preadv(descriptor, [buffer], 0) != buffer.nbytes:
                raise OSError("a short read")
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def close(self) -> None:
        self._threads.shutdown()


def _timed(call: Callable, keys: list[bytes], memory: np.ndarray, end: Callable = lambda: None) -> float:
    """Bytes/s of a call for all keys, in batches through memory [batch, object bytes]."""
    started = time.perf_counter()
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH]
        call(part, list(memory[: len(part)]))
    end()
    return len(keys) * memory.shape[1] / (time.perf_counter() - started)


def _transfers(folder: Path, sizes: Sizes) -> Iterator[Figure]:
    total = sizes.num_objects * OBJECT_BYTES
    path = folder / "drive.kvfs"
    kvfs.format(path, 3 * total + (256 << 20))
    memory = dma.allocate(BATCH * OBJECT_BYTES).reshape(BATCH, OBJECT_BYTES)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
    data = memory.copy()
    keys = [number.to_bytes(8, "big") for number in range(sizes.num_objects)]
    rivals = {}
    for num_threads in FILE_THREADS:
        place = folder / f"files-{num_threads}"
        place.mkdir()
        rivals[num_threads] = Files(place, num_threads)
    found: dict[str, list[float]] = {"put": [], "get": [], "one_get": [], "fio_read": [], "fio_write": []}
    files: dict[tuple[str, int], list[float]] = {}
    with kvfs.open(path, cache_bytes="8MiB") as store:
        cache = store.object_cache("bench")
        data_start = store._drive.ftl.media.layout.data_start
        for _ in range(sizes.rounds):
            store.drop_objects("bench")
            store.flush()
            found["put"].append(_timed(cache.put, keys, memory, store.flush))
            memory[:] = 0
            found["get"].append(_timed(cache.get, keys, memory))
            if not np.array_equal(memory, data):
                raise RuntimeError("an object has other bytes than were stored")
            order = np.random.default_rng(1).permutation(len(keys))[: len(keys) // 4]
            started = time.perf_counter()
            for number in order.tolist():
                cache.get([keys[number]], [memory[0]])
            found["one_get"].append(len(order) * OBJECT_BYTES / (time.perf_counter() - started))
            memory[:] = data
            for num_threads, rival in rivals.items():
                rival.clear()
                files.setdefault(("put", num_threads), []).append(_timed(rival.put, keys, memory, rival.sync))
                files.setdefault(("get", num_threads), []).append(_timed(rival.get, keys, memory))
            raw = limits.fio_read_bandwidth(path, data_start, total, OBJECT_BYTES, (4, 16))
            if raw:
                found["fio_read"].append(raw[0])
                found["fio_write"].append(limits.fio_write_bandwidth(folder, total, OBJECT_BYTES, (8,))[0])
        usage = cache.usage()
        if usage.misses["damaged"] or usage.evictions or usage.objects != len(keys):
            raise RuntimeError(f"not all objects were there: {usage}")
    for rival in rivals.values():
        rival.close()
    for kind, disk in (("put", "fio_write"), ("get", "fio_read")):
        ours = _median(found[kind])
        num_threads = max(FILE_THREADS, key=lambda count: _median(files[kind, count]))
        theirs = _median(files[kind, num_threads])
        limit = _median(found[disk]) if found[disk] else None
        yield Figure(
            f"objects.{kind}.bandwidth",
            ours / GB,
            "GB/s",
            rival=f"a file per object, O_DIRECT, {num_threads} threads",
            rival_value=theirs / GB,
            ratio=ours / theirs,
            limit=limit / GB if limit else None,
        )
        yield Figure(f"objects.{kind}.over_files", ours / theirs, "ratio", goal=1.0)
        if limit:
            yield Figure(f"objects.{kind}.fraction_of_device_bandwidth", ours / limit, "fraction")
    yield Figure("objects.get_one_at_a_time.bandwidth", _median(found["one_get"]) / GB, "GB/s")


# the cap


class IdealLru:
    """What a cache of so many objects of one size could hit."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._order: OrderedDict[int, None] = OrderedDict()

    def access(self, key: int) -> bool:
        is_hit = key in self._order
        self._order[key] = None
        self._order.move_to_end(key)
        if len(self._order) > self._capacity:
            self._order.popitem(last=False)
        return is_hit


def _trace(sizes: Sizes) -> np.ndarray:
    """Objects in the order in which they are wanted: ten times as many kinds as fit, by Zipf's law, and the
    popular ones change with time."""
    random = np.random.default_rng(TRACE_SEED)
    kinds = 10 * sizes.cap_objects
    weights = np.arange(1, kinds + 1) ** -TRACE_EXPONENT
    ranks = random.choice(kinds, sizes.trace_length, p=weights / weights.sum())
    drift = np.arange(sizes.trace_length) * kinds // (4 * sizes.trace_length)
    return (ranks + drift) % kinds


def _cap(folder: Path, sizes: Sizes) -> Iterator[Figure]:
    path = folder / "cap.kvfs"
    capacity = sizes.cap_objects * TRACE_OBJECT_BYTES
    kvfs.format(path, max(64 << 20, 4 * capacity))
    ideal = IdealLru(sizes.cap_objects)
    ideal_hits = hits = 0
    most = 0
    offered: set[int] = set()
    data = dma.allocate(TRACE_OBJECT_BYTES)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        cache = store.object_cache("trace", capacity_bytes=capacity)
        for kind in _trace(sizes).tolist():
            ideal_hits += ideal.access(kind)
            key = kind.to_bytes(8, "big")
            if cache.get([key], [data])[0]:
                hits += 1
                if int(data[:8].view(np.int64)[0]) != kind:
                    raise RuntimeError("an object of another key")
            else:
                data[:8].view(np.int64)[0] = kind
                offered.add(kind)
                if not cache.put([key], [data])[0]:
                    raise RuntimeError("an object was refused")
            most = max(most, cache.usage().bytes)
        evicted = cache.usage().evictions
        offered_bytes = (cache.usage().objects + evicted) * TRACE_OBJECT_BYTES
        if problems := store.check():
            raise RuntimeError(problems[0])
    yield Figure("objects.cap.offered_over_cap", offered_bytes / capacity, "ratio", goal=10.0)
    yield Figure("objects.cap.most_used_over_cap", most / capacity, "ratio", goal=1.0, goal_is_maximum=True)
    ours, theirs = hits / sizes.trace_length, ideal_hits / sizes.trace_length
    yield Figure(
        "objects.cap.hit_rate",
        ours,
        "fraction",
        rival="ideal LRU, simulated",
        rival_value=theirs,
        ratio=ours / theirs if theirs else None,
        goal=theirs,
    )


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """All figures; files are made in a temporary folder of `directory` and removed."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as scratch:
        return [*_transfers(Path(scratch), sizes), *_cap(Path(scratch), sizes)]
