"""One decode step's attention in torch on the CPU, in every way worth trying; the fastest is the rivals'.

A token's query heads of one KV head are passed as rows of one query matrix, which reads K and V once per
group; `enable_gqa` is tried as well. float16 is slow on many CPUs, so converting some heads at a time into
small buffers, at the cost of the conversion, is tried too.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvfs_bench.decode_shape import GROUP_SIZE, HEAD_DIM, NUM_KV_HEADS, NUM_QUERY_HEADS

TUNING_ROUNDS = 7
ABOUT_AS_FAST = 1.15
HEADS = (1, 2, 4, 8)  # to convert at a time


@dataclass(frozen=True)
class Kernel:
    """A way to attend. Calling it: queries [NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM], keys and values
    [NUM_KV_HEADS, n, HEAD_DIM], to [NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM].

    heads: converted at a time, 0 for none; dtype: what it computes in; buffers: for conversion, made by a call
    """

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    heads: int = 0
    buffers: list[torch.Tensor] = field(default_factory=list, compare=False)

    def __call__(self, queries, keys, values):
        return self.attend(queries, keys, values)

    def buffer_bytes(self, num_tokens: int) -> int:
        """Of its buffers for conversion."""
        return 2 * self.heads * num_tokens * HEAD_DIM * self.dtype.itemsize


def use_all_cpus() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def to_torch(queries: np.ndarray) -> torch.Tensor:
    """[NUM_QUERY_HEADS, HEAD_DIM] as [NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM]."""
    return torch.from_numpy(queries).view(NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM)


def _grouped(queries, keys, values):
    queries, keys, values = (tensor.unsqueeze(0) for tensor in (queries, keys, values))
    return scaled_dot_product_attention(queries, keys, values)[0]


def _enable_gqa(queries, keys, values):
    queries = queries.view(1, NUM_QUERY_HEADS, 1, HEAD_DIM)
    out = scaled_dot_product_attention(queries, keys.unsqueeze(0), values.unsqueeze(0), enable_gqa=True)
    return out.view(NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM)


def _products(queries, keys, values):
    """FlexGen's: two batched matrix products around a softmax."""
    scores = torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(HEAD_DIM)
    return torch.bmm(torch.softmax(scores, -1), values)


def _converting(name: str, attend, dtype: torch.dtype, heads: int, capacity_tokens: int) -> Kernel:
    """A kernel: `attend` over copies of some heads at a time."""
    buffers: list[torch.Tensor] = []

    def run(queries, keys, values):
        if not buffers:
            buffers.extend(torch.empty(heads, capacity_tokens, HEAD_DIM, dtype=dtype) for _ in range(2))
        queries = queries.to(dtype)
        num_tokens = keys.shape[1]
        key_buffer, value_buffer = (buffer[:, :num_tokens] for buffer in buffers)
        parts = []
        for first in range(0, NUM_KV_HEADS, heads):
            part = slice(first, first + heads)
            key_buffer.copy_(keys[part])
            value_buffer.copy_(values[part])
            parts.append(attend(queries[part], key_buffer, value_buffer))
        return torch.cat(parts)

    return Kernel(f"{name}, converted {heads} heads at a time", run, dtype, heads, buffers)


def native_kernels(dtype: torch.dtype) -> list[Kernel]:
    """For K and V that are of this dtype already."""
    name = str(dtype).removeprefix("torch.")
    return [
        Kernel(f"SDPA {name}, a group's queries as rows", _grouped, dtype),
        Kernel(f"SDPA {name}, enable_gqa", _enable_gqa, dtype),
    ]


def converting_kernels(capacity_tokens: int) -> list[Kernel]:
    """For float16 K and V."""
    return [
        _converting(f"SDPA {str(dtype).removeprefix('torch.')}", _grouped, dtype, heads, capacity_tokens)
        for dtype in (torch.bfloat16, torch.float32)
        for heads in HEADS
    ]


def product_kernels(capacity_tokens: int) -> list[Kernel]:
    """For float16 K and V, in float32."""
    return [
        _converting("float32 matrix products", _products, torch.float32, heads, capacity_tokens)
        for heads in HEADS
    ]


def fastest(kernels: list[Kernel], keys: torch.Tensor, values: torch.Tensor) -> tuple[Kernel, float]:
    """(the kernel, its seconds) that is fastest on these, medians of calls in turn; of those that are about as
    fast the one with the smallest buffers, because the room serves for layers that stay in memory."""
    queries = torch.randn(NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM).to(keys.dtype)
    found = {kernel: [] for kernel in kernels}
    with torch.inference_mode():
        for number in range(TUNING_ROUNDS + 1):
            for kernel, seconds in found.items():
                start = time.perf_counter()
                kernel(queries, keys, values)
                if number:  # the first call allocates
                    seconds.append(time.perf_counter() - start)
    medians = {kernel: statistics.median(seconds) for kernel, seconds in found.items()}
    for kernel in kernels:
        kernel.buffers.clear()
    enough = ABOUT_AS_FAST * min(medians.values())
    best = min((kernel for kernel in kernels if medians[kernel] <= enough), key=lambda kernel: kernel.heads)
    return best, medians[best]
