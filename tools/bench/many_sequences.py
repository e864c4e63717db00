"""Very many sequences on one drive: what a page of a listing, df and an eviction take, in time and memory.

Rows are made in bulk, as flushes would leave them: a sequence has one token group, its token ids and two
attributes. Nothing is written to their blocks, which none of what is measured reads. What is measured runs in a
process of its own, so that its memory is its own.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kvfs
from kvfs_bench.figures import Figure

GOAL_S = 1.0  # of a page of output
PAGE_ROWS = 1000
NUM_EVICTED = 1000
GROUP_TOKENS = 64
MODEL = {"num_layers": 1, "num_query_heads": 2, "num_kv_heads": 1, "head_dim": 32}
ROWS_AT_ONCE = 5000  # a transaction's, which the log has room for
BYTES_PER_SEQUENCE = 48 << 10  # of the drive: its group, and what the catalogue may take of that
SMALLEST_DRIVE = 256 << 20


@dataclass(frozen=True)
class Measured:
    """Of the process that has opened the drive. rss: MiB."""

    open_s: float
    open_rss: float
    first_page_s: float
    middle_page_s: float
    model_page_s: float
    df_s: float
    first_cap_s: float
    choose_victims_s: float
    evict_1000_s: float
    catalogue_bytes: int
    close_s: float
    peak_rss: float


def _name(number: int) -> str:
    return f"sequence-{number:08d}"


def _fill(path: Path, num_sequences: int) -> float:
    """Sequences a second."""
    with kvfs.open(path, worker="reference", cache_bytes="8MiB") as store:
        model = store.add_model("bench", **MODEL, group_tokens=GROUP_TOKENS)
        db, catalogue = store._catalogue._db, store._catalogue
        first_lba, group_lbas, now = store._volume.first_data_lba, model.layout.group_lbas, time.time_ns()
        token_ids = bytes(4 * GROUP_TOKENS)
        started = time.perf_counter()
        for start in range(1, num_sequences + 1, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, num_sequences + 1))
            with catalogue.transaction():
                db.executemany(
                    "INSERT INTO sequence VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0)",
                    [(n, model.id, _name(n), now + n, now + n, GROUP_TOKENS, GROUP_TOKENS) for n in numbers],
                )
                groups = [(n, first_lba + (n - 1) * group_lbas, group_lbas) for n in numbers]
                db.executemany("INSERT INTO kv_group VALUES (?, ?, ?, 1)", groups)
                db.executemany("INSERT INTO sequence_group VALUES (?, 0, ?)", [(n, n) for n in numbers])
                db.executemany("INSERT INTO token_chunk VALUES (?, 0, ?)", [(n, token_ids) for n in numbers])
                noted = [(n, name, b"1000") for n in numbers for name in ("gid", "uid")]
                db.executemany("INSERT INTO sequence_attribute VALUES (?, ?, ?)", noted)
            catalogue.sync()
        rate = num_sequences / (time.perf_counter() - started)
        store._abandon()  # its allocator knows nothing of these blocks
    return rate


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _rss() -> float:
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def _use(path: Path, num_sequences: int) -> Measured:
    started = time.perf_counter()
    store = kvfs.open(path, worker="reference", cache_bytes="8MiB")
    open_s, open_rss = time.perf_counter() - started, _rss()
    first = _seconds(lambda: _check_page(store, "", PAGE_ROWS))
    middle = _seconds(lambda: _check_page(store, _name(num_sequences // 2), PAGE_ROWS))
    of_model = _seconds(lambda: store.sequence_rows(_name(num_sequences // 3), PAGE_ROWS, model="bench"))
    df = _seconds(store.space_usage)
    used = store.space_usage()[0].blocks["groups"]
    cap = _seconds(lambda: store.set_quota("bench", capacity_bytes=used))
    group_bytes = used // num_sequences

    def evict(dry_run: bool) -> None:
        goal = used - NUM_EVICTED * group_bytes
        assert len(store.evict("bench", to_bytes=goal, dry_run=dry_run)) == NUM_EVICTED

    choose_s = _seconds(lambda: evict(True))
    evict_s = _seconds(lambda: (evict(False), store.flush()))
    size = store._volume.database.size
    close_s = _seconds(store.close)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(open_s, open_rss, first, middle, of_model, df, cap, choose_s, evict_s, size, close_s, peak)


def _check_page(store, after: str, limit: int) -> None:
    rows = list(store.sequence_rows(after, limit))
    assert rows and rows == sorted(rows, key=lambda row: row.name)


def _in_a_process(call: Callable, *arguments):
    """The kernel counts a process's largest memory for ever: a fresh one for each measurement."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def measure(directory: Path, num_sequences: int, drive: Path | None = None) -> list[Figure]:
    """drive: one that an earlier run has left there, or where this one is to leave it; None: no drive stays."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = drive or Path(folder, "drive.kvfs")
        figures = [Figure("many_sequences.stored", num_sequences, "sequences")]
        if not path.exists():
            kvfs.format(path, max(SMALLEST_DRIVE, num_sequences * BYTES_PER_SEQUENCE))
            rate = _in_a_process(_fill, path, num_sequences)
            figures.append(Figure("many_sequences.fill", rate, "sequences/s"))
        unclean = _in_a_process(_use, path, num_sequences)
        clean = _in_a_process(_use, path, num_sequences - NUM_EVICTED)
    goals = {"first_page_s", "middle_page_s", "model_page_s", "df_s", "choose_victims_s", "evict_1000_s"}
    for name, value in vars(clean).items():
        goal = GOAL_S if name in goals else None
        unit = "MiB" if name.endswith("rss") else "bytes" if name.endswith("bytes") else "s"
        label = f"many_sequences.{name.removesuffix('_s')}"
        figures.append(Figure(label, value, unit, goal=goal, goal_is_maximum=True))
    figures.append(Figure("many_sequences.open_after_crash", unclean.open_s, "s"))
    figures.append(Figure("many_sequences.first_cap_ever", unclean.first_cap_s, "s"))
    figures.append(Figure("many_sequences.peak_rss_after_crash", unclean.peak_rss, "MiB"))
    return figures
