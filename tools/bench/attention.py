"""Dense decode attention from DRAM and from flash, appending, accuracy, and quantized pages.

All parts go through the store, so what is measured is what a user gets: NVMe command, page resolution,
cache, kernels, merge. Rivals run in the same process on the same tokens.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench import limits, quantized
from kvfs_bench.figures import Figure

LAYER = 0
NUM_KV_HEADS = 8
HEAD_DIM = 128
WARM_TOKENS = 16_384
GROUP_SIZES = (1, 4, 8)
RATIO_GOAL = {1: 1.2, 4: 2.5, 8: 4.0}  # to torch
FRACTION_GOAL = {1: 0.8, 4: 0.7, 8: 0.6}  # of memory bandwidth
ROUNDS = 7
ROUND_SECONDS = 0.15
SETTLE_SECONDS = 0.05  # threads of the last call may still spin
DISK_ROUNDS = 3
APPEND_ROUNDS = 4
DISK_REST_SECONDS = 2
READ_REQUEST_BYTES = 256 << 10  # the drive's, so fio reads with the same
GB = 1e9


def _tokens(num_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 keys and values [num_tokens, NUM_KV_HEADS, HEAD_DIM]."""
    random = np.random.default_rng(seed)
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return tuple(random.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))


def _queries(group_size: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((1, 1, NUM_KV_HEADS * group_size, HEAD_DIM)).astype(np.float32)


def _add_model(store, group_size: int, dtype: str = "float16", num_layers: int = 1):
    return store.add_model(
        f"g{group_size}-{dtype}-{num_layers}",
        num_layers=num_layers,
        num_query_heads=NUM_KV_HEADS * group_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


def _call_seconds(function) -> float:
    """Seconds per call, called for ROUND_SECONDS on end, as decoding does."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < ROUND_SECONDS:
        function()
        count += 1
    return elapsed / count


def _torch_calls(keys, values, queries) -> dict[str, tuple[int, Callable]]:
    """dtype: (bytes of K and V as stored, a call of torch SDPA on them); empty without torch."""
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    calls = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        key, value = (
            torch.from_numpy(array).to(dtype).permute(1, 0, 2).unsqueeze(0).contiguous()
            for array in (keys, values)
        )
        query = torch.from_numpy(queries).to(dtype).permute(0, 2, 1, 3).contiguous()

        def attend(query=query, key=key, value=value):
            with torch.inference_mode():
                scaled_dot_product_attention(query, key, value, enable_gqa=True)

        calls[str(dtype).removeprefix("torch.")] = (2 * key.numel() * key.element_size(), attend)
    return calls


def measure_in_rounds(
    calls: dict[str, tuple[int, Callable]], rounds: int = ROUNDS
) -> tuple[dict[str, float], float]:
    """(bytes/s of each call, of reading memory), medians over rounds in which each has its turn: the speed of
    a shared machine drifts, and the same drift must meet all."""
    found = {name: [] for name in calls}
    memory = []
    for _, call in calls.values():
        call()  # caches, compiled code
    for _ in range(rounds):
        memory.append(limits.memory_read_bandwidth(len(os.sched_getaffinity(0)), repeats=3))
        for name, (num_bytes, call) in calls.items():
            time.sleep(SETTLE_SECONDS)
            found[name].append(num_bytes / _call_seconds(call))
    return {name: statistics.median(values) for name, values in found.items()}, statistics.median(memory)


def _warm(directory: Path, num_tokens: int) -> Iterator[Figure]:
    keys, values = _tokens(num_tokens, seed=1)
    kv_bytes = keys.nbytes + values.nbytes
    path = directory / "warm.kvfs"
    kvfs.format(path, max(64 << 20, 4 * kv_bytes))
    with kvfs.open(path) as store:  # the default cache holds a sequence several times
        for group_size in GROUP_SIZES:
            sequence = store.create_sequence(_add_model(store, group_size), f"warm-{group_size}")
            sequence.append(LAYER, keys, values)
            sequence.flush()
            queries = _queries(group_size, seed=2)
            calls = {"kvfs": (kv_bytes, lambda q=queries, s=sequence: store.attend(LAYER, q, [s]))}
            rivals, memory = measure_in_rounds(calls | _torch_calls(keys, values, queries))
            ours = rivals.pop("kvfs")
            best = max(rivals, key=rivals.get, default=None)
            prefix = f"attention.warm.g{group_size}"
            rival = {
                "rival": f"torch SDPA, {best}" if best else None,
                "rival_value": rivals[best] / GB if best else None,
                "ratio": ours / rivals[best] if best else None,
            }
            if best:
                goal = RATIO_GOAL[group_size]
                yield Figure(f"{prefix}.ratio_vs_torch", rival["ratio"], "ratio", goal=goal, **rival)
            yield Figure(f"{prefix}.bandwidth", ours / GB, "GB/s", limit=memory / GB, **rival)
            yield Figure(
                f"{prefix}.fraction_of_memory_bandwidth",
                ours / memory,
                "fraction",
                limit=1.0,
                goal=FRACTION_GOAL[group_size],
            )
            if group_size == GROUP_SIZES[0]:
                yield Figure("memory.read_bandwidth", memory / GB, "GB/s")
            store.delete_sequence(sequence.name)
            store.flush()
    path.unlink()


def _append_and_cold(directory: Path, num_tokens: int) -> Iterator[Figure]:
    """Prefills of several layers, each on a fresh drive; then attention with a cache much smaller than one.

    Ours and the rival's in turn, for a disk whose speed drifts.
    """
    num_layers = 4
    keys, values = _tokens(num_tokens, seed=3)
    total_bytes = num_layers * (keys.nbytes + values.nbytes)
    path = directory / "cold.kvfs"
    best = limits.fio_write_bandwidth(directory, total_bytes // 4)
    depths = (best[1],) if best else ()

    def append() -> float:
        nonlocal waf
        path.unlink(missing_ok=True)
        kvfs.format(path, 2 * total_bytes + (256 << 20))
        with kvfs.open(path, cache_bytes=64 << 20) as store:
            model = _add_model(store, 1, num_layers=num_layers)
            warmup = store.create_sequence(model, "warm-up")
            for layer in range(num_layers):  # compile before timing
                warmup.append(layer, keys[:256], values[:256])
            warmup.flush()
            sequence = store.create_sequence(model, "cold")
            start = time.perf_counter()
            for layer in range(num_layers):
                sequence.append(layer, keys, values)
            sequence.flush()
            seconds = time.perf_counter() - start
            waf = store.counters()["flash"]["waf"]
        return total_bytes / seconds

    waf = 0.0
    ours, raw = [], []
    for number in range(APPEND_ROUNDS):
        # a disk with a burst allowance is kinder to whoever comes first
        for measure in ("ours", "raw") if number % 2 else ("raw", "ours"):
            time.sleep(DISK_REST_SECONDS)
            if measure == "ours":
                ours.append(append())
            else:
                raw.append(limits.fio_write_bandwidth(directory, total_bytes, depths=depths))
    yield from _against_disk("append", ours, raw, goal=0.7, rival="fio write 1 MiB, best depth")
    yield Figure("append.waf", waf, "ratio", limit=1.0)
    with kvfs.open(path, cache_bytes=64 << 20) as store:
        sequence = store.sequence("cold")
        queries = _queries(1, seed=4)
        store.attend(0, queries, [sequence])
        data_start = path.stat().st_size - 2 * total_bytes - (256 << 20)
        ours, raw = [], []
        for _ in range(DISK_ROUNDS):
            start = time.perf_counter()
            for layer in range(num_layers):
                store.attend(layer, queries, [sequence])
            ours.append(total_bytes / (time.perf_counter() - start))
            offset = max(0, data_start) + (8 << 20)
            raw.append(limits.fio_read_bandwidth(path, offset, total_bytes, READ_REQUEST_BYTES))
    yield from _against_disk(
        "attention.cold", ours, raw, goal=0.95, rival=f"fio read {READ_REQUEST_BYTES >> 10} KiB, best depth"
    )
    path.unlink()


def _against_disk(prefix: str, ours: list[float], raw: list, goal: float, rival: str) -> Iterator[Figure]:
    """Our bandwidth and its share of the disk's; the latter only where fio could be run."""
    found = statistics.median(ours)
    disk = statistics.median(bandwidth for bandwidth, _ in raw) if all(raw) else None
    yield Figure(
        f"{prefix}.bandwidth",
        found / GB,
        "GB/s",
        rival=rival if disk else None,
        rival_value=disk / GB if disk else None,
        ratio=found / disk if disk else None,
        limit=disk / GB if disk else None,
    )
    if disk:
        yield Figure(f"{prefix}.fraction_of_device_bandwidth", found / disk, "fraction", goal=goal)


def _accuracy(directory: Path) -> Iterator[Figure]:
    """Largest error of the numba worker against the reference, relative to the largest output."""
    keys, values = _tokens(1000, seed=5)
    path = directory / "accuracy.kvfs"
    kvfs.format(path, "64MiB")
    queries = _queries(4, seed=6)
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for worker in ("numba", "reference"):
        with kvfs.open(path, worker=worker) as store:
            for dtype in ("float16", "bfloat16", "float32"):
                sequence = store.create_sequence(_add_model(store, 4, dtype), f"{worker}-{dtype}")
                sequence.append(LAYER, keys, values)
                outputs.setdefault(dtype, {})[worker], _ = store.attend(LAYER, queries, [sequence])
    for dtype, found in outputs.items():
        error = np.abs(found["numba"] - found["reference"]).max() / np.abs(found["reference"]).max()
        yield Figure(
            f"attention.accuracy.{dtype}.relative_error_max",
            float(error),
            "fraction",
            goal=1e-3,
            goal_is_maximum=True,
        )
    path.unlink()


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """All figures; drives are made in a temporary folder of `directory` and removed."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as scratch:
        place = Path(scratch)
        return [
            *_warm(place, 1024 if quick else WARM_TOKENS),
            *_append_and_cold(place, 2048 if quick else 65_536),
            *_accuracy(place),
            *quantized.measure(place, 2048 if quick else 65_536),
        ]
