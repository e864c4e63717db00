"""A store in another process against the same store in this one: what crossing costs.

In-process and remote calls take turns in short rounds, on a drive each, for a machine whose speed drifts.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import kvfs
from kvfs.remote.server import RemoteServer
from kvfs.tree import Caller
from kvfs_bench.figures import Figure

NUM_KV_HEADS = 8
HEAD_DIM = 128
ATTEND_TOKENS = (4096, 16_384)
TOKENS_PER_APPEND = (1, 16, 1024)
ROUNDS = 15
ATTEND_CALLS = 20  # of each kind, per round
APPENDED_TOKENS = 8192  # per round
MICROSECONDS = 1e6


def _own(drive: Path, folder: Path, pipe) -> None:
    """The owner: serves until the pipe is closed."""
    with kvfs.open(drive) as store, RemoteServer(store, folder / "socket") as server:
        (folder / ".kvfs").mkdir()
        (folder / ".kvfs" / "connect").write_bytes(server.invite(Caller(os.geteuid(), os.getegid(), 0)))
        pipe.send("ready")
        pipe.recv()


def _model(store):
    return store.add_model(
        "bench", num_layers=1, num_query_heads=NUM_KV_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
    )


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _attend(stores: dict, keys, values, num_tokens: int, rounds: int):
    """Seconds of a call of one query, median, in process and remote."""
    queries = np.random.default_rng(1).standard_normal((1, 1, NUM_KV_HEADS, HEAD_DIM), np.float32)
    sequences = {}
    for kind, store in stores.items():
        sequences[kind] = store.create_sequence(_model(store), f"attend-{num_tokens}")
        sequences[kind].append(0, keys[:num_tokens], values[:num_tokens])
        sequences[kind].flush()
    found = {kind: [] for kind in stores}
    for _ in range(rounds):
        for kind, store in stores.items():
            attend = partial(store.attend, 0, queries, sequences[kind])
            attend()  # threads of the other's last call may still spin
            found[kind] += [_seconds(attend) for _ in range(ATTEND_CALLS)]
    for store in stores.values():
        store.delete_sequence(f"attend-{num_tokens}")
    return tuple(statistics.median(found[kind]) for kind in stores)


def _append(stores: dict, keys, values, per_call: int, rounds: int):
    """Tokens per second, median, in process and remote: appended and taken by the owner."""
    found = {kind: [] for kind in stores}
    for number in range(rounds):
        for kind, store in stores.items():
            sequence = store.create_sequence(_model(store), f"append-{number}")
            sequence.append(0, keys[:per_call], values[:per_call])

            def append(sequence=sequence):
                for start in range(0, APPENDED_TOKENS, per_call):
                    sequence.append(0, keys[start:][:per_call], values[start:][:per_call])
                assert sequence.num_tokens == APPENDED_TOKENS + per_call

            found[kind].append(APPENDED_TOKENS / _seconds(append))
            store.delete_sequence(sequence.name)
            store.flush()
    return tuple(statistics.median(found[kind]) for kind in stores)


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """quick: to see that it runs."""
    rounds = 1 if quick else ROUNDS
    figures = []
    random = np.random.default_rng(0)
    shape = (max(ATTEND_TOKENS), NUM_KV_HEADS, HEAD_DIM)
    keys, values = (random.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as name:
        scratch = Path(name)
        for kind in ("local", "remote"):
            kvfs.format(scratch / f"{kind}.kvfs", "1GiB")
        folder = scratch / "mount"
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        owner = context.Process(target=_own, args=(scratch / "remote.kvfs", folder, theirs), daemon=True)
        owner.start()
        ours.recv()
        with kvfs.open(scratch / "local.kvfs") as local, kvfs.open(folder) as remote:
            stores = {"local": local, "remote": remote}
            for num_tokens in ATTEND_TOKENS:
                times = _attend(stores, keys, values, num_tokens, rounds)
                here, there = (seconds * MICROSECONDS for seconds in times)
                figures.append(
                    Figure(
                        f"remote.attend.{num_tokens}.overhead",
                        there - here,
                        "us",
                        rival="in process, whole call",
                        rival_value=here,
                        ratio=there / here,
                        goal=100.0,
                        goal_is_maximum=True,
                    )
                )
            for per_call in TOKENS_PER_APPEND:
                here, there = _append(stores, keys, values, per_call, rounds)
                figures.append(
                    Figure(
                        f"remote.append.{per_call}_tokens_a_call",
                        there,
                        "tokens/s",
                        rival="in process",
                        rival_value=here,
                        ratio=there / here,
                        goal=0.6 * here if per_call > 1 else None,
                    )
                )
        ours.send("end")
        owner.join()
    return figures
