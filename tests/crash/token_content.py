"""Keys and values that tell which token they are of: every row is made from a stamp that no other token has.

A row's elements are drawn from an alphabet of 256 finite values, by the bytes of the stamp and by fixed noise
that differs between layers, heads, K and V. So a stale row, another layer's or another sequence's differs from
the right one in most elements, and what attention makes of the rows can be computed.
"""

from dataclasses import dataclass, field

import numpy as np

from kvfs.layout import NUMPY_DTYPE

_WORD = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


@dataclass(frozen=True)
class ModelShape:
    """A model as `Store.add_model` takes it, and the content of its tokens."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    group_tokens: int
    _noise: np.ndarray = field(init=False, repr=False, compare=False)
    _alphabet: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        random = np.random.default_rng(sum(self.name.encode()))
        shape = (self.num_layers, 2, 1, self.num_kv_heads * self.head_dim)
        object.__setattr__(self, "_noise", random.integers(0, 256, shape, dtype=np.uint8))
        values = ((np.arange(256) - 127.5) / 128).astype(NUMPY_DTYPE[self.dtype])
        assert len(np.unique(values.view(self.word))) == 256
        object.__setattr__(self, "_alphabet", values.view(self.word))

    @property
    def word(self) -> np.dtype:
        """Unsigned integers as wide as an element: what bits are compared in."""
        return _WORD[NUMPY_DTYPE[self.dtype].itemsize]

    @property
    def arguments(self) -> dict:
        """What `Store.add_model` takes besides the name."""
        names = ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "dtype", "group_tokens")
        return {name: getattr(self, name) for name in names}

    def words(self, layer: int, stamps: np.ndarray) -> np.ndarray:
        """word [K | V, num_tokens, num_kv_heads, head_dim] of tokens by their stamps, uint32 [num_tokens]."""
        stamp_bytes = np.ascontiguousarray(stamps, "<u4").view(np.uint8).reshape(1, -1, 4)
        repeats = self.num_kv_heads * self.head_dim // 4
        letters = np.tile(stamp_bytes, (1, 1, repeats)) ^ self._noise[layer]
        return self._alphabet[letters].reshape(2, len(stamps), self.num_kv_heads, self.head_dim)

    def rows(self, layer: int, stamps: np.ndarray) -> np.ndarray:
        """As `words`, as elements of the model's dtype."""
        return self.words(layer, stamps).view(NUMPY_DTYPE[self.dtype])


MODEL_SHAPES = [
    ModelShape("grouped", 2, 4, 2, 32, "float16", 64),
    ModelShape("single", 1, 1, 1, 64, "float32", 32),
    ModelShape("slack", 3, 2, 1, 40, "bfloat16", 16),
    ModelShape("wide", 1, 4, 4, 64, "float16", 32),
]


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The textbook, in float64: (out, lse) of one sequence.

    queries: [num_queries, num_query_heads, head_dim]; keys, values: [num_tokens, num_kv_heads, head_dim];
    starts, stops: what each query sees, [num_queries]. lse is the natural log, -inf where a query sees nothing.
    """
    _, num_query_heads, head_dim = queries.shape
    group = num_query_heads // keys.shape[1]
    keys = np.repeat(keys.astype(np.float64), group, axis=1)
    values = np.repeat(values.astype(np.float64), group, axis=1)
    scores = np.einsum("qhd,thd->qht", queries.astype(np.float64), keys) * head_dim**-0.5
    position = np.arange(len(keys))
    hidden = (position < starts[:, None]) | (position >= stops[:, None])
    weights = np.exp(scores)  # scores are small: no maximum to take off
    weights *= ~hidden[:, None, :]
    total = weights.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.einsum("qht,thd->qhd", weights, values) / total[..., None]
        lse = np.log(total)
    return np.where(total[..., None] == 0, 0, out), lse
