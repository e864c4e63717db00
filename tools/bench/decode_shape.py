"""What is decoded: the shape of the KV cache, and the tokens that every contender gets."""

from dataclasses import dataclass, replace

import numpy as np

from kvfs_bench.sparse_statistics import HeadSource, HeadStatistics

NUM_KV_HEADS = 8
HEAD_DIM = 128
GROUP_SIZE = 4
NUM_QUERY_HEADS = NUM_KV_HEADS * GROUP_SIZE
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2  # K and V of one layer, float16
ROOM_TOKENS = 64  # for what is decoded; a multiple of a block of the disk in every layout


@dataclass(frozen=True)
class Shape:
    """cap_bytes: memory for whatever a contender keeps; num_tokens: of the prompt, in each layer; statistics:
    of a model's heads, for tokens like its own instead of normal noise."""

    cap_bytes: int
    num_layers: int
    num_tokens: int
    statistics: HeadStatistics | None = None

    @property
    def layer_bytes(self) -> int:
        return self.num_tokens * TOKEN_BYTES

    @property
    def kv_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def capacity_tokens(self) -> int:
        return self.num_tokens + ROOM_TOKENS

    @property
    def checked_layer(self) -> int:
        """Whose output is compared with the reference."""
        return self.num_layers // 2


@dataclass(frozen=True)
class DecodedToken:
    """One layer's share of a new token. queries: float16 [NUM_QUERY_HEADS, HEAD_DIM]; keys, values: float16
    [1, NUM_KV_HEADS, HEAD_DIM]."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def _sources(shape: Shape, layer: int) -> list[HeadSource]:
    return [HeadSource(shape.statistics, HEAD_DIM, [3, layer, head]) for head in range(NUM_KV_HEADS)]


def prompt(shape: Shape, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's keys and values, float16 [num_tokens, NUM_KV_HEADS, HEAD_DIM] each."""
    if shape.statistics is not None:
        heads = [source.keys_values(shape.num_tokens) for source in _sources(shape, layer)]
        return tuple(np.stack(part, axis=1).astype(np.float16) for part in zip(*heads, strict=True))
    random = np.random.default_rng([1, layer])
    size = (shape.num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return tuple(random.standard_normal(size, np.float32).astype(np.float16) for _ in range(2))


def decoded(step: int, layer: int, shape: Shape | None = None) -> DecodedToken:
    """shape: of the prompt, for queries that are like its statistics."""
    random = np.random.default_rng([2, step, layer])
    sizes = ((NUM_QUERY_HEADS, HEAD_DIM), *[(1, NUM_KV_HEADS, HEAD_DIM)] * 2)
    token = DecodedToken(*(random.standard_normal(size, np.float32).astype(np.float16) for size in sizes))
    if shape is None or shape.statistics is None:
        return token
    queries = [source.queries(GROUP_SIZE, [4, step, layer]) for source in _sources(shape, layer)]
    return replace(token, queries=np.concatenate(queries).astype(np.float16))


def reference(shape: Shape, layer: int, num_steps: int) -> np.ndarray:
    """float64 [NUM_QUERY_HEADS, HEAD_DIM]: a layer's attention of the last of so many steps."""
    keys, values = prompt(shape, layer)
    steps = [decoded(step, layer, shape) for step in range(num_steps)]
    keys = np.concatenate([keys, *(step.keys for step in steps)]).astype(np.float64)
    values = np.concatenate([values, *(step.values for step in steps)]).astype(np.float64)
    queries = steps[-1].queries.reshape(NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM).astype(np.float64)
    scores = np.einsum("hgd,thd->hgt", queries, keys, optimize=True) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgt,thd->hgd", weights, values, optimize=True).reshape(NUM_QUERY_HEADS, HEAD_DIM)
