"""What quantized pages bring, and what they cost: attention over the same tokens in each dtype.

Speeds are tokens attended to per second, beside float16's in the same rounds; errors are those of the output,
against float64 attention over the keys and values as they were before they were stored.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.figures import Figure

QUANTIZED = ("float8_e4m3", "int8", "int4")
DTYPES = ("float16", *QUANTIZED)
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 8, 4, 128
WARM_TOKENS = 16_384
WARM_ROUNDS, COLD_ROUNDS = 15, 5
SETTLE_SECONDS = 0.05


def _tokens(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """float16 keys and values [num_tokens, NUM_KV_HEADS, HEAD_DIM]; channels of keys differ tenfold in size."""
    random = np.random.default_rng(21)
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (random.standard_normal(shape, np.float32) for _ in range(2))
    keys *= 10 ** random.uniform(-1, 0, HEAD_DIM).astype(np.float32)
    return keys.astype(np.float16), values.astype(np.float16)


def _exact(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 attention of one query [num_query_heads, HEAD_DIM]."""
    out = np.empty(queries.shape)
    for head in range(len(queries)):
        of_head = head // GROUP_SIZE
        scores = keys[:, of_head].astype(np.float64) @ queries[head] * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, of_head].astype(np.float64) / weights.sum()
    return out


def _medians(store, sequences: dict, queries, ranges, rounds: int) -> dict[str, float]:
    """Seconds of a call over each sequence, taken in turn."""
    found: dict[str, list[float]] = {dtype: [] for dtype in sequences}
    for sequence in sequences.values():
        store.attend(0, queries, sequence, token_ranges=ranges)
    for _ in range(rounds):
        for dtype, sequence in sequences.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            store.attend(0, queries, sequence, token_ranges=ranges)
            found[dtype].append(time.perf_counter() - start)
    return {dtype: statistics.median(seconds) for dtype, seconds in found.items()}


def _speeds(part: str, seconds: dict[str, float], num_tokens: int) -> Iterator[Figure]:
    for dtype in QUANTIZED:
        yield Figure(
            f"attention.{part}.{dtype}.tokens_per_second",
            num_tokens / seconds[dtype],
            "tokens/s",
            rival="float16 pages",
            rival_value=num_tokens / seconds["float16"],
            ratio=seconds["float16"] / seconds[dtype],
        )


def measure(directory: Path, num_tokens: int) -> Iterator[Figure]:
    """num_tokens: of each sequence; the cold part reads all of them past a small cache."""
    keys, values = _tokens(num_tokens)
    queries = np.random.default_rng(22).standard_normal((1, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM))
    path = directory / "quantized.kvfs"
    kv_bytes = keys.nbytes + values.nbytes
    kvfs.format(path, (256 << 20) + 4 * kv_bytes)
    # a sixteenth of the float16 sequence, an eighth of what is read in int8
    with kvfs.open(path, cache_bytes=max(8 << 20, kv_bytes // 16)) as store:
        sequences = {}
        for dtype in DTYPES:
            model = store.add_model(
                dtype,
                num_layers=1,
                num_query_heads=NUM_KV_HEADS * GROUP_SIZE,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_DIM,
                dtype=dtype,
            )
            sequences[dtype] = store.create_sequence(model, dtype)
            sequences[dtype].append(0, keys, values)
        store.flush()
        exact = _exact(queries[0, 0], keys, values)
        for dtype, sequence in sequences.items():
            out, _ = store.attend(0, queries.astype(np.float32), sequence)
            error = np.linalg.norm(out[0, 0] - exact) / np.linalg.norm(exact)
            yield Figure(f"attention.{dtype}.error_rms", float(error), "fraction of the output")
        seconds = _medians(store, sequences, queries, None, COLD_ROUNDS)
        yield from _speeds("cold", seconds, num_tokens)
    num_warm = min(num_tokens, WARM_TOKENS)
    with kvfs.open(path, cache_bytes=512 << 20) as store:
        sequences = {dtype: store.sequence(dtype) for dtype in DTYPES}
        seconds = _medians(store, sequences, queries, np.array([[[0, num_warm]]]), WARM_ROUNDS)
        yield from _speeds("warm", seconds, num_warm)
    path.unlink()
