"""Decoding on a set of 1, 2 and 8 drives whose flash is the limit.

The flash is in memory, behind a medium that gives so many bytes a second and no more: a read sleeps, without
the GIL, until the drive would have delivered it. So the figures tell what the set makes of its drives, whatever
this machine's disk and cores can do; the rate is low enough for the cores to wait. Attention is computed for
real.

One token: for each layer its keys and values are appended, then attended over with all that came before. The
drives' caches are emptied before each token, so every byte comes from flash once a token.
"""

import itertools
import statistics
import time

import numpy as np

from accel.drive import Drive, DriveConfig, Geometry
from ftl.translation import FlashTranslationLayer
from kvfs.drive_set.opening import join_new, open_set
from kvfs.formatting import format_volume
from kvfs.store import Store
from kvfs_bench.figures import Figure
from kvfs_bench.limited import LimitedMedia

NUM_DRIVES = (1, 2, 8)
GOALS = {2: 1.8, 8: 7.0}
BYTES_PER_SECOND = 25_000_000  # of each drive's flash: eight together are far from what two cores compute
NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 4, 8, 4, 128
NUM_TOKENS = 4096
ROUNDS = 3
CACHE_BYTES = 8 << 20


class Contender:
    """A set of drives with one sequence, ready to decode."""

    def __init__(self, num_drives: int, num_tokens: int, bytes_per_second: float):
        kv_bytes = num_tokens * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 4
        geometry = Geometry.for_capacity(max(48 << 20, 2 * kv_bytes // num_drives))
        config = DriveConfig(CACHE_BYTES, num_workers=1)
        names = [f"simulated-{number}" for number in range(num_drives)]
        self._media = {name: LimitedMedia(geometry, bytes_per_second) for name in names}
        for name, media in self._media.items():
            FlashTranslationLayer.format(media).close()
            drive = Drive.over(media, config)
            format_volume(drive, name)
            drive.close()

        def open_drive(name: str) -> Store:
            return Store(Drive.over(self._media[name], config), name, in_set=True)

        join_new(names, open_drive)
        self.store = open_set(names, open_drive)
        model = self.store.add_model(
            "bench",
            num_layers=NUM_LAYERS,
            num_query_heads=NUM_KV_HEADS * GROUP_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
        )
        self._random = np.random.default_rng(0)
        self._sequence = self.store.create_sequence(model, "s")
        keys, values = self._rows(num_tokens)
        for layer in range(NUM_LAYERS):
            self._sequence.append(layer, keys, values)
        self.store.flush()
        self._token = self._rows(1)
        self._queries = self._random.standard_normal((1, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM), np.float32)
        self.flash_bytes = kv_bytes

    def _rows(self, count: int):
        shape = (count, NUM_KV_HEADS, HEAD_DIM)
        return tuple(self._random.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))

    def token(self, is_limited: bool = True) -> tuple[float, np.ndarray]:
        """(seconds, the last layer's output) of one token."""
        for member in self.store._members.values():
            member.store._drive.cache.clear()
        for media in self._media.values():
            media.is_limited = is_limited
        start = time.perf_counter()
        for layer in range(NUM_LAYERS):
            self._sequence.append(layer, *self._token)
            out, _ = self.store.attend(layer, self._queries, self._sequence)
        seconds = time.perf_counter() - start
        for media in self._media.values():
            media.is_limited = False
        return seconds, out

    def close(self) -> None:
        self.store.close()


def measure(quick: bool = False) -> list[Figure]:
    """quick: to see that it runs."""
    num_tokens, rounds = (1024, 1) if quick else (NUM_TOKENS, ROUNDS)
    rate = BYTES_PER_SECOND * (4 if quick else 1)
    contenders = {count: Contender(count, num_tokens, rate) for count in NUM_DRIVES}
    try:
        answers = [contender.token(is_limited=False)[1] for contender in contenders.values()]  # and compiles
        for one, other in itertools.pairwise(answers):
            np.testing.assert_allclose(one, other, atol=1e-4)
        unlimited = {n: contender.token(is_limited=False)[0] for n, contender in contenders.items()}
        seconds = {count: [] for count in contenders}
        for _ in range(rounds):  # in turn: machines drift
            for count, contender in contenders.items():
                seconds[count].append(contender.token()[0])
    finally:
        for contender in contenders.values():
            contender.close()
    rates = {count: 1 / statistics.median(found) for count, found in seconds.items()}
    figures = []
    for count, contender in contenders.items():
        figures.append(
            Figure(
                f"drives.{count}.tokens",
                rates[count],
                "tokens/s",
                rival="1 drive" if count > 1 else "flash without limit",
                rival_value=rates[1] if count > 1 else 1 / unlimited[1],
                ratio=rates[count] / (rates[1] if count > 1 else 1 / unlimited[1]),
                limit=count * rate / contender.flash_bytes,
                goal=GOALS[count] * rates[1] if count in GOALS else None,
            )
        )
    return figures


def settings(quick: bool = False) -> dict[str, str]:
    rate = BYTES_PER_SECOND * (4 if quick else 1) / 1e6
    return {
        "flash": f"in memory, each drive limited to {rate:.0f} MB/s by sleeping: the drives are the limit",
        "limit": "what the flash of all drives together delivers, for the bytes of one token",
    }
