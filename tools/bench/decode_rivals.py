"""The rivals that hold K/V outside of memory, or all of it inside, each with its settings tuned on the spot.

A contender is a class with `tune(shape, path) -> settings`, run before the process is held to its memory
cap, and a constructor (shape, path, settings), after it; then `attend(layer, token)`, layer after layer, gives
float [NUM_QUERY_HEADS, HEAD_DIM]. `setting` says in words what was chosen. Layers that fit in memory beside
what streaming needs stay there for all of them: what the cap is for.
"""

import mmap
import os
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from kvfs_bench.decode_shape import (
    GROUP_SIZE,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_QUERY_HEADS,
    ROOM_TOKENS,
    TOKEN_BYTES,
    DecodedToken,
    Shape,
)
from kvfs_bench.decode_torch import (
    Kernel,
    converting_kernels,
    fastest,
    native_kernels,
    product_kernels,
    to_torch,
    use_all_cpus,
)

OVERHEAD_BYTES = 16 << 20  # threads' stacks, torch's own temporaries, page tables
NUM_BUFFERS = 2  # one is computed on while the other is filled
COPY_THREADS = 4  # FlexGen's default
# (request, how many in flight) of direct reads. More in flight would have two layers arrive at the same time,
# and the disk idle while the first is computed.
READING = tuple((size << 20, 16 // size // share) for size in (1, 2, 4, 8) for share in (1, 2))
TUNING_LAYERS = 4
TUNING_ROUNDS = 3


def resident_layers(shape: Shape, other_bytes: int, layer_bytes: int) -> list[int]:
    """Layers that stay in memory beside so much else, spread out so that the disk never waits for them."""
    room = shape.cap_bytes - OVERHEAD_BYTES - other_bytes
    if room < shape.num_layers * layer_bytes:
        room -= NUM_BUFFERS * layer_bytes
    count = max(0, min(shape.num_layers, room // layer_bytes))
    return [number * shape.num_layers // count for number in range(count)]


class LayerFile:
    """Makes a file of all layers, each [2, *axes of a token with capacity_tokens in place], float16."""

    def __init__(self, shape: Shape, path: Path, is_head_major: bool):
        self._is_head_major = is_head_major
        tokens = shape.capacity_tokens
        order = (NUM_KV_HEADS, tokens, HEAD_DIM) if is_head_major else (tokens, NUM_KV_HEADS, HEAD_DIM)
        self._layer = np.zeros((2, *order), np.float16)
        self._num_tokens = shape.num_tokens
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        os.posix_fallocate(self._file.fileno(), 0, shape.num_layers * self._layer.nbytes)

    def write(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        for kind, array in enumerate((keys, values)):
            if self._is_head_major:
                self._layer[kind, :, : self._num_tokens] = array.transpose(1, 0, 2)
            else:
                self._layer[kind, : self._num_tokens] = array
        os.pwrite(self._file.fileno(), self._layer, layer * self._layer.nbytes)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class Tails:
    """New tokens of all layers, in memory: the files that rivals read are not written while they decode."""

    def __init__(self, shape: Shape):
        self._rows = np.empty((shape.num_layers, 2, ROOM_TOKENS, NUM_KV_HEADS, HEAD_DIM), np.float16)
        self._num_rows = [0] * shape.num_layers

    def append(self, layer: int, token: DecodedToken) -> np.ndarray:
        """All new tokens of this layer, float16 [2, n, NUM_KV_HEADS, HEAD_DIM]."""
        row = self._num_rows[layer]
        self._rows[layer, 0, row], self._rows[layer, 1, row] = token.keys[0], token.values[0]
        self._num_rows[layer] += 1
        return self._rows[layer, :, : row + 1]


def _aligned(num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] that direct I/O may read to: a mapping begins with an OS page."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def sample_layer(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(NUM_KV_HEADS, shape.num_tokens, HEAD_DIM).half() for _ in range(2))


def attention(kernel: Kernel, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        out = kernel(queries.to(kernel.dtype), keys, values)
    return out.float().numpy().reshape(NUM_QUERY_HEADS, HEAD_DIM)


class FlexGen:
    """FlexGen's offloading to disk: token-major memory-mapped files, four copy threads, the next layer copied
    while this one computes, attention as float32 matrix products. Sheng et al., arXiv:2303.06865."""

    @staticmethod
    def tune(shape: Shape, path: Path) -> Kernel:
        """The kernel; K and V are token-major, as they will be."""
        use_all_cpus()
        keys, values = (array.transpose(0, 1).contiguous().transpose(0, 1) for array in sample_layer(shape))
        return fastest(product_kernels(shape.capacity_tokens), keys, values)[0]

    def __init__(self, shape: Shape, path: Path, kernel: Kernel):
        self._shape, self._kernel = shape, kernel
        with open(path, "rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        layer_shape = (2, shape.capacity_tokens, NUM_KV_HEADS, HEAD_DIM)
        self._layers = np.frombuffer(self._mapping, np.float16).reshape(shape.num_layers, *layer_shape)
        # a quarter of the cap is left to the mapped file's own pages
        other_bytes = kernel.buffer_bytes(shape.capacity_tokens) + shape.cap_bytes // 4
        resident = resident_layers(shape, other_bytes, self._layers[0].nbytes)
        self._resident = {layer: np.empty(layer_shape, np.float16) for layer in resident}
        self._streamed = [layer for layer in range(shape.num_layers) if layer not in self._resident]
        self._buffers = [np.empty(layer_shape, np.float16) for _ in range(NUM_BUFFERS)]
        self._threads = ThreadPoolExecutor(COPY_THREADS)
        self._tails = Tails(shape)
        for layer, buffer in self._resident.items():
            wait(self._copy(layer, buffer))
        advice = self._tune_advice() if self._streamed else "no reading"
        self._position = 0  # of the next layer to be awaited, in _streamed
        self._copies = self._copy(self._streamed[0], self._buffers[0]) if self._streamed else []
        self.setting = f"{kernel.name}; {advice}; {len(resident)} layers stay in memory"

    def _copy(self, layer: int, buffer: np.ndarray) -> list[Future]:
        """Have a layer copied, in a part for each thread."""
        bounds = np.linspace(0, self._shape.num_tokens, COPY_THREADS + 1).astype(int)
        return [
            self._threads.submit(np.copyto, buffer[:, start:stop], self._layers[layer, :, start:stop])
            for start, stop in pairwise(bounds)
        ]

    def _tune_advice(self) -> str:
        """How the kernel is to read ahead in the mapping: whichever copies faster."""
        found = {}
        layers = iter(self._streamed * 4)
        for name, advice in (
            ("madvise normal", mmap.MADV_NORMAL),
            ("madvise sequential", mmap.MADV_SEQUENTIAL),
        ):
            self._mapping.madvise(advice)
            times = []
            for _ in range(TUNING_LAYERS):
                start = time.perf_counter()
                wait(self._copy(next(layers), self._buffers[0]))
                times.append(time.perf_counter() - start)
            found[name] = statistics.median(times), advice
        best = min(found, key=found.get)
        self._mapping.madvise(found[best][1])
        return best

    def attend(self, layer: int, token: DecodedToken) -> np.ndarray:
        if layer in self._resident:
            return self._attend(layer, token, self._resident[layer])
        for copy in self._copies:
            copy.result()
        buffer = self._buffers[self._position % NUM_BUFFERS]
        self._position += 1
        following = self._streamed[self._position % len(self._streamed)]
        self._copies = self._copy(following, self._buffers[self._position % NUM_BUFFERS])
        return self._attend(layer, token, buffer)

    def _attend(self, layer: int, token: DecodedToken, buffer: np.ndarray) -> np.ndarray:
        tail = self._tails.append(layer, token)
        stop = self._shape.num_tokens + tail.shape[1]
        buffer[:, self._shape.num_tokens : stop] = tail
        keys, values = (torch.from_numpy(part[:stop]).transpose(0, 1) for part in buffer)
        return attention(self._kernel, to_torch(token.queries), keys, values)

    def close(self) -> None:
        self._threads.shutdown()


class Direct:
    """Direct reads of head-major layers in large requests, several in flight, ahead of SDPA in its fastest
    dtype. New tokens stay in memory; the file has room for them where they go in the buffers."""

    @staticmethod
    def tune(shape: Shape, path: Path) -> Kernel:
        use_all_cpus()
        kernels = native_kernels(torch.float16) + converting_kernels(shape.capacity_tokens)
        return fastest(kernels, *sample_layer(shape))[0]

    def __init__(self, shape: Shape, path: Path, kernel: Kernel):
        self._shape, self._kernel = shape, kernel
        self._layer_bytes = shape.capacity_tokens * TOKEN_BYTES
        resident = resident_layers(shape, kernel.buffer_bytes(shape.capacity_tokens), self._layer_bytes)
        self._streamed = [layer for layer in range(shape.num_layers) if layer not in resident]
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._buffers = [_aligned(self._layer_bytes) for _ in range(NUM_BUFFERS)]
        self._tails = Tails(shape)
        request_bytes, depth = self._tune_reading() if self._streamed else READING[0]
        self._start(request_bytes, depth)
        self._resident = {layer: _aligned(self._layer_bytes) for layer in resident}
        for layer, buffer in self._resident.items():
            wait(self._read(layer, buffer))
        reading = f"{request_bytes >> 20} MiB x {depth} in flight"
        self.setting = f"{reading}; {kernel.name}; {len(resident)} layers stay in memory"

    def _start(self, request_bytes: int, depth: int) -> None:
        """Begin reading, the first streamed layer first."""
        self._request_bytes, self._threads = request_bytes, ThreadPoolExecutor(depth)
        self._position = 0  # of the next layer to be awaited, in _streamed
        self._reads = [
            self._read(self._streamed[number % len(self._streamed)], buffer)
            for number, buffer in enumerate(self._buffers)
            if self._streamed
        ]

    def _tune_reading(self) -> tuple[int, int]:
        """The request and how many of them in flight with which some layers are read and computed fastest."""
        found = {reading: [] for reading in READING}
        queries = torch.zeros(NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, dtype=torch.float16)
        for _ in range(TUNING_ROUNDS):
            for reading, seconds in found.items():
                self._start(*reading)
                for number in range(TUNING_LAYERS + 1):
                    if number == 1:
                        start = time.perf_counter()
                    self._compute(queries, self._next_buffer(), self._shape.num_tokens)
                    self._read_next()
                seconds.append(time.perf_counter() - start)
                self._threads.shutdown()
        return min(found, key=lambda reading: statistics.median(found[reading]))

    def _read(self, layer: int, buffer: np.ndarray) -> list[Future]:
        base = layer * self._layer_bytes
        return [
            self._threads.submit(self._read_part, buffer[start : start + self._request_bytes], base + start)
            for start in range(0, self._layer_bytes, self._request_bytes)
        ]

    def _read_part(self, buffer: np.ndarray, offset: int) -> None:
        if os.preadv(self._fd, [buffer], offset) != buffer.nbytes:
            raise OSError(f"short read at {offset}")

    def _next_buffer(self) -> np.ndarray:
        """The next streamed layer, waited for."""
        slot = self._position % NUM_BUFFERS
        for read in self._reads[slot]:
            read.result()
        return self._buffers[slot]

    def _read_next(self) -> None:
        """Have a layer to come read into the buffer that _next_buffer gave."""
        slot = self._position % NUM_BUFFERS
        layer = self._streamed[(self._position + NUM_BUFFERS) % len(self._streamed)]
        self._reads[slot] = self._read(layer, self._buffers[slot])
        self._position += 1

    def attend(self, layer: int, token: DecodedToken) -> np.ndarray:
        if layer in self._resident:
            return self._attend(layer, token, self._resident[layer])
        out = self._attend(layer, token, self._next_buffer())
        self._read_next()
        return out

    def _arrays(self, buffer: np.ndarray) -> np.ndarray:
        """A layer's buffer as float16 [2, NUM_KV_HEADS, capacity_tokens, HEAD_DIM]."""
        return buffer.view(np.float16).reshape(2, NUM_KV_HEADS, self._shape.capacity_tokens, HEAD_DIM)

    def _attend(self, layer: int, token: DecodedToken, buffer: np.ndarray) -> np.ndarray:
        tail = self._tails.append(layer, token)
        stop = self._shape.num_tokens + tail.shape[1]
        self._arrays(buffer)[:, :, self._shape.num_tokens : stop] = tail.transpose(0, 2, 1, 3)
        return self._compute(to_torch(token.queries), buffer, stop)

    def _compute(self, queries: torch.Tensor, buffer: np.ndarray, num_tokens: int) -> np.ndarray:
        keys, values = (torch.from_numpy(array[:, :num_tokens]) for array in self._arrays(buffer))
        return attention(self._kernel, queries, keys, values)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)


class InMemory:
    """SDPA over K and V that are all in memory, in its fastest dtype: what no memory cap would allow."""

    @staticmethod
    def tune(shape: Shape, path: Path) -> Kernel:
        use_all_cpus()
        found = []
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            keys, values = (array.to(dtype) for array in sample_layer(shape))
            kernel, seconds = fastest(native_kernels(dtype), keys, values)
            found.append((seconds, kernel))
        return min(found, key=lambda entry: entry[0])[1]

    def __init__(self, shape: Shape, path: Path, kernel: Kernel):
        """path: the file of Direct."""
        self._kernel = kernel
        self._num_tokens = [shape.num_tokens] * shape.num_layers
        layer_shape = (2, NUM_KV_HEADS, shape.capacity_tokens, HEAD_DIM)
        with open(path, "rb", buffering=0) as file:
            self._layers = []
            for _ in range(shape.num_layers):
                layer = np.fromfile(file, np.float16, int(np.prod(layer_shape)))
                self._layers.append(torch.from_numpy(layer).view(layer_shape).to(kernel.dtype))
        self.setting = kernel.name

    def attend(self, layer: int, token: DecodedToken) -> np.ndarray:
        row = self._num_tokens[layer]
        self._num_tokens[layer] += 1
        for array, fresh in zip(self._layers[layer], (token.keys, token.values), strict=True):
            array[:, row] = torch.from_numpy(fresh[0])
        keys, values = self._layers[layer][:, :, : row + 1]
        return attention(self._kernel, to_torch(token.queries), keys, values)

    def close(self) -> None:
        self._layers.clear()
