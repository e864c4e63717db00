"""The attention kernel alone, over pages in memory: what all else of the warm path is measured against.

Pages of 8 KV heads x 16,384 tokens (more than any cache), each thread on its share of the units. Every round
measures the kernel and torch SDPA in each dtype in turn, so that a busy machine is the same for all.

Run as `python -m kvfs_bench.kernel [--quick]`; prints a report of figures as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from accel.workers import AttentionBatch, UnitRange, load_worker
from kvfs_bench import limits
from kvfs_bench.figures import Figure, report

NUM_KV_HEADS = 8
HEAD_DIM = 128
NUM_TOKENS = 16_384
UNIT_TOKENS = 2048
PAGE_SIZE = 4096
GROUP_SIZES = (1, 4, 8)
RATIO_GOAL = {1: 1.2, 4: 2.5, 8: 4.0}
FRACTION_GOAL = {1: 0.8, 4: 0.7, 8: 0.6}
ROUNDS = 11
REST_SECONDS = 0.05  # OpenMP's threads spin for a while after torch's turn, and would slow whoever is next
GB = 1e9
STORAGE = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32)}


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a dtype's bits; bfloat16 is cut, not rounded, which no measurement minds."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values


class Work:
    """A batch over random tokens in consecutive pages, and its results."""

    def __init__(self, dtype: str, group_size: int, num_tokens: int, num_kv_heads: int = NUM_KV_HEADS):
        random = np.random.default_rng(1)
        values = random.standard_normal((2, num_kv_heads, num_tokens, HEAD_DIM), np.float32)
        item = STORAGE[dtype].itemsize
        self.num_bytes = values.size * item
        memory = np.empty(self.num_bytes + PAGE_SIZE, np.uint8)
        start = -memory.ctypes.data % PAGE_SIZE
        self.memory = memory[start : start + self.num_bytes]
        self.memory[:] = _stored(values, dtype).reshape(-1).view(np.uint8)
        page_tokens = PAGE_SIZE // (HEAD_DIM * item)
        pages_per_head = num_tokens // page_tokens
        num_pages = num_kv_heads * pages_per_head
        unit_pages = min(UNIT_TOKENS, num_tokens) // page_tokens
        self.num_units = num_pages // unit_pages
        pages = self.memory.ctypes.data + PAGE_SIZE * np.arange(2 * num_pages, dtype=np.uint64)
        self.batch = AttentionBatch(
            dtype=dtype,
            head_dim=HEAD_DIM,
            group_size=group_size,
            key_pages=pages[:num_pages],
            value_pages=pages[num_pages:],
            page_first_token=np.tile(page_tokens * np.arange(pages_per_head), num_kv_heads),
            page_num_tokens=np.full(num_pages, page_tokens, np.int32),
            unit_first_page=unit_pages * np.arange(self.num_units + 1),
            unit_item=np.zeros(self.num_units, np.int32),
            unit_kv_head=np.repeat(np.arange(num_kv_heads, dtype=np.int32), self.num_units // num_kv_heads),
            queries=random.standard_normal((1, 1, num_kv_heads * group_size, HEAD_DIM)).astype(np.float32),
            visible_start=np.zeros((1, 1), np.int64),
            visible_stop=np.full((1, 1), num_tokens, np.int64),
            scale=HEAD_DIM**-0.5,
        )
        self.out = np.empty((self.num_units, 1, group_size, HEAD_DIM), np.float32)
        self.lse = np.empty((self.num_units, 1, group_size), np.float32)

    def attend_seconds(self, worker, num_threads: int) -> float:
        """Of threads that stay on a CPU each, as the drive's do."""
        units = UnitRange(0, self.num_units)

        def compute(_: int) -> None:
            worker.attend_units(self.batch, units, self.out, self.lse)

        return limits.run_threads(compute, num_threads)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _torch_calls(group_size: int, num_tokens: int, num_threads: int) -> dict[str, tuple[int, Callable]]:
    """dtype -> (bytes of K and V, call of SDPA that returns its seconds); empty without torch."""
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError:
        return {}
    torch.set_num_threads(num_threads)
    calls = {}
    for name in STORAGE:
        dtype = getattr(torch, name)
        key, value = (torch.randn(1, NUM_KV_HEADS, num_tokens, HEAD_DIM).to(dtype) for _ in range(2))
        query = torch.randn(1, NUM_KV_HEADS * group_size, 1, HEAD_DIM).to(dtype)

        def call(query=query, key=key, value=value):
            with torch.inference_mode():
                scaled_dot_product_attention(query, key, value, enable_gqa=True)

        calls[name] = (2 * key.numel() * key.element_size(), lambda call=call: _seconds(call))
    return calls


def _rounds(calls: dict[str, tuple[int, Callable[[], float]]], rounds: int) -> dict[str, float]:
    """Median bytes/s of calls taken in turn, which return the seconds that they took."""
    for _, call in calls.values():
        call()  # compiled code, thread pools
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (_, call) in calls.items():
            time.sleep(REST_SECONDS)
            times[name].append(call())
    return {name: num_bytes / statistics.median(times[name]) for name, (num_bytes, _) in calls.items()}


def _group(group_size: int, num_tokens: int, rounds: int, num_threads: int) -> Iterator[Figure]:
    memory = limits.memory_read_bandwidth(num_threads)
    worker = load_worker("numba")
    works = {dtype: Work(dtype, group_size, num_tokens) for dtype in STORAGE}
    rivals = _torch_calls(group_size, num_tokens, num_threads)
    calls = {
        dtype: (work.num_bytes, lambda work=work: work.attend_seconds(worker, num_threads))
        for dtype, work in works.items()
    }
    calls |= {f"torch {dtype}": call for dtype, call in rivals.items()}
    found = _rounds(calls, rounds)
    memory = max(memory, limits.memory_read_bandwidth(num_threads))  # the same work before and after
    rival = max((name for name in found if name.startswith("torch")), key=found.get, default=None)
    rival_value = found[rival] if rival else None
    rival_name = f"SDPA: {rival}" if rival else None
    prefix = f"kernel.g{group_size}"
    for dtype in STORAGE:
        yield Figure(
            f"{prefix}.{dtype}.bandwidth",
            found[dtype] / GB,
            "GB/s",
            rival=rival_name,
            rival_value=rival_value / GB if rival else None,
            ratio=found[dtype] / rival_value if rival else None,
            limit=memory / GB,
        )
    if rival:
        yield Figure(
            f"{prefix}.ratio_vs_torch",
            found["float16"] / rival_value,
            "ratio",
            rival=rival_name,
            rival_value=rival_value / GB,
            ratio=found["float16"] / rival_value,
            goal=RATIO_GOAL[group_size],
        )
    yield Figure(
        f"{prefix}.fraction_of_memory_bandwidth",
        found["float16"] / memory,
        "fraction",
        limit=1.0,
        goal=FRACTION_GOAL[group_size],
    )


def _accuracy(num_tokens: int) -> Iterator[Figure]:
    """Largest error against the reference, relative to the largest output."""
    for dtype in STORAGE:
        work = Work(dtype, 4, num_tokens, num_kv_heads=1)
        results = {}
        for name in ("numba", "reference"):
            load_worker(name).attend_units(work.batch, UnitRange(0, work.num_units), work.out, work.lse)
            results[name] = work.out.astype(np.float64)
        error = np.abs(results["numba"] - results["reference"]).max() / np.abs(results["reference"]).max()
        yield Figure(
            f"kernel.accuracy.{dtype}.relative_error_max",
            float(error),
            "fraction",
            goal=1e-3,
            goal_is_maximum=True,
        )


def measure(quick: bool = False) -> list[Figure]:
    """All figures. quick: small sizes, to see that it runs."""
    num_threads = len(os.sched_getaffinity(0))
    num_tokens, rounds = (1024, 3) if quick else (NUM_TOKENS, ROUNDS)
    figures = [Figure("memory.read_bandwidth", limits.memory_read_bandwidth(num_threads) / GB, "GB/s")]
    for group_size in GROUP_SIZES:
        figures += _group(group_size, num_tokens, rounds, num_threads)
    return [*figures, *_accuracy(num_tokens)]


if __name__ == "__main__":
    print(json.dumps(report("kernel", measure(quick="--quick" in sys.argv[1:])), indent=2))
