"""A small drive, or a set of them, filled with K/V of the planned geometry, to be measured and removed."""

import os
import queue
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from accel.page_cache import LINE_BYTES
from accel.sketch.selection import run_of
from kvfs.layout import GroupLayout, KvGeometry
from kvfs_bench.planner.rates import INLINE_BYTES, WINDOW_BYTES
from spdk_glue import dma

COMMAND_BYTES = 64 << 20  # of K and V at most: as many windows as a drive pins at once
COLD_BYTES = 256 << 20  # read once in a round: what lies below a virtual disk may keep less
CACHED_BYTES = 96 << 20  # more than the CPUs' caches
MAX_LAYERS = 128
READERS = 2  # of each drive, as its attention unit has
ROUNDS = 3
TAIL_STEPS = 21
CACHED_SECONDS = 0.3  # of a round
MAX_REPEATS = 50
SPARE_BYTES = 96 << 20  # of a drive: catalogue and reserve
MIN_CACHE_BYTES = 32 << 20
MAX_CACHE_BYTES = 1 << 30
SPAN_BYTES = 64 << 20  # see accel/attention_job.py: of a small cache a third
RANDOM_PAGES = 512
TARGET_BYTES = 64 << 20
MODEL = "probe"


def random_rows(geometry: KvGeometry, num_tokens: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [num_tokens, num_kv_heads, head_dim] as users append them."""
    random = np.random.default_rng(seed)
    shape = (num_tokens, geometry.num_kv_heads, geometry.head_dim)
    return tuple(random.standard_normal(shape, np.float32).astype(geometry.numpy_dtype) for _ in range(2))


@contextmanager
def temporary_drives(places: list[Path], num_drives: int, size_bytes: int) -> Iterator[list[Path] | Path]:
    """New drives in temporary folders of `places`, dealt out in turn: a path, of several a list."""
    with ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place, prefix="kvfs-plan-")))
            for place in places[:num_drives]
        ]
        paths = [folders[i % len(folders)] / f"drive-{i}.kvfs" for i in range(num_drives)]
        location = paths if num_drives > 1 else paths[0]
        kvfs.format(location, size_bytes)
        yield location


def add_model(store, name: str, geometry: KvGeometry, num_layers: int | None = None):
    return store.add_model(
        name,
        num_layers=num_layers or geometry.num_layers,
        num_query_heads=geometry.num_query_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
    )


def stores_of(store) -> list:
    """The store of each drive."""
    members = getattr(store, "_members", None)
    return [store] if members is None else [member.store for member in members.values()]


@dataclass(frozen=True)
class ProbeSize:
    """num_tokens: of each of `batch` sequences, whole groups; num_layers: that make up COLD_BYTES."""

    num_tokens: int
    num_layers: int
    command_bytes: int
    planned_cache_bytes: int | None = None  # of all drives; None where everything fits in it

    @staticmethod
    def of(
        geometry: KvGeometry,
        page_size: int,
        num_tokens: int,
        batch: int,
        planned_cache_bytes: int | None = None,
    ) -> "ProbeSize":
        """As the planned command if that is small, else COMMAND_BYTES of it; one group at least."""
        layout = GroupLayout(geometry, page_size)
        group_bytes = batch * layout.image_bytes
        groups = max(1, min(num_tokens // geometry.group_tokens, COMMAND_BYTES // group_bytes))
        command_bytes = groups * group_bytes
        num_layers = max(2, min(MAX_LAYERS, -(-COLD_BYTES // command_bytes)))
        return ProbeSize(groups * geometry.group_tokens, num_layers, command_bytes, planned_cache_bytes)

    def drive_bytes(self, num_layers: int) -> int:
        """Room for so many layers, and what may be derived of them."""
        return 2 * num_layers * self.command_bytes + SPARE_BYTES

    @property
    def cached_layers(self) -> int:
        wanted = min(self.num_layers, -(-CACHED_BYTES // self.command_bytes))
        if self.planned_cache_bytes is not None:
            wanted = min(wanted, self.planned_cache_bytes * 3 // 4 // self.command_bytes)
        return max(1, wanted)

    @property
    def cache_bytes(self) -> int:
        """Of all drives: as planned where it is the limit, for it bounds what is pinned and read at once; else
        room for cached_layers, and for a command to be pinned in a third of it."""
        if self.planned_cache_bytes is not None:
            return min(self.planned_cache_bytes, MAX_CACHE_BYTES)
        return max(MIN_CACHE_BYTES, 4 * self.command_bytes, self.cached_layers * self.command_bytes * 4 // 3)


@dataclass(frozen=True)
class Commands:
    """Medians of a step's parts. kernel: seconds of all workers together in an attend call."""

    append: float
    attend: float
    kernel: float


@dataclass(frozen=True)
class ColdCommand:
    """Seconds of an attend call from flash, and bytes/s of reading a layer in other ways at that moment: into
    memory in a row, into scattered lines, and around what is cached; cpu: seconds of a byte."""

    attend: float
    in_a_row: float
    media: float
    around_cached: float
    cpu: float


class ProbeDrive:
    """`batch` sequences of size.num_tokens tokens in size.num_layers layers, and a token at a time on top."""

    def __init__(self, store, geometry: KvGeometry, size: ProbeSize, batch: int):
        self.store, self.geometry, self.size, self.batch = store, geometry, size, batch
        model = add_model(store, MODEL, geometry, size.num_layers)
        self.sequences = [store.create_sequence(model, f"probe-{i}") for i in range(batch)]
        rows = random_rows(geometry, size.num_tokens)
        for layer in range(size.num_layers):
            for sequence in self.sequences:
                sequence.append(layer, *rows)
        store.flush()
        self._token = random_rows(geometry, 1)
        shape = (batch, 1, geometry.num_query_heads, geometry.head_dim)
        self._queries = np.random.default_rng(2).standard_normal(shape).astype(np.float16)
        self._stores = stores_of(store)
        readers = READERS if size.command_bytes // len(self._stores) > INLINE_BYTES else 1
        self._readers = [ThreadPoolExecutor(readers) for _ in self._stores]
        most = max(len(lbas) for one in self._stores for lbas in self._windows(one, 0, 0.0))
        self._targets = {scattered: _Targets(most, self._page_size, scattered) for scattered in (False, True)}

    # steps

    def _step(self, layer: int) -> tuple[float, float]:
        begun = time.perf_counter()
        for sequence in self.sequences:
            sequence.append(layer, *self._token)
        appended = time.perf_counter()
        self.store.attend(layer, self._queries, self.sequences)
        return appended - begun, time.perf_counter() - appended

    def commands(self, layers: Iterable[int]) -> Commands:
        before = self._kernel_ns()
        found = [self._step(layer) for layer in layers]
        kernel = (self._kernel_ns() - before) / 1e9 / len(found)
        append, attend = (statistics.median(column) for column in zip(*found, strict=True))
        return Commands(append, attend, kernel)

    def _kernel_ns(self) -> int:
        return sum(store.counters()["attention"]["kernel_ns"] for store in stores_of(self.store))

    def clear_cache(self) -> None:
        for store in stores_of(self.store):
            store._drive.cache.clear()

    def cached(self) -> Commands:
        """Of layers that are in the cache."""
        layers = range(self.size.cached_layers)
        begun = time.perf_counter()
        self.commands(layers)  # into the cache
        self.commands(layers)
        once = (time.perf_counter() - begun) / 2
        return self.commands([*layers] * max(1, min(MAX_REPEATS, round(CACHED_SECONDS / once))))

    def cold(self, share_cached: float) -> list["ColdCommand"]:
        """Of layers none of which is in the cache; between them other layers are read in other ways."""
        self.clear_cache()
        found = []
        for layer in self._layers:
            other = (layer + self.size.num_layers // 2) % self.size.num_layers
            in_a_row, _ = self.media(other, 0.0, scattered=False)
            _, attend = self._step(layer)
            media, cpu = self.media(other, 0.0)
            around = self.media(other, share_cached)[0] if 0 < share_cached < 1 else media
            found.append(ColdCommand(attend, in_a_row, media, around, cpu))
        return found

    def tail(self) -> float:
        """Seconds of the host for each token of a tail: a layer with many of them beside one with few."""
        count = self.geometry.group_tokens * 3 // 4
        rows = random_rows(self.geometry, count)
        for sequence in self.sequences:
            sequence.append(0, *rows)
        pairs = [(self._step(0)[1], self._step(1)[1]) for _ in range(TAIL_STEPS)]
        longer = statistics.median(many - few for many, few in pairs)
        return max(0.0, longer / count / self.batch)

    def spill(self, append: float) -> float:
        """Seconds that an append takes longer if it fills a group."""
        group_tokens, found = self.geometry.group_tokens, []
        for layer in range(1, min(self.size.num_layers, 9)):
            sequence = self.sequences[0]
            missing = group_tokens - 1 - sequence.layer_tokens(layer) % group_tokens
            if missing:
                sequence.append(layer, *random_rows(self.geometry, missing))
            begun = time.perf_counter()
            sequence.append(layer, *self._token)
            found.append(time.perf_counter() - begun)
        return max(0.0, statistics.median(found) - append)

    # the media alone

    def media(self, layer: int, share_cached: float, scattered: bool = True) -> tuple[float, float]:
        """(bytes/s of all drives together, CPU seconds of a byte), one layer read as a command does.

        share_cached: lines of the cache that are left out, anywhere: requests are shorter then
        scattered: to lines anywhere in memory, as a cache that has been in use has its slots; else in a row
        """
        windows = [self._windows(store, layer, share_cached) for store in self._stores]
        begun = time.perf_counter()
        waiting = [
            pool.submit(_read, store._drive.ftl, lbas, self._targets[scattered])
            for store, pool, of_drive in zip(self._stores, self._readers, windows, strict=True)
            for lbas in of_drive
        ]
        cpu = sum(one.result() for one in waiting)
        seconds = time.perf_counter() - begun
        num_bytes = sum(len(lbas) for of_drive in windows for lbas in of_drive) * self._page_size
        if not num_bytes:  # a small layer of which all lines are left out
            return self.media(layer, 0.0, scattered)
        return num_bytes / seconds, cpu / num_bytes

    def close(self) -> None:
        """Delete what was made, and end the readers."""
        for pool in self._readers:
            pool.shutdown()
        for sequence in self.sequences:
            self.store.delete_sequence(sequence.name)

    def media_random(self) -> float:
        """Bytes/s of the first drive for pages anywhere in what was written, in runs as units are chosen in."""
        store = stores_of(self.store)[0]
        lbas = np.concatenate([lbas for layer in self._layers for lbas in self._windows(store, layer, 0.0)])
        run = run_of(self._page_size // self.geometry.head_dim)
        runs = np.sort(lbas)[: len(lbas) // run * run].reshape(-1, run)
        num_runs = max(1, min(RANDOM_PAGES, len(lbas) // 4) // run)
        chosen = np.random.default_rng(3).choice(runs, num_runs, replace=False).reshape(-1)
        count = len(chosen)
        target = _Targets(count, self._page_size, scattered=True)
        begun = time.perf_counter()
        _read(store._drive.ftl, chosen, target)
        return count * self._page_size / (time.perf_counter() - begun)

    @property
    def _page_size(self) -> int:
        return stores_of(self.store)[0]._drive.ftl.page_size

    @property
    def _layers(self) -> range:
        return range(self.size.num_layers)

    def _windows(self, store, layer: int, share_cached: float) -> list[np.ndarray]:
        """LBAs of a layer on one drive, as a command cuts them into spans and those into windows, less what is
        cached; none where the drive has no heads."""
        sequences = [one for one in store.sequences() if one.model.name.partition("/")[0] == MODEL]
        if not sequences:
            return []
        layout = sequences[0].model.layout
        whole = self.size.num_tokens // self.geometry.group_tokens
        bases = [group.base_lba for sequence in sequences for group in sequence._groups[:whole]]
        lbas = np.concatenate(
            [np.arange(layout.layer_lbas) + base + layer * layout.layer_lbas for base in bases]
        )
        missing = self._is_missing(lbas, share_cached, layer)
        if len(lbas) * layout.page_size <= INLINE_BYTES:
            parts = [slice(None)]
        else:
            span = min(SPAN_BYTES, store._drive.cache.capacity_bytes // 3) // layout.page_size
            window = WINDOW_BYTES // layout.page_size
            parts = [
                slice(first, min(first + window, start + span))
                for start in range(0, len(lbas), span)
                for first in range(start, min(start + span, len(lbas)), window)
            ]
        windows = [lbas[part][missing[part]] for part in parts]
        return [window for window in windows if len(window)]

    def _is_missing(self, lbas: np.ndarray, share_cached: float, seed: int) -> np.ndarray:
        """Which pages of a layer are read; they lie in a row, so that lines of the cache are runs."""
        line_pages = LINE_BYTES // self._page_size
        starts = np.flatnonzero(lbas % line_pages == 0)
        line = np.searchsorted(starts, np.arange(len(lbas)), side="right")
        return (np.random.default_rng(seed).random(len(starts) + 1) >= share_cached)[line]


class _Targets:
    """Memory that readers read into in turn: more than the CPUs' caches, as a drive's cache is."""

    def __init__(self, num_pages: int, page_size: int, scattered: bool):
        line_pages = LINE_BYTES // page_size
        num_lines = -(-num_pages // line_pages)
        count = max(READERS + 1, TARGET_BYTES // (num_lines * LINE_BYTES))
        self._memory = dma.allocate(count * num_lines * LINE_BYTES)
        self._memory[:] = 0
        lines = dma.page_addresses(self._memory, page_size).reshape(-1, line_pages)
        if scattered:
            lines = np.random.default_rng(5).permutation(lines)
        self.free: queue.Queue[np.ndarray] = queue.Queue()
        for addresses in lines.reshape(count, -1):
            self.free.put(addresses)


def _read(ftl, lbas: np.ndarray, targets: _Targets) -> float:
    """CPU seconds of reading pages in physical order, checksums verified."""
    begun = time.thread_time()
    addresses = targets.free.get()
    pages = ftl.resolve(lbas)
    order = np.argsort(pages)
    ftl.read_physical(pages[order], lbas[order], addresses[: len(lbas)])
    targets.free.put(addresses)
    return time.thread_time() - begun


def num_cpus() -> int:
    return len(os.sched_getaffinity(0))
