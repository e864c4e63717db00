"""Ten times a cap offered to a real store: is use ever above it, and how good are the hits?

A look-up that misses stores its sequence, as a cache does. Use is measured after every operation by what the
allocator has given out, not by what the caps count. Beside it the hit rate of an ideal LRU of the same size.
"""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs.errors import NoSuchSequence
from kvfs_bench.figures import Figure

GROUP_TOKENS = 64  # of one head of 64 float16: four blocks of 4 KiB
OFFERED = 10  # times the cap
POLICIES = ("lru", "clock")
CAPACITY, QUICK_CAPACITY = 40, 8  # sequences that the cap has room for
PERCENT, HIT_POINTS = 100, 1  # an LRU may have so many points less than the ideal one


def zipf(random, capacity: int) -> Iterator[int]:
    """Popularity as that of prompts is said to be, exponent 1, over 20 times the cache."""
    weights = 1 / np.arange(1, 20 * capacity + 1)
    while True:
        yield from random.choice(len(weights), 1000, p=weights / weights.sum()).tolist()


def scans(random, capacity: int) -> Iterator[int]:
    """Zipf, and a run of prompts that come once, two cache sizes long, now and then."""
    popular, fresh = zipf(random, capacity // 2), 1_000_000
    while True:
        for _ in range(4 * capacity):
            yield next(popular)
        yield from range(fresh, fresh + 2 * capacity)
        fresh += 2 * capacity


def loop(random, capacity: int) -> Iterator[int]:
    """Round and round over a tenth more than there is room for: LRU's worst case."""
    while True:
        yield from range(capacity + capacity // 10)


def sessions(random, capacity: int) -> Iterator[int]:
    """Conversations of some turns with others in between; an old one hardly ever comes back."""
    active, fresh = list(range(capacity // 2)), capacity
    while True:
        place = int(random.integers(len(active)))
        yield active[place]
        if random.random() < 0.2:
            active[place], fresh = fresh, fresh + 1


TRACES = {"zipf": zipf, "scans": scans, "loop": loop, "sessions": sessions}


@dataclass
class Result:
    trace: str
    policy: str
    requests: int
    hit_rate: float
    ideal_lru_hit_rate: float
    offered_caps: float
    highest_use: float  # of the cap
    seconds: float


class IdealLru:
    def __init__(self, capacity: int):
        self._capacity, self._kept = capacity, OrderedDict()
        self.hits = 0

    def ask(self, key: int) -> None:
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return
        if len(self._kept) == self._capacity:
            self._kept.popitem(last=False)
        self._kept[key] = None


def measure(trace: str, policy: str, capacity: int = CAPACITY, seed: int = 1) -> Result:
    """capacity: sequences that the cap has room for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drive.kvfs"
        kvfs.format(path, "64MiB")
        with kvfs.open(path, num_workers=1) as store:
            model = store.add_model(
                "m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64, group_tokens=GROUP_TOKENS
            )
            cap = capacity * model.layout.group_lbas * model.layout.page_size
            store.set_quota("m", capacity_bytes=cap, policy=policy)
            return _replay(store, model, cap, trace, policy, capacity, seed)


def _replay(store, model, cap, trace, policy, capacity, seed) -> Result:
    rows = np.zeros((GROUP_TOKENS, 1, 64), np.float16)
    ideal = IdealLru(capacity)
    empty = store.counters()["space"]["free_bytes"]
    hits = requests = stored = highest = 0
    begin = time.perf_counter()
    for key in TRACES[trace](np.random.default_rng(seed), capacity):
        requests += 1
        ideal.ask(key)
        try:
            store.sequence(f"s{key}").read(0, 0, 1)
            hits += 1
        except NoSuchSequence:
            store.create_sequence(model, f"s{key}").append(0, rows, rows)
            stored += 1
        highest = max(highest, empty - store.counters()["space"]["free_bytes"])
        if stored >= OFFERED * capacity or requests >= 4 * OFFERED * capacity:
            break
    seconds = time.perf_counter() - begin
    return Result(
        trace,
        policy,
        requests,
        hits / requests,
        ideal.hits / requests,
        stored / capacity,
        highest / cap,
        seconds,
    )


def run(capacity: int = CAPACITY) -> list[dict]:
    return [asdict(measure(trace, policy, capacity)) for trace in TRACES for policy in POLICIES]


def figures(quick: bool = False) -> list[Figure]:
    """Of each trace and policy its hits beside an ideal LRU's, and the highest use of the cap."""
    found = []
    for row in run(QUICK_CAPACITY if quick else CAPACITY):
        name = f"eviction.{row['trace']}.{row['policy']}"
        hits, ideal = PERCENT * row["hit_rate"], PERCENT * row["ideal_lru_hit_rate"]
        goal = max(0, ideal - HIT_POINTS) if row["policy"] == "lru" else None
        found += [
            Figure(f"{name}.hits", hits, "%", rival="ideal LRU", rival_value=ideal, goal=goal),
            Figure(
                f"{name}.highest use", PERCENT * row["highest_use"], "%", goal=PERCENT, goal_is_maximum=True
            ),
        ]
    return found
