"""What keys, values and queries of a model look like, and more of them, of other head_dims, that look the same.

Measured over a model's heads on real text, per head, then averaged over heads and layers:

- spectrum: eigenvalues of the covariance within MEAN_TOKENS tokens, largest first, as shares of their sum
- drift: variance of the means of MEAN_TOKENS tokens, over all variance; generated as a walk that forgets half
  from one of these to the next
- mean: its square over the square of a row
- score_std: standard deviation of scale * q . k over tokens, and sink: score of the first token over the mean,
  in natural logs
- query_mean, query_spectrum: as of keys, the spectrum in the keys' eigenvectors

Generated rows are normal in random axes. Real ones are not: they have heavier tails and repeat themselves, so
that attention to them is more concentrated. Generated ones serve for speed, and for errors on the safe side.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

MEAN_TOKENS = 256
FORGETTING = 0.5


@dataclass(frozen=True)
class HeadStatistics:
    key_spectrum: list[float]
    value_spectrum: list[float]
    query_spectrum: list[float]
    key_drift: float
    value_drift: float
    key_mean: float
    value_mean: float
    query_mean: float
    score_std: float
    sink: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "HeadStatistics":
        return cls(**json.loads(path.read_text()))


def _rows(rows: np.ndarray):
    """(spectrum, drift, mean's share, eigenvectors [head_dim, head_dim]) of rows float [n, head_dim]."""
    rows = rows[: len(rows) // MEAN_TOKENS * MEAN_TOKENS].astype(np.float64)
    parts = rows.reshape(-1, MEAN_TOKENS, rows.shape[1])
    means = parts.mean(1)
    within = (parts - means[:, None]).reshape(rows.shape)
    values, vectors = np.linalg.eigh(within.T @ within / len(within))
    drift = means.var(0).sum() / (means.var(0).sum() + values.sum())
    share = (rows.mean(0) ** 2).sum() / (rows**2).sum(1).mean()
    return values[::-1] / values.sum(), drift, share, vectors[:, ::-1]


def measure_head(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> HeadStatistics:
    """keys, values: [num_tokens, head_dim], at least MEAN_TOKENS; queries: [n, head_dim], scaled already."""
    key_spectrum, key_drift, key_mean, axes = _rows(keys[1:])  # the first is a sink
    value_spectrum, value_drift, value_mean, _ = _rows(values)
    moved = (queries - queries.mean(0)) @ axes
    query_spectrum = (moved**2).mean(0)
    scores = queries.astype(np.float64) @ keys.T
    return HeadStatistics(
        key_spectrum.tolist(),
        value_spectrum.tolist(),
        (query_spectrum / query_spectrum.sum()).tolist(),
        float(key_drift),
        float(value_drift),
        float(key_mean),
        float(value_mean),
        float((queries.mean(0) ** 2).sum() / (queries**2).sum(1).mean()),
        float(scores[:, 1:].std(1).mean()),
        float((scores[:, 0] - scores[:, 1:].mean(1)).mean()),
    )


def mean_of(heads: list[HeadStatistics]) -> HeadStatistics:
    return HeadStatistics(
        **{
            name: np.mean([getattr(head, name) for head in heads], axis=0).tolist()
            for name in HeadStatistics.__dataclass_fields__
        }
    )


def _stretched(spectrum: list[float], head_dim: int) -> np.ndarray:
    """Eigenvalues for another head_dim, their sum 1: the same shares for the same shares of the channels."""
    ours, theirs = ((np.arange(n) + 0.5) / n for n in (head_dim, len(spectrum)))
    values = np.exp(np.interp(ours, theirs, np.log(np.maximum(spectrum, 1e-9))))
    return values / values.sum()


class HeadSource:
    """Rows of one head. seed: a different head for each; head_dim: of what is made."""

    def __init__(self, statistics: HeadStatistics, head_dim: int, seed):
        self._statistics, self._head_dim = statistics, head_dim
        self._random = np.random.default_rng(seed)
        size = (head_dim, head_dim)
        self._axes, self._value_axes = (np.linalg.qr(self._random.standard_normal(size))[0] for _ in range(2))
        direction = self._random.standard_normal((3, head_dim))
        self._means = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        s = statistics
        shared = _stretched(s.key_spectrum, head_dim) @ _stretched(s.query_spectrum, head_dim)
        # scores' variance for queries and keys whose squares are 1 and head_dim, with the usual scale
        variance = (1 - s.key_mean) * ((1 - s.query_mean) * shared + s.query_mean / head_dim)
        self._query_size = s.score_std / np.sqrt(variance)

    def _made(self, count: int, spectrum, drift: float, mean: float, axes, direction) -> np.ndarray:
        """float64 [count, head_dim] rows whose squares are 1 on average."""
        deviation = np.sqrt(_stretched(spectrum, self._head_dim))
        rows = self._random.standard_normal((count, self._head_dim)) * deviation
        steps = self._random.standard_normal((-(-count // MEAN_TOKENS), self._head_dim)) * deviation
        for before, step in pairwise(steps):
            step *= np.sqrt(1 - FORGETTING**2)
            step += FORGETTING * before
        walk = np.repeat(steps, MEAN_TOKENS, axis=0)[:count]
        rows = (np.sqrt(1 - drift) * rows + np.sqrt(drift) * walk) @ axes.T
        return np.sqrt(1 - mean) * rows + np.sqrt(mean) * direction

    def keys_values(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """float64 [num_tokens, head_dim] each; elements of about 1."""
        s, size = self._statistics, np.sqrt(self._head_dim)
        keys = size * self._made(
            num_tokens, s.key_spectrum, s.key_drift, s.key_mean, self._axes, self._means[0]
        )
        values = size * self._made(
            num_tokens, s.value_spectrum, s.value_drift, s.value_mean, self._value_axes, self._means[1]
        )
        # queries' mean times this key is the sink's score
        mean_query = self._query_size * np.sqrt(max(s.query_mean, 1e-3)) / size
        keys[0] += s.sink / mean_query * self._means[2]
        return keys, values

    def queries(self, count: int, seed) -> np.ndarray:
        """float64 [count, head_dim]: scores with the usual scale of head_dim ** -0.5 deviate by score_std."""
        self._random = np.random.default_rng(seed)
        s = self._statistics
        rows = self._made(count, s.query_spectrum, 0.0, s.query_mean, self._axes, self._means[2])
        return rows * self._query_size
