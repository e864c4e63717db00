"""What admission on second sight spares the flash, and what it costs in hits: the traces of eviction.py.

A look-up of an object that misses stores it, as a cache does; with admission, when it is offered for the second
time. Flash written is the host's, by the drive's own count, over the bytes of the cap.
"""

import tempfile
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.eviction import TRACES

OBJECT_BYTES = 64 << 10
REQUESTS = 40  # times the objects that the cap has room for


@dataclass
class Result:
    trace: str
    admission: str
    requests: int
    hit_rate: float
    written_caps: float
    spared_caps: float


def measure(trace: str, admission: str, capacity: int = 40, seed: int = 1) -> Result:
    """capacity: objects that the cap has room for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drive.kvfs"
        kvfs.format(path, "64MiB")
        with kvfs.open(path, num_workers=1) as store:
            cap = capacity * OBJECT_BYTES
            cache = store.object_cache("c", capacity_bytes=cap, admission=admission)
            data, requests = np.ones(OBJECT_BYTES, np.uint8), REQUESTS * capacity
            target = np.empty_like(data)
            before = store.counters()["flash"]["host_bytes_written"]
            hits = 0
            keys = TRACES[trace](np.random.default_rng(seed), capacity)
            for key in islice(keys, requests):
                name = b"%d" % key
                if cache.get([name], [target])[0]:
                    hits += 1
                else:
                    cache.put([name], [data])
            store.flush()
            counters = store.counters()
            written = counters["flash"]["host_bytes_written"] - before
            spared = counters["objects"]["bytes_spared"]
            return Result(trace, admission, requests, hits / requests, written / cap, spared / cap)


def run(capacity: int = 40) -> list[dict]:
    return [
        asdict(measure(trace, admission, capacity)) for trace in TRACES for admission in ("all", "second-sight")
    ]


if __name__ == "__main__":
    for row in run():
        print(
            f"{row['trace']:9} {row['admission']:13} hits {row['hit_rate']:.3f}"
            f" written {row['written_caps']:5.1f} caps, spared {row['spared_caps']:5.1f} caps"
        )
